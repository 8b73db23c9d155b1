"""Schedule: a time grid as a value that composes, inverts and has a slope.

A schedule warps [0, 1] onto itself: u, the fraction of the steps done, to t, the flow's time
(0 = noise, 1 = data). Where it is flat, the steps are short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias, runtime_checkable

__all__ = ["Schedule", "number"]

#: u in [0, 1] to t in [0, 1], increasing.
Warp: TypeAlias = Callable[[float], float]


@runtime_checkable
class _Invertible(Protocol):
    """A warp that knows u from t."""

    def inverse(self, t: float) -> float: ...


@runtime_checkable
class _Smooth(Protocol):
    """A warp that knows dt/du."""

    def slope(self, u: float) -> float: ...


@runtime_checkable
class _Settling(Protocol):
    """A warp that depends on the number of steps, through the start of the last one."""

    def settle(self, last: float) -> Warp: ...


@dataclass(frozen=True)
class Schedule:
    """A named, increasing map of [0, 1] onto [0, 1].

    Args:
        name: How it prints; `schedule(name)` gives the built-in ones back.
        warp: u in [0, 1] to t in [0, 1], strictly increasing, with warp(0) = 0, warp(1) = 1. Its
            methods `inverse(t)` and `slope(u)`, if it has them, are what `inverse` and `density`
            compute.

    Convention: `(a @ b)(u) = a(b(u))`, as for functions; the right one sees u first.

    Example:
        >>> from flowsolvers import cosine, shift
        >>> print(shift(4.0) @ cosine())
        shift:4@cosine
        >>> Schedule("square", lambda u: u * u).grid(2)
        (0.0, 0.25, 1.0)
    """

    name: str
    warp: Warp

    def __call__(self, u: float) -> float:
        """Map u in [0, 1] to t in [0, 1]; ValueError outside."""
        if not 0.0 <= u <= 1.0:
            raise ValueError(f"u must be in [0, 1], got {u!r}")
        return self.warp(u)

    def __matmul__(self, inner: Schedule) -> Schedule:
        """Compose: `(a @ b)(u) = a(b(u))`."""
        if not isinstance(inner, Schedule):
            return NotImplemented
        return Schedule(f"{self}@{inner}", _chained((*_links(self.warp), *_links(inner.warp))))

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def inverse(self) -> Schedule:
        """Return the schedule that maps t back to u.

        Returns:
            A schedule that prints `NAME^-1`; `a.inverse().inverse() == a`. Built-in schedules
            are inverted by their formula, except `times`; others by bisection.

        Raises:
            ValueError: When called, the warp depends on the number of steps (`terminal`).

        Example:
            >>> from flowsolvers import shift
            >>> print(shift(4.0).inverse())
            shift:4^-1
            >>> shift(4.0).inverse()(0.2)
            0.5
        """
        links, names = _links(self.warp), self.name.split("@")
        if len(names) != len(links):  # a name of somebody's own
            names, links = [self.name], (self.warp,)
        pairs = [_inverted(*pair) for pair in zip(names, links, strict=True)][::-1]
        name = "@".join(name for name, _ in pairs)
        return Schedule(name, _chained(tuple(warp for _, warp in pairs)))

    def density(self, u: float) -> float:
        """Differentiate the warp: dt/du, the step's length relative to a uniform grid's.

        Args:
            u: In [0, 1].

        Returns:
            The slope, at least 0, and at an end of some schedules 0 or infinite; of the formula for
            built-in schedules, of a central difference for others (one-sided at the ends).

        Raises:
            ValueError: u is outside [0, 1], or the warp depends on the number of steps.

        Example:
            >>> from flowsolvers import shift
            >>> shift(4.0).density(0.0), shift(4.0).density(1.0)
            (0.25, 4.0)
        """
        if not 0.0 <= u <= 1.0:
            raise ValueError(f"u must be in [0, 1], got {u!r}")
        return _slope(self.warp, u)

    def grid(self, steps: int, start: float = 0.0, end: float = 1.0) -> tuple[float, ...]:
        """Lay out the times of a number of steps, all equal in u.

        Args:
            steps: At least 1.
            start: Time to start from, in [0, 1]; above 0 the steps share the part of the curve
                from there on, so that they are as long at each noise level as they were.
            end: Time to end at, in [0, 1]; before start, for the way back to noise.

        Returns:
            `steps + 1` times that strictly increase, or decrease, the first and the last exactly
            what was asked for.

        Raises:
            ValueError: `steps` is less than 1, start and end are one or outside [0, 1], an end is
                off by more than 1e-9, two neighbours do not increase, or a part is asked of a
                schedule that depends on the number of steps (`terminal`).

        Example:
            >>> from flowsolvers import shift
            >>> shift(4.0).grid(2)
            (0.0, 0.2, 1.0)
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        warp = _settled(self.warp, steps)
        ends = warp(0.0), warp(1.0)
        if not (abs(ends[0]) <= 1e-9 and abs(ends[1] - 1.0) <= 1e-9):
            raise ValueError(
                f"schedule {self} runs from {ends[0]!r} to {ends[1]!r}; it must run from 0 to 1, "
                f"so rescale it: (warp(u) - warp(0)) / (warp(1) - warp(0))"
            )
        if start > end:
            return self.grid(steps, end, start)[::-1]
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(
                f"start and end must be two times in [0, 1], got start={start!r} and end={end!r}"
            )
        low, high = 0.0, 1.0
        if (start, end) != (0.0, 1.0):
            inverse = self.inverse()
            low, high = inverse(start), inverse(end)
        inner = (warp(low + (high - low) * i / steps) for i in range(1, steps))
        times = (start, *inner, end)
        for i, (t, t_next) in enumerate(pairwise(times)):
            if not t < t_next:
                raise ValueError(
                    f"schedule {self} must increase strictly, but times {i} and {i + 1} of "
                    f"{steps} steps are {t!r} and {t_next!r}; take fewer steps or a milder warp"
                )
        return times


@dataclass(frozen=True)
class _Chain:
    """Warps, the outermost first; flat, so that `@` is associative."""

    warps: tuple[Warp, ...]

    def __call__(self, u: float) -> float:
        for warp in reversed(self.warps):
            u = warp(u)
        return u

    def slope(self, u: float) -> float:
        total = 1.0
        for warp in reversed(self.warps):
            total *= _slope(warp, u)
            u = warp(u)
        return total


@dataclass(frozen=True)
class _Inverse:
    """A warp read from t to u."""

    warp: Warp

    def __call__(self, t: float) -> float:
        if t in (0.0, 1.0):
            return t
        if isinstance(self.warp, _Invertible):
            return min(max(self.warp.inverse(t), 0.0), 1.0)
        low, high = 0.0, 1.0
        for _ in range(100):  # a float has 53 bits; more are spent near 0
            middle = 0.5 * (low + high)
            if not low < middle < high:
                break
            low, high = (middle, high) if self.warp(middle) < t else (low, middle)
        return high

    def inverse(self, u: float) -> float:
        return self.warp(u)

    def slope(self, t: float) -> float:
        slope = _slope(self.warp, self(t))
        return 1.0 / slope if slope else float("inf")


def _links(warp: Warp) -> tuple[Warp, ...]:
    return warp.warps if isinstance(warp, _Chain) else (warp,)


def _chained(warps: tuple[Warp, ...]) -> Warp:
    return warps[0] if len(warps) == 1 else _Chain(warps)


def _inverted(name: str, warp: Warp) -> tuple[str, Warp]:
    if isinstance(warp, _Inverse):
        return name.removesuffix("^-1"), warp.warp
    return f"{name}^-1", _Inverse(warp)


def _slope(warp: Warp, u: float) -> float:
    if isinstance(warp, _Smooth):
        return warp.slope(u)
    low, high = max(u - 1e-5, 0.0), min(u + 1e-5, 1.0)
    return (warp(high) - warp(low)) / (high - low)


def _settled(warp: Warp, steps: int) -> Warp:
    settled: list[Warp] = []
    last = (steps - 1) / steps
    for link in reversed(_links(warp)):
        settled.append(link.settle(last) if isinstance(link, _Settling) else link)
        last = settled[-1](last)
    return _chained(tuple(reversed(settled)))


def number(value: float) -> str:
    """Write a number as briefly as it can be read back exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))
