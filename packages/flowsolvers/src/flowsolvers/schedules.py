"""Time grids as values that compose.

A schedule warps [0, 1] onto itself: u, the fraction of the steps done, to t, the flow's time
(0 = noise, 1 = data). Where it is flat, the steps are short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from flowsolvers.spelling import closest_first

__all__ = ["Schedule", "cosine", "schedule", "shift", "sigmoid", "uniform"]


@dataclass(frozen=True)
class Schedule:
    """A named, increasing map of [0, 1] onto [0, 1].

    Args:
        name: How it prints; `schedule(name)` gives the built-in ones back.
        warp: u in [0, 1] to t in [0, 1], strictly increasing, with warp(0) = 0, warp(1) = 1.

    Convention: `(a @ b)(u) = a(b(u))`, as for functions; the right one sees u first.

    Example:
        >>> print(shift(4.0) @ cosine())
        shift:4@cosine
        >>> Schedule("square", lambda u: u * u).grid(2)
        (0.0, 0.25, 1.0)
    """

    name: str
    warp: Callable[[float], float]

    def __call__(self, u: float) -> float:
        """Map u in [0, 1] to t in [0, 1]; ValueError outside."""
        if not 0.0 <= u <= 1.0:
            raise ValueError(f"u must be in [0, 1], got {u!r}")
        return self.warp(u)

    def __matmul__(self, inner: Schedule) -> Schedule:
        """Compose: `(a @ b)(u) = a(b(u))`."""
        if not isinstance(inner, Schedule):
            return NotImplemented
        return Schedule(f"{self}@{inner}", _Chain((*_warps(self), *_warps(inner))))

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def grid(self, steps: int) -> tuple[float, ...]:
        """Lay out the times of a number of steps.

        Args:
            steps: At least 1.

        Returns:
            `steps + 1` strictly increasing times, the first exactly 0 and the last exactly 1.

        Raises:
            ValueError: `steps` is less than 1, an end is off by more than 1e-9, or two
                neighbours do not increase.

        Example:
            >>> shift(4.0).grid(2)
            (0.0, 0.2, 1.0)
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        ends = self(0.0), self(1.0)
        if not (abs(ends[0]) <= 1e-9 and abs(ends[1] - 1.0) <= 1e-9):
            raise ValueError(
                f"schedule {self} runs from {ends[0]!r} to {ends[1]!r}; it must run from 0 to 1, "
                f"so rescale it: (warp(u) - warp(0)) / (warp(1) - warp(0))"
            )
        times = (0.0, *(self(i / steps) for i in range(1, steps)), 1.0)
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

    warps: tuple[Callable[[float], float], ...]

    def __call__(self, u: float) -> float:
        for warp in reversed(self.warps):
            u = warp(u)
        return u


def _warps(one: Schedule) -> tuple[Callable[[float], float], ...]:
    return one.warp.warps if isinstance(one.warp, _Chain) else (one.warp,)


def _identity(u: float) -> float:
    return u


def _sine_squared(u: float) -> float:
    return math.sin(0.5 * math.pi * u) ** 2


@dataclass(frozen=True)
class _Rational:
    sigma: float

    def __call__(self, u: float) -> float:
        return u / (u + self.sigma * (1.0 - u))  # written so that u = 1 gives exactly 1


@dataclass(frozen=True)
class _TwoSlopeLogistic:
    mu: float
    alpha: float
    beta: float

    def logistic(self, u: float) -> float:
        slope = self.alpha if u < self.mu else self.beta
        return 0.5 * (1.0 + math.tanh(0.5 * slope * (u - self.mu)))  # cannot overflow

    def __call__(self, u: float) -> float:
        low, high = self.logistic(0.0), self.logistic(1.0)
        return (self.logistic(u) - low) / (high - low)


def uniform() -> Schedule:
    """Return the grid of equal steps, t = u.

    Returns:
        The schedule `uniform`.

    Example:
        >>> uniform().grid(4)
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    return Schedule("uniform", _identity)


def shift(sigma: float) -> Schedule:
    """Shift the steps towards noise, t = u / (s + u - s·u) with s = sigma.

    Args:
        sigma: The factor, greater than 0; 1 is uniform, above 1 the steps near noise are
            short, below 1 those near data. The Lumina-Next demo uses 4.

    Returns:
        The schedule `shift:SIGMA`.

    Raises:
        ValueError: `sigma` is not a finite number greater than 0.

    Convention: the slope dt/du is 1/sigma at noise (t=0) and sigma at data (t=1). It equals the
        shift of SD3 written in noise time 1 - t. `shift(a) @ shift(b)` maps as shift(a·b).

    Source: Lumina-Next, arXiv 2406.18583, rational schedule. The paper prints
        t / (s - t + s·t), which does not end at 1; this is what the released code computes.

    Example:
        >>> shift(4.0)(0.5)
        0.2
    """
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"sigma of shift must be finite and greater than 0, got {sigma!r}")
    return Schedule(f"shift:{_text(sigma)}", _Rational(float(sigma)))


def sigmoid(mu: float = 0.6, alpha: float = 6.0, beta: float = 20.0) -> Schedule:
    """Shorten the steps at both ends with a logistic curve of two slopes.

    With s(z) = 1 / (1 + e^-z) the curve is f(u) = s(alpha·(u - mu)) for u < mu and
    s(beta·(u - mu)) from mu on; t = (f(u) - f(0)) / (f(1) - f(0)).

    Args:
        mu: Where the slope changes and the steps are longest, in [0, 1].
        alpha: Slope below mu, greater than 0.
        beta: Slope above mu, greater than 0.

    Returns:
        The schedule `sigmoid:MU,ALPHA,BETA`.

    Raises:
        ValueError: `mu` is outside [0, 1], or a slope is not finite and greater than 0, or
            too small to tell from 0.

    Source: Lumina-Next, arXiv 2406.18583, sigmoid schedule. The paper's curve runs from
        f(0) = .0266 to f(1) = .99966; here it is rescaled to run from 0 to 1.

    Example:
        >>> [round(t, 4) for t in sigmoid().grid(4)]
        [0.0, 0.0848, 0.3368, 0.9516, 1.0]
    """
    if not 0.0 <= mu <= 1.0:
        raise ValueError(f"mu of sigmoid must be in [0, 1], got {mu!r}")
    for slope, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{slope} of sigmoid must be finite and greater than 0, got {value!r}")
    name = f"sigmoid:{_text(mu)},{_text(alpha)},{_text(beta)}"
    warp = _TwoSlopeLogistic(float(mu), float(alpha), float(beta))
    if not warp.logistic(0.0) < warp.logistic(1.0):
        raise ValueError(f"{name} is flat in floating point; take larger slopes, or uniform()")
    return Schedule(name, warp)


def cosine() -> Schedule:
    """Shorten the steps at both ends alike, t = sin²(πu / 2).

    Returns:
        The schedule `cosine`.

    Example:
        >>> round(cosine()(1 / 3), 12)
        0.25
    """
    return Schedule("cosine", _sine_squared)


#: name -> (how it is written, least and most numbers, what makes it)
_FORMS: dict[str, tuple[str, int, int, Callable[..., Schedule]]] = {
    "cosine": ("cosine", 0, 0, cosine),
    "shift": ("shift:SIGMA", 1, 1, shift),
    "sigmoid": ("sigmoid:MU,ALPHA,BETA", 0, 3, sigmoid),
    "uniform": ("uniform", 0, 0, uniform),
}


def schedule(name: str) -> Schedule:
    """Parse the name that a schedule prints.

    Args:
        name: `uniform`, `cosine`, `shift:SIGMA`, `sigmoid:MU,ALPHA,BETA` (numbers that are left
            out take their defaults), or several of these joined with `@`.

    Returns:
        The schedule, equal to the one that printed the name.

    Raises:
        ValueError: The name is unknown, or its numbers are too few, too many or out of range.

    Example:
        >>> schedule("shift:4@cosine") == shift(4.0) @ cosine()
        True
    """
    outer, *inner = (_parse(part.strip()) for part in name.split("@"))
    for one in inner:
        outer = outer @ one
    return outer


def _parse(text: str) -> Schedule:
    head, colon, tail = text.partition(":")
    forms = ", ".join(_FORMS[form][0] for form in closest_first(head, _FORMS))
    if head not in _FORMS:
        raise ValueError(f"unknown schedule {text!r}; accepted, closest first: {forms}")
    form, least, most, make = _FORMS[head]
    try:
        numbers = [float(number) for number in tail.split(",")] if colon else []
    except ValueError:
        numbers = None
    if numbers is None or not least <= len(numbers) <= most:
        raise ValueError(f"schedule {text!r} is not of the form {form}; accepted: {forms}")
    try:
        return make(*numbers)
    except ValueError as error:
        raise ValueError(f"schedule {text!r}: {error}; accepted: {forms}") from error


def _text(value: float) -> str:
    """Write a number as briefly as it can be read back exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))
