"""Find where a function of time and state changes its sign within a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from flowsolvers.embedded import Attempt, Clock, Interpolant, State
from flowsolvers.marching import EachStep

__all__ = ["Event", "Passed", "Watch", "WatchEach"]

#: `event(t, x)` to one number, or to `[B]` where each sample has its own time.
Event = Callable[[float | Tensor, State], Tensor]


class Passed(Protocol):
    """A step with one time for all."""

    @property
    def t(self) -> Clock:
        """Its start."""
        ...

    @property
    def t_next(self) -> Clock:
        """Its end."""
        ...

    @property
    def x_next(self) -> State:
        """The state at its end."""
        ...

    def interpolant(self) -> Interpolant:
        """Return the state between."""
        ...


class Watch:
    """Follow the signs of events along one march."""

    def __init__(self, events: Sequence[Event], t: float, x: State) -> None:
        self._events = events
        self._signs = [_sign(event(t, x)) for event in events]

    def crossing(self, step: Passed) -> tuple[int, float, State] | None:
        """Return which event comes first in a step, its time and the state; None for none."""
        found: list[tuple[float, int]] = []
        interpolant: Interpolant | None = None
        start, end = cast("float", step.t), cast("float", step.t_next)
        for i, event in enumerate(self._events):
            before = self._signs[i]
            self._signs[i] = _sign(event(end, step.x_next))
            if before and self._signs[i] != before:
                interpolant = interpolant or step.interpolant()
                found.append((_locate(event, before, start, end, interpolant), i))
        if interpolant is None:
            return None
        t, i = min(found, key=lambda hit: abs(hit[0] - start))
        return i, t, step.x_next if t == end else interpolant.at(t)


@torch.no_grad()
def _locate(event: Event, before: float, t: float, t_next: float, within: Interpolant) -> float:
    """Halve until the event lies between neighbouring numbers; return the later one."""
    near, far = t, t_next
    while abs(far - near) > 2 * sys.float_info.epsilon * max(abs(far), abs(near)):
        middle = (near + far) / 2
        if _sign(event(middle, within.at(middle))) == before:
            near = middle
        else:
            far = middle
    return far


def _sign(value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(
            f"an event must return one number, got shape {tuple(value.shape)}; with "
            f"per_sample=True it returns one for each sample"
        )
    return float(value.detach().sign())


class WatchEach:
    """Follow the signs of events along a march of each sample."""

    def __init__(self, events: Sequence[Event], t: Tensor, x: State) -> None:
        self._events = events
        self._signs = [self._sign(event, t, x) for event in events]
        #: Of each sample the event that stopped it, or -1, its time and its state.
        self.event = torch.full_like(t, -1, dtype=torch.long)
        self.t, self.x = t, x

    def __call__(self, step: EachStep) -> Tensor | None:
        """Note who was stopped in this step; return them, `[B]`."""
        stopped: Tensor | None = None
        for i, event in enumerate(self._events):
            before = self._signs[i]
            after = self._sign(event, step.t, step.x)
            self._signs[i] = torch.where(step.moved, after, before)
            hit = step.moved & (before != 0) & (after != before)
            if not bool(hit.any()):
                continue
            t, x = _locate_each(event, before, step.attempt)
            if stopped is not None:  # an earlier event in the same step goes first
                sooner = (t - step.attempt.t).abs() < (self.t - step.attempt.t).abs()
                hit = hit & (~stopped | sooner)
            self.event = torch.where(hit, i, self.event)
            self.t = torch.where(hit, t, self.t)
            self.x = [
                torch.where(hit.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(x, self.x, strict=True)
            ]
            stopped = hit if stopped is None else stopped | hit
        return stopped

    @staticmethod
    def _sign(event: Event, t: Tensor, x: State) -> Tensor:
        value = event(t, x)
        if value.shape != t.shape:
            raise ValueError(
                f"an event must return one number for each sample, shape {tuple(t.shape)}, got "
                f"{tuple(value.shape)}"
            )
        return value.detach().sign()


def _locate_each(event: Event, before: Tensor, step: Attempt) -> tuple[Tensor, State]:
    near, far = cast("Tensor", step.t), cast("Tensor", step.t_next)
    within = step.interpolant()
    with torch.no_grad():
        for _ in range(53 if near.dtype == torch.float64 else 24):
            middle = (near + far) / 2
            same = event(middle, within.at(middle)).sign() == before
            near, far = torch.where(same, middle, near), torch.where(same, far, middle)
    return far, within.at(far)
