"""How probable data are under a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from flowsolvers.adaptive import AdaptiveSolution, solve_adaptive
from flowsolvers.context import Context, contextual, evaluate, jumps
from flowsolvers.embedded import largest_rms
from flowsolvers.layout import plan
from flowsolvers.solve import Solution, solve
from flowsolvers.velocity import Velocity
from flowsolvers.warps import Schedule

__all__ = ["Likelihood", "log_likelihood", "probe_signs", "with_divergence"]


#: The state, and what the log of its volume has changed by, `[B]`.
_State: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What `log_likelihood` found.

    Args:
        log_density: log p(x1) in nats, `[B]`; divide by D·log 2 for bits per dimension.
        x0: The noise that flows to x1, `[B, ...]`.
        nfe: Velocity evaluations made.
    """

    log_density: Tensor
    x0: Tensor
    nfe: int


def log_likelihood(
    velocity: Velocity,
    x1: Tensor,
    *,
    nfe: int | None = None,
    solver: str | None = None,
    schedule: Schedule | None = None,
    atol: float | None = None,
    rtol: float = 0.0,
    probes: int = 1,
    exact: bool = False,
    generator: torch.Generator | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
) -> Likelihood:
    """Follow the flow from data back to noise, and count how it changes volume.

    log p(x1) = log prior(x0) - ∫ div v dt along the trajectory. The divergence is exact, from D
    products with the Jacobian, or Hutchinson's estimate z·(∂v/∂x)z, from one product for each
    probe z. The probes are signs drawn once for the whole solve, so that what is integrated is
    smooth in time, and v and its products come from one evaluation.

    Args:
        velocity: `velocity(t, x) -> dx/dt`, as for `solve`; differentiable in x, with no row of
            the batch seeing another.
        x1: Data, `[B, ...]`, floating point.
        nfe: Velocity evaluations, at least 1; 100 when None. With atol, as many as it takes.
        solver: On a budget, a Runge-Kutta or Adams method of `solvers()`, `midpoint` when None;
            exponential ones run one way only. To a tolerance, a pair of `solve_adaptive`, `dopri5`
            when None.
        schedule: The time grid of a budget, in the same time as when sampling; `uniform()` when
            None.
        atol: Give this in place of a budget: the error allowed in each step, in the noise and, in
            nats, in the log density, of which each counts for itself. That of the result is a
            multiple, since the prior multiplies the noise's error by the noise.
        rtol: Error allowed besides, relative to the noise and to the log density; a thousandth of
            1000 nats is a nat.
        probes: z for each sample, at least 1. The error falls as 1/√probes; that of the mean over
            samples is unbiased.
        exact: Take the exact divergence, at D products; memory grows with B·D².
        generator: Source of the probes, on x1's device; not needed when exact.
        prior: Log density of the noise, `[B, ...]` to `[B]`; the standard normal when None.

    Returns:
        The log density of each sample, the noise, and the evaluations. No gradient is kept.

    Raises:
        ValueError: x1 is not floating point or has no batch; a number is out of range; there is
            no generator to draw probes from, or it is on another device; the solver is unknown
            or exponential; a budget and a tolerance are given, or rtol without atol.
        AdaptiveError: A solve to a tolerance could not go on. Its x is the pair of the state and
            what the log density has changed by.

    Source: Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366; Grathwohl et
        al., FFJORD, arXiv 1810.01367, with one probe for the whole solve.

    Example:
        >>> flow = lambda t, x: math.log(2.0) * x  # data are N(0, 4)
        >>> found = log_likelihood(flow, torch.zeros(1, 3), nfe=20, exact=True)
        >>> round(found.log_density.item() + 1.5 * math.log(2 * math.pi * 4.0), 4)
        0.0
        >>> found = log_likelihood(flow, torch.zeros(1, 3), atol=1e-4, exact=True)
        >>> round(found.log_density.item() + 1.5 * math.log(2 * math.pi * 4.0), 4), found.nfe
        (0.0, 32)
    """
    if not (x1.is_floating_point() and x1.ndim):
        raise ValueError(
            f"x1 must be floating point with a batch dimension, got {x1.dtype} of shape "
            f"{tuple(x1.shape)}"
        )
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes!r}")
    if atol is None and rtol:
        raise ValueError(f"rtol={rtol!r} needs atol too, as in atol=1e-4")
    if atol is not None and (nfe is not None or schedule is not None):
        raise ValueError("nfe and schedule are of a budget, atol is a tolerance; give one or other")
    signs = None if exact else probe_signs(x1, probes, generator)
    augmented = with_divergence(velocity, x1, signs)
    precise = torch.float64 if x1.dtype == torch.float64 else torch.float32
    state = x1.detach(), torch.zeros(len(x1), dtype=precise, device=x1.device)
    with torch.no_grad():
        found: Solution[_State] | AdaptiveSolution[_State]
        if atol is None:
            name, budget = "midpoint" if solver is None else solver, 100 if nfe is None else nfe
            backwards = plan(name, nfe=budget, schedule=schedule, start=1.0, end=0.0)
            found = solve(augmented, state, plan=backwards)
        else:
            found = solve_adaptive(
                augmented,
                state,
                rtol=rtol,
                atol=atol,
                pair="dopri5" if solver is None else solver,
                start=1.0,
                end=0.0,
                jumps=jumps(velocity),
                norm=lambda state: largest_rms(list(state)),
            )
        x0, volume = found.x
        log_prior = (_standard_normal if prior is None else prior)(x0)
    return Likelihood(log_prior + volume, x0, found.nfe)


def with_divergence(
    velocity: Velocity, x1: Tensor, signs: Tensor | None
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Make a flow of x and the log of its volume from a flow of x.

    Args:
        velocity: `velocity(t, x) -> dx/dt`, differentiable in x.
        x1: A state, `[B, ...]`, for its shape and the model's dtype.
        signs: Probes, `[probes, B, ...]`; None for the exact divergence.

    Returns:
        A velocity of the state (x, log volume `[B]`), which takes the context if x's does. No
        gradient is kept.
    """

    def augmented(
        t: Tensor, state: tuple[Tensor, Tensor], *, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].to(x1.dtype).detach().requires_grad_()
            v = evaluate(velocity, t, x, context)
            if v.shape != x1.shape:
                raise ValueError(
                    f"velocity returned shape {tuple(v.shape)} for x of shape {tuple(x1.shape)}; "
                    f"it must return dx/dt, shaped like x"
                )
            divergence = _divergence(v, x, signs)
        return v.detach(), divergence

    return contextual(augmented) if getattr(velocity, "takes_context", False) else augmented


def probe_signs(x1: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """Draw signs for Hutchinson's estimate.

    Args:
        x1: A state, `[B, ...]`.
        probes: How many for each sample.
        generator: Source of the signs, on x1's device.

    Returns:
        1 or -1, `[probes, B, ...]`, in x1's dtype.

    Raises:
        ValueError: There is no generator, or it is on another device.
    """
    if generator is None:
        raise ValueError(
            "no generator to draw probes from; give one, as in "
            "generator=torch.Generator(x1.device).manual_seed(0), or set exact=True"
        )
    if generator.device.type != x1.device.type:
        raise ValueError(
            f"the generator is on {generator.device}, x1 on {x1.device}; make it with "
            f"torch.Generator({str(x1.device)!r})"
        )
    coins = torch.randint(2, (probes, *x1.shape), generator=generator, device=x1.device)
    return (2 * coins - 1).to(x1.dtype)


def _divergence(v: Tensor, x: Tensor, signs: Tensor | None) -> Tensor:
    if not v.requires_grad:  # it does not depend on x
        return x.new_zeros(len(x))
    if signs is None:
        size = x[0].numel()
        basis = torch.eye(size, dtype=v.dtype, device=v.device).view(size, 1, *x.shape[1:])
        (rows,) = torch.autograd.grad(
            v, x, basis.expand(size, *x.shape), is_grads_batched=True, materialize_grads=True
        )
        return rows.reshape(size, len(x), size).diagonal(dim1=0, dim2=2).sum(-1)
    total = x.new_zeros(len(x))
    for i, z in enumerate(signs):
        more = i + 1 < len(signs)
        (product,) = torch.autograd.grad(v, x, z, retain_graph=more, materialize_grads=True)
        total += (product * z).reshape(len(x), -1).sum(1)
    return total / len(signs)


def _standard_normal(x0: Tensor) -> Tensor:
    flat = x0.reshape(len(x0), -1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))
