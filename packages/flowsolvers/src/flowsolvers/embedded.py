"""One step of an embedded pair, on a state that is a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from flowsolvers.pairs import Pair

__all__ = [
    "Attempt",
    "Clock",
    "Field",
    "Interpolant",
    "State",
    "Tolerance",
    "add",
    "attempt",
    "combine",
    "initial_step",
    "largest_rms",
    "rms_of_all",
    "rms_of_each",
]

#: Tensors of any shapes, which are combined without being put together.
State: TypeAlias = list[Tensor]

#: A time or a length of time: one number for all, or `[B]`, one for each sample.
Clock: TypeAlias = float | Tensor

#: Error over tolerance to one number, or to `[B]`.
Norm: TypeAlias = Callable[[State], Tensor]


class Field(Protocol):
    """A velocity on lists of tensors."""

    def __call__(self, t: Clock, x: State, nudge: Clock = 0.0) -> State:
        """Return dx/dt, at the number next to t above or below it where nudge is ±1."""
        ...


@dataclass(frozen=True)
class Tolerance:
    """The error that a step may make in each element, atol + rtol·|x|."""

    rtol: Sequence[float | Tensor]
    atol: Sequence[float | Tensor]

    def over(self, error: State, x: State, x_next: State | None = None) -> State:
        """Divide by what is tolerated where the state goes from x to x_next."""
        found: State = []
        for i, (part, rtol, atol) in enumerate(zip(error, self.rtol, self.atol, strict=True)):
            size = x[i].abs() if x_next is None else torch.maximum(x[i].abs(), x_next[i].abs())
            found.append(part / (atol + rtol * size))
        return found


@dataclass(frozen=True, eq=False)
class Interpolant:
    """The state within a step, a polynomial in the fraction of the step that is done."""

    t: Clock
    h: Clock
    x: State
    coefficients: tuple[State, ...]

    def at(self, t: Clock) -> State:
        """Return the state at t."""
        done = self._done(t)
        total = self.coefficients[-1]
        for coefficient in self.coefficients[-2::-1]:
            total = add(coefficient, total, done)
        return add(self.x, total, done)

    def slope(self, t: float) -> State:
        """Return the derivative at t."""
        done, h = float(self._done(t)), float(self.h)
        weights = [(n + 1) * done**n / h for n in range(len(self.coefficients))]
        return combine(weights, list(self.coefficients))

    def _done(self, t: Clock) -> Clock:
        if isinstance(self.h, Tensor):
            return (t - self.t) / torch.where(self.h == 0, 1.0, self.h)
        return (t - self.t) / self.h


@dataclass(frozen=True, eq=False)
class Attempt:
    """A step that may be accepted."""

    pair: Pair
    t: Clock
    t_next: Clock
    h: Clock
    x: State
    x_next: State
    slopes: list[State]

    def error(self) -> State:
        """Return how far the companion of one order less ends from x_next."""
        found = combine(self.pair.error, self.slopes)
        return [part * _like(self.h, part) for part in found]

    def interpolant(self) -> Interpolant:
        """Return the dense output; the slopes are not needed after that."""
        powers = zip(*self.pair.dense, strict=True)
        coefficients = (combine(weights, self.slopes) for weights in powers)
        scaled = tuple([p * _like(self.h, p) for p in parts] for parts in coefficients)
        return Interpolant(self.t, self.h, self.x, scaled)


def attempt(
    field: Field,
    pair: Pair,
    t: Clock,
    t_next: Clock,
    x: State,
    slope: State,
    nudge: Clock = 0.0,
) -> Attempt:
    """Make a step from t to t_next; slope is the velocity at its start."""
    h = t_next - t
    slopes, point = [slope], x
    for c, weights in zip(pair.c[1:], pair.a[1:], strict=True):
        point = add(x, combine(weights, slopes), h)
        if c == 1.0:
            slopes.append(field(t_next, point, nudge))
        else:
            slopes.append(field(t + c * h, point))
    return Attempt(pair, t, t_next, h, x, point, slopes)


def initial_step(
    field: Field,
    t: Clock,
    x: State,
    slope: State,
    *,
    direction: Clock,
    limit: Clock,
    order: int,
    tolerance: Tolerance,
    norm: Norm,
) -> Clock:
    """Guess a length for the first step from one more evaluation.

    Source: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    size, speed = norm(tolerance.over(x, x)), norm(tolerance.over(slope, x))
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed)
    trial = trial.clamp_max(limit) if isinstance(limit, float) else torch.minimum(trial, limit)
    length: Clock = trial.to(t.dtype) if isinstance(t, Tensor) else float(trial)
    ahead = t + direction * length
    slope_ahead = field(ahead, add(x, slope, direction * length))
    change = [after - before for after, before in zip(slope_ahead, slope, strict=True)]
    bend = norm(tolerance.over(change, x)) / trial
    largest = torch.maximum(speed, bend)
    found = torch.where(
        largest <= 1e-15, (trial * 1e-3).clamp_min(1e-6), (0.01 / largest) ** (1 / order)
    )
    found = torch.minimum(100 * trial, found)
    return found.to(t.dtype) if isinstance(t, Tensor) else float(found)


def rms_of_all(parts: State) -> Tensor:
    """Return the root mean square of all elements."""
    count = sum(part.numel() for part in parts)
    total = sum((part.square().sum() for part in parts), start=parts[0].new_zeros(()))
    return (total / max(count, 1)).sqrt()


def rms_of_each(parts: State) -> Tensor:
    """Return the root mean square of each sample, `[B]`."""
    size = len(parts[0])
    count = sum(math.prod(part.shape[1:]) for part in parts)
    total = sum(
        (part.square().reshape(size, -1).sum(1) for part in parts), start=parts[0].new_zeros(size)
    )
    return (total / max(count, 1)).sqrt()


def largest_rms(parts: State) -> Tensor:
    """Return the largest of the tensors' root mean squares, so that a small tensor counts too."""
    return torch.stack([rms_of_all([part]) for part in parts]).max()


def combine(weights: Sequence[float], slopes: list[State]) -> State:
    """Return Σ_i weights[i]·slopes[i], in tensors of its own."""
    total: State | None = None
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            if total is None:
                total = list(torch._foreach_mul(slope, weight))
            else:
                torch._foreach_add_(total, slope, alpha=weight)
    return [torch.zeros_like(part) for part in slopes[0]] if total is None else total


def add(x: State, increment: State, h: Clock) -> State:
    """Return x + h·increment."""
    if isinstance(h, Tensor):
        return [part + _like(h, part) * more for part, more in zip(x, increment, strict=True)]
    return list(torch._foreach_add(x, increment, alpha=h))


def _like(h: Clock, part: Tensor) -> Clock:
    """Shape a time of each sample so that it multiplies a tensor."""
    if isinstance(h, Tensor):
        return h.to(part.dtype).view(-1, *[1] * (part.ndim - 1))
    return h
