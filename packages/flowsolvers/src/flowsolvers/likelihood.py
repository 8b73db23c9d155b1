"""How probable data are under a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsolvers.layout import plan
from flowsolvers.solve import solve
from flowsolvers.velocity import Velocity
from flowsolvers.warps import Schedule

__all__ = ["Likelihood", "log_likelihood", "probe_signs", "with_divergence"]


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
    nfe: int = 100,
    solver: str = "midpoint",
    schedule: Schedule | None = None,
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
        nfe: Velocity evaluations, at least 1.
        solver: A Runge-Kutta or Adams method of `solvers()`; exponential ones run one way only.
        schedule: The time grid, in the same time as when sampling; `uniform()` when None.
        probes: z for each sample, at least 1. The error falls as 1/√probes; that of the mean over
            samples is unbiased.
        exact: Take the exact divergence, at D products; memory grows with B·D².
        generator: Source of the probes, on x1's device; not needed when exact.
        prior: Log density of the noise, `[B, ...]` to `[B]`; the standard normal when None.

    Returns:
        The log density of each sample, the noise, and the evaluations. No gradient is kept.

    Raises:
        ValueError: x1 is not floating point or has no batch; a number is out of range; there is
            no generator to draw probes from, or it is on another device; or the solver is unknown
            or exponential.

    Source: Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366; Grathwohl et
        al., FFJORD, arXiv 1810.01367, with one probe for the whole solve.

    Example:
        >>> flow = lambda t, x: math.log(2.0) * x  # data are N(0, 4)
        >>> found = log_likelihood(flow, torch.zeros(1, 3), nfe=20, exact=True)
        >>> round(found.log_density.item() + 1.5 * math.log(2 * math.pi * 4.0), 4)
        0.0
    """
    if not (x1.is_floating_point() and x1.ndim):
        raise ValueError(
            f"x1 must be floating point with a batch dimension, got {x1.dtype} of shape "
            f"{tuple(x1.shape)}"
        )
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes!r}")
    backwards = plan(solver, nfe=nfe, schedule=schedule, start=1.0, end=0.0)
    signs = None if exact else probe_signs(x1, probes, generator)
    augmented = with_divergence(velocity, x1, signs)
    with torch.no_grad():
        precise = torch.float64 if x1.dtype == torch.float64 else torch.float32
        volume = torch.zeros(len(x1), dtype=precise, device=x1.device)
        x0, volume = solve(augmented, (x1.detach(), volume), plan=backwards).x
        log_prior = (_standard_normal if prior is None else prior)(x0)
    return Likelihood(log_prior + volume, x0, nfe)


def with_divergence(
    velocity: Velocity, x1: Tensor, signs: Tensor | None
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Make a flow of x and the log of its volume from a flow of x.

    Args:
        velocity: `velocity(t, x) -> dx/dt`, differentiable in x.
        x1: A state, `[B, ...]`, for its shape and the model's dtype.
        signs: Probes, `[probes, B, ...]`; None for the exact divergence.

    Returns:
        A velocity of the state (x, log volume `[B]`). No gradient is kept.
    """

    def augmented(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].to(x1.dtype).detach().requires_grad_()
            v = velocity(t, x)
            if v.shape != x1.shape:
                raise ValueError(
                    f"velocity returned shape {tuple(v.shape)} for x of shape {tuple(x1.shape)}; "
                    f"it must return dx/dt, shaped like x"
                )
            divergence = _divergence(v, x, signs)
        return v.detach(), divergence

    return augmented


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
