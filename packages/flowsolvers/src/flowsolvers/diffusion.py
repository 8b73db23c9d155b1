"""Sampling with noise: the stochastic equations that share a flow's marginals.

Where x follows dx/dt = v, it has the same distribution at every time under
dx = (v + w·s) dt + √(2w) dW, for any w(t) >= 0, with s the score, which v determines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from flowsolvers.context import Context, evaluate
from flowsolvers.curves import uniform
from flowsolvers.paths import Linear, Path
from flowsolvers.spelling import closest_first
from flowsolvers.velocity import Velocity
from flowsolvers.warps import Schedule

__all__ = ["DiffusionForm", "LastStep", "diffusion_coefficient", "sample_sde"]

#: How much noise is put in and taken out again, over time.
DiffusionForm: TypeAlias = Literal[
    "constant", "sigma", "sbdm", "decreasing", "increasing-decreasing"
]

#: How the end, where the score is singular, is reached.
LastStep: TypeAlias = Literal["mean", "euler", "tweedie"]


def diffusion_coefficient(
    form: DiffusionForm, t: float, scale: float = 1.0, path: Path | None = None
) -> float:
    """Evaluate a coefficient of diffusion w(t).

    Args:
        form: `constant`: c. `sigma`: c·σ(t). `sbdm`: c·(σ²·α'/α - σ·σ'), which is c·(1 - t)/t on
            the linear path, the equation that the path was made with. `decreasing`:
            (c·cos πt + 1)²/4. `increasing-decreasing`: c·sin² πt.
        t: In [0, 1], 0 = noise; greater than 0 for `sbdm`, which is infinite there.
        scale: c, at least 0.
        path: `Linear()` when None.

    Returns:
        w(t), at least 0.

    Raises:
        ValueError: The form is unknown, t is outside [0, 1], or c is negative or not finite.

    Convention: The noise of dx is √(2w) dW, as in SiT; where it is written √w dW, w is doubled.

    Source: Ma et al., SiT, arXiv 2401.08740, and its released code, whose time is data at 1 too.

    Example:
        >>> diffusion_coefficient("sbdm", 0.25)
        3.0
        >>> diffusion_coefficient("increasing-decreasing", 0.5, scale=2.0)
        2.0
    """
    _check_name("form", form, DiffusionForm)
    if not (math.isfinite(scale) and scale >= 0.0):
        raise ValueError(f"scale must be finite and at least 0, got {scale!r}")
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t must be in [0, 1], got {t!r}")
    if form == "constant":
        return scale
    if form == "decreasing":
        return 0.25 * (scale * math.cos(math.pi * t) + 1.0) ** 2
    if form == "increasing-decreasing":
        return scale * math.sin(math.pi * t) ** 2
    alpha, sigma, alpha_dot, sigma_dot = _at(path or Linear(), t)
    if form == "sigma":
        return scale * sigma
    if sigma == 0.0 or scale == 0.0:
        return 0.0
    return scale * sigma * (sigma * alpha_dot / alpha - sigma_dot) if alpha else math.inf


def sample_sde(
    velocity: Velocity,
    x0: Tensor,
    *,
    nfe: int,
    generator: torch.Generator | Callable[[Tensor], Tensor],
    form: DiffusionForm = "sigma",
    scale: float = 1.0,
    last_step: LastStep = "mean",
    last_size: float = 0.04,
    schedule: Schedule | None = None,
    path: Path | None = None,
    start: float = 0.0,
) -> Tensor:
    """Sample the stochastic equation with the flow's marginals, by Euler and Maruyama's method.

    The state is float32 (float64 when x0 is float64) whatever the model's dtype; weights are
    floats known before the first call, and the loop never waits for the device.

    Args:
        velocity: `velocity(t, x) -> dx/dt`, as for `solve`; it is given the context.
        x0: Noise, any shape, floating point.
        nfe: Velocity evaluations and steps, at least 1.
        generator: Source of the noise, on x0's device; or a function that is given the state and
            returns noise of its shape and dtype, such as one with a generator for each sample.
        form: Of w(t), as for `diffusion_coefficient`.
        scale: c of w(t); `decreasing` is free of noise at no c, the others are at 0.
        last_step: From 1 - last_size to 1. `mean`: a step without noise, v + w·s. `euler`: one
            along v. `tweedie`: the prediction of the data; on the linear path that is `euler`.
        last_size: Length of the last step, in (0, 1).
        schedule: Spreads the other steps over [start, 1 - last_size]; `uniform()` when None.
        path: That the velocity was trained on; `Linear()` when None.
        start: Time of x0, in [0, 1 - last_size): above 0 where x0 is data with some noise, or where
            the velocity is not finite at 0.

    Returns:
        The state at t=1, shaped like x0.

    Raises:
        ValueError: A number or name is out of range, x0 is not floating point, or the generator
            is on another device.

    Convention: t=0 is noise and t=1 is data. w is limited to σ(t)²/h in a step of length h,
        at which the step already replaces most of the noise in x; more would be unstable, and any
        w keeps the marginals. So `sbdm` starts at t=0, where it is infinite.

    Source: Ma et al., SiT, arXiv 2401.08740; the last steps are those of its released code.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x0 = torch.randn(4000, generator=generator)
        >>> flow = lambda t, x: (2 * t - 1) / (t**2 + (1 - t) ** 2) * x  # data are N(0, 1)
        >>> x1 = sample_sde(flow, x0, nfe=50, generator=generator)
        >>> bool((x1.std() - 1).abs() < 0.05)
        True
    """
    if not x0.is_floating_point():
        raise ValueError(f"x0 must be floating point, got {x0.dtype}; convert it with x0.float()")
    if isinstance(generator, torch.Generator) and generator.device.type != x0.device.type:
        raise ValueError(
            f"the generator is on {generator.device}, x0 on {x0.device}; make it with "
            f"torch.Generator({str(x0.device)!r})"
        )
    rows = _rows(
        nfe, form, scale, last_step, last_size, schedule or uniform(), path or Linear(), start
    )
    state, model = torch.float64 if x0.dtype == torch.float64 else torch.float32, x0.dtype
    clock = torch.tensor([row.context.t for row in rows], dtype=state, device=x0.device).unbind()
    x = x0.to(state)
    for row, t in zip(rows, clock, strict=True):
        v = evaluate(velocity, t, x.to(model), row.context)
        if v.shape != x.shape:
            raise ValueError(
                f"velocity returned shape {tuple(v.shape)} for x of shape {tuple(x.shape)}; "
                f"it must return dx/dt, shaped like x"
            )
        x = (x * row.of_x).add_(v.to(state), alpha=row.of_v)
        if row.of_noise:
            x.add_(_noise(x, generator), alpha=row.of_noise)
    return x


def _noise(x: Tensor, generator: torch.Generator | Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    noise = generator(x)
    if noise.shape != x.shape:
        raise ValueError(
            f"the source of noise returned shape {tuple(noise.shape)} for a state of shape "
            f"{tuple(x.shape)}; they must be the same"
        )
    return noise.to(x)


@dataclass(frozen=True)
class _Row:
    """x ← of_x·x + of_v·v + of_noise·ξ."""

    context: Context
    of_x: float
    of_v: float
    of_noise: float


def _rows(
    nfe: int,
    form: DiffusionForm,
    scale: float,
    last_step: LastStep,
    last_size: float,
    schedule: Schedule,
    path: Path,
    start: float,
) -> list[_Row]:
    _check_name("last_step", last_step, LastStep)
    if nfe < 1:
        raise ValueError(f"nfe must be at least 1, got {nfe!r}")
    if not 0.0 < last_size < 1.0:
        raise ValueError(f"last_size must be in (0, 1), got {last_size!r}")
    if not 0.0 <= start < 1.0 - last_size:
        raise ValueError(
            f"start must be in [0, 1 - last_size = {1.0 - last_size:g}), got {start!r}"
        )
    diffusion_coefficient(form, 0.5, scale, path)  # refuses a bad form or scale
    if nfe == 1:
        times = [start, 1.0]
    else:
        length = 1.0 - last_size - start
        times = [start + length * t for t in schedule.grid(nfe - 1)] + [1.0]
    rows: list[_Row] = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        h, is_last = t_next - t, i + 1 == nfe
        context = Context(t, t_next, i, nfe, 0, i, nfe, is_last)
        sigma = _at(path, t)[1]
        w = min(diffusion_coefficient(form, t, scale, path), sigma * sigma / h)
        x_in_score, v_in_score = _weights(path, t, "score")
        if is_last and last_step == "tweedie":
            rows.append(_Row(context, *_weights(path, t, "data"), 0.0))
        elif is_last and last_step == "euler":
            rows.append(_Row(context, 1.0, h, 0.0))
        else:
            noise = 0.0 if is_last else math.sqrt(2 * w * h)
            of_x, of_v = 1.0 + h * w * x_in_score, h * (1.0 + w * v_in_score)
            rows.append(_Row(context, of_x, of_v, noise))
    return rows


def _weights(path: Path, t: float, target: Literal["score", "data"]) -> tuple[float, float]:
    a, b = path.weights(t, torch.ones((), dtype=torch.float64, device="cpu"), "velocity", target)
    return a.item(), b.item()


def _at(path: Path, t: float) -> tuple[float, float, float, float]:
    time = torch.tensor(t, dtype=torch.float64, device="cpu")
    parts = path.alpha(time), path.sigma(time), path.alpha_dot(time), path.sigma_dot(time)
    alpha, sigma, alpha_dot, sigma_dot = (part.item() for part in parts)
    return alpha, sigma, alpha_dot, sigma_dot


def _check_name(what: str, name: str, literal: object) -> None:
    accepted = cast("tuple[str, ...]", get_args(literal))
    if name not in accepted:
        names = ", ".join(closest_first(name, accepted))
        raise ValueError(f"unknown {what} {name!r}; accepted, closest first: {names}")
