"""Steps of a fixed grid, of a method that has no error estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from flowsolvers.adapters.torchdiffeq.options import Grid
from flowsolvers.embedded import Field, Interpolant, State, combine

__all__ = ["GridStep", "endless", "grid_times", "walk"]


@dataclass(frozen=True, eq=False)
class GridStep:
    """A step and, on demand, what lies between its ends."""

    flow: Field
    t: float
    t_next: float
    x: State
    x_next: State
    slope: State
    cubic: bool

    def interpolant(self) -> Interpolant:
        """Return the line between the ends, or the cubic that has their slopes too."""
        h = self.t_next - self.t
        change = [new - old for new, old in zip(self.x_next, self.x, strict=True)]
        if not self.cubic:
            return Interpolant(self.t, h, self.x, (change,))
        parts = [change, self.slope, self.flow(self.t_next, self.x_next)]
        coefficients = tuple(
            combine(weights, parts) for weights in ((0, h, 0), (3, -2 * h, -h), (-2, h, h))
        )
        return Interpolant(self.t, h, self.x, coefficients)


def grid_times(grid: Grid, func: Any, y0: Any, t: Tensor, times: list[float]) -> list[float]:
    """Return the ends of the steps.

    Raises:
        ValueError: The grid that was constructed has other ends than t.
    """
    if grid.constructor is not None:
        found: list[float] = grid.constructor(func, y0, t).tolist()
        if (found[0], found[-1]) != (times[0], times[-1]):
            raise ValueError(
                f"grid_constructor returned times from {found[0]} to {found[-1]}; they must go "
                f"from t[0]={times[0]} to t[-1]={times[-1]}"
            )
        return found
    if grid.step_size is None:
        return times
    length = abs(times[-1] - times[0])
    step = math.copysign(grid.step_size, times[-1] - times[0])
    # In the precision of t, a last step that is only rounding is none.
    steps = math.ceil(length / grid.step_size - 1e-6)
    return [*(times[0] + n * step for n in range(steps)), times[-1]]


def endless(start: float, step: float) -> Iterator[tuple[float, float]]:
    """Yield the ends of steps of one length for ever."""
    t = start
    while True:
        yield t, t + step
        t += step


def walk(
    flow: Field,
    x: State,
    steps: Iterator[tuple[float, float]] | pairwise[tuple[float, float]],
    grid: Grid,
    watch: Callable[[str, float, float, State], None],
) -> Iterator[GridStep]:
    """Yield the steps between given times."""
    step = grid.stepper()
    for t, t_next in steps:
        watch("step", t, t_next, x)
        side = math.copysign(1.0, t_next - t) if grid.perturb else 0.0
        x_next, slope = step(flow, t, t_next, x, side)
        yield GridStep(flow, t, t_next, x, x_next, slope, grid.cubic)
        x = x_next
