"""Time grids fitted to a flow: short steps where the velocity changes fast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flowsolvers.context import Context, contextual, evaluate
from flowsolvers.layout import plan
from flowsolvers.piecewise import from_times
from flowsolvers.solve import solve
from flowsolvers.velocity import Velocity
from flowsolvers.warps import Schedule

__all__ = ["fit_schedule", "fitted"]


def fitted(
    times: Sequence[float],
    velocities: Sequence[Tensor] | Tensor,
    *,
    order: int = 1,
    points: int = 16,
    floor: float = 0.05,
) -> Schedule:
    """Fit a time grid to velocities seen along trajectories.

    The times are even quantiles of F with F' ∝ |dv/dt|^(1 / (order + 1)), |·| the root mean
    square over all elements, which spreads a method's local error evenly over its steps.

    Args:
        times: T of them, strictly increasing in [0, 1], T at least 3.
        velocities: One for each time, of one shape, such as `[T, *x0.shape]`.
        order: Of the method that will use the grid, at least 1.
        points: Steps of the grid that is kept, at least 1; between them it is interpolated.
        floor: Least density as a fraction of the mean, in (0, 1], so that no step grows without
            bound where the velocity stands still.

    Returns:
        A schedule that prints as `times:0,...,1`, with six decimals.

    Raises:
        ValueError: The times and velocities are not as many, are fewer than 3 or do not
            increase, a velocity is not finite, or a number is out of range.

    Source: The equidistribution of a grid-independent error density, as in de Boor, Good
        Approximation by Splines with Variable Knots II, 1974; applied to flows in SharpEuler,
        arXiv 2605.11547, with order = 1.

    Example:
        >>> t = [i / 50 for i in range(51)]
        >>> v = [torch.tensor([s**3]) for s in t]  # dv/dt = 3 t²
        >>> print(fitted(t, v, order=1, points=2, floor=0.001))  # F = t², t = √u
        times:0,0.706983,1
    """
    clock = [float(t) for t in times]
    if len(clock) != len(velocities) or len(clock) < 3:
        raise ValueError(
            f"there are {len(clock)} times and {len(velocities)} velocities; they must be as "
            f"many, and at least 3"
        )
    pairs = pairwise(velocities)
    changes = torch.stack([_size(after - before) for before, after in pairs]).tolist()
    return _spread(clock, changes, order, points, floor)


def fit_schedule(
    velocity: Velocity,
    x0: Tensor,
    *,
    nfe: int = 100,
    order: int = 1,
    points: int = 16,
    floor: float = 0.05,
) -> Schedule:
    """Fit a time grid to a model, from a few trajectories of it.

    Args:
        velocity: `velocity(t, x) -> dx/dt`, as for `solve`.
        x0: A few noises, any shape, floating point; 16 samples do.
        nfe: Velocity evaluations spent, at least 3, on even steps of `ab2`.
        order: Of the method that will use the grid, at least 1.
        points: Steps of the grid that is kept, at least 1; between them it is interpolated.
        floor: Least density as a fraction of the mean, in (0, 1].

    Returns:
        A schedule that prints as `times:0,...,1`, and so goes into a recipe.

    Raises:
        ValueError: A number is out of range, or as for `fitted` and `solve`.

    Example:
        >>> grid = fit_schedule(lambda t, x: t**3 + 0 * x, torch.zeros(1), points=2, floor=0.001)
        >>> round(grid(0.5), 2)  # √0.5
        0.71
    """
    if nfe < 3:
        raise ValueError(f"nfe of fit_schedule must be at least 3, got {nfe!r}")
    changes: list[Tensor] = []
    latest: list[Tensor] = []

    @contextual
    def watched(t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        v = evaluate(velocity, t, x, context)
        if latest:
            changes.append(_size(v - latest.pop()))
        latest.append(v)
        return v

    steps = plan("ab2", nfe=nfe)
    with torch.no_grad():
        solve(watched, x0, plan=steps)
    clock = [row.t for step in steps.steps for row in step.rows]
    return _spread(clock, torch.stack(changes).tolist(), order, points, floor)


def _size(change: Tensor) -> Tensor:
    return change.float().square().mean().sqrt()


def _spread(
    times: list[float], changes: list[float], order: int, points: int, floor: float
) -> Schedule:
    if order < 1 or points < 1:
        raise ValueError(f"order and points must be at least 1, got {order!r} and {points!r}")
    if not 0.0 < floor <= 1.0:
        raise ValueError(f"floor must be in (0, 1], got {floor!r}")
    widths = [b - a for a, b in pairwise(times)]
    if not (times[0] >= 0.0 and times[-1] <= 1.0 and min(widths) > 0.0):
        raise ValueError("times must increase strictly in [0, 1]; sort them and drop repeats")
    if not sum(changes) < float("inf"):
        raise ValueError("a velocity is not finite; look at the model before fitting a grid to it")
    density = [(c / w) ** (1 / (order + 1)) for c, w in zip(changes, widths, strict=True)]
    widths[0] += times[0]  # what was not seen is taken to go on as it was
    widths[-1] += 1.0 - times[-1]
    mass = sum(d * w for d, w in zip(density, widths, strict=True))
    density = [max(d, floor * mass) if mass else 1.0 for d in density]
    edges = [0.0, *times[1:-1], 1.0]
    filled = [0.0, *accumulate(d * w for d, w in zip(density, widths, strict=True))]
    kept, piece = [0.0], 0
    for i in range(1, points):
        target = filled[-1] * i / points
        while filled[piece + 1] < target:
            piece += 1
        kept.append(round(edges[piece] + (target - filled[piece]) / density[piece], 6))
    return from_times([*kept, 1.0])
