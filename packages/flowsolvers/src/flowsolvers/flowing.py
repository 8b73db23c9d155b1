"""A velocity on the list of a state's tensors, at times that are numbers of the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from flowsolvers.context import evaluate
from flowsolvers.embedded import Clock
from flowsolvers.embedded import State as Parts
from flowsolvers.events import Event
from flowsolvers.states import State, each, flatten, unflatten
from flowsolvers.whereabouts import Whereabouts

__all__ = ["Flow", "Flowing"]

#: Of a tensor or a tree: velocity(t, x) -> dx/dt.
Flow: TypeAlias = Callable[[Tensor, State], State]


class Flowing(Generic[State]):
    """A velocity on the state's tensors, in the state's dtype.

    With `where`, a velocity that takes the context of an evaluation is given it.
    """

    def __init__(
        self,
        velocity: Flow[State],
        x0: State,
        per_sample: bool,
        where: Whereabouts | None = None,
    ) -> None:
        leaves, self._spec = flatten(x0)
        parts = each(leaves)
        if not all(part.is_floating_point() for part in parts):
            raise ValueError(
                f"x0 must be floating point, got {[str(part.dtype) for part in parts]}; convert "
                f"it with x0.float()"
            )
        if per_sample and len({part.shape[:1] for part in parts} | {parts[0].shape[:1]}) > 1:
            raise ValueError(
                f"per_sample=True needs one first dimension in all tensors of x0, got shapes "
                f"{[tuple(part.shape) for part in parts]}"
            )
        if per_sample and not parts[0].ndim:
            raise ValueError("per_sample=True needs a batch as x0's first dimension, got 0-dim")
        self._velocity: Any = velocity
        self._where = where
        self.dtypes = [part.dtype for part in parts]
        self._shapes = [part.shape for part in parts]
        double = torch.float64 in self.dtypes
        self.dtype = torch.float64 if double else torch.float32
        self.device = parts[0].device
        self.x0: Parts = [part.to(self.dtype) for part in parts]

    def whole(self, parts: Parts) -> Any:
        """Put the tensors together as in x0."""
        return parts[0] if self._spec is None else unflatten(parts, self._spec)

    def time(self, t: Clock) -> Tensor:
        """Write a time as the model gets it; nothing waits for the device."""
        if isinstance(t, Tensor):
            return t.to(self.dtype)
        return torch.full((), t, dtype=self.dtype, device=self.device)

    def event(self, event: Callable[[Tensor, State], Tensor]) -> Event:
        """Let an event take lists of tensors."""
        return lambda t, x: event(self.time(t), self.whole(x))

    def __call__(self, t: Clock, x: Parts, nudge: Clock = 0.0) -> Parts:
        """Return dx/dt."""
        seen = [p.to(dtype) for p, dtype in zip(x, self.dtypes, strict=True)]
        time = self._beside(t, nudge)
        context = None
        if self._where is not None and not isinstance(time, Tensor):
            context = self._where.context(time)
        v = evaluate(self._velocity, self.time(time), self.whole(seen), context)
        leaves, spec = flatten(v)
        parts = list(each(leaves))
        self._check(parts, spec)
        return [part.to(self.dtype) for part in parts]

    def _beside(self, t: Clock, nudge: Clock) -> Clock:
        """Return the time, or the number next to it in the state's dtype; a float on the host."""
        if isinstance(nudge, Tensor):
            near = self.time(t)
            away = torch.nextafter(near, nudge.to(near.dtype) * math.inf)
            return torch.where(nudge == 0, near, away)
        if nudge == 0.0:
            return t
        near = torch.tensor(t, dtype=self.dtype)  # on the host
        return torch.nextafter(near, torch.full_like(near, nudge * math.inf)).item()

    def _check(self, parts: Parts, spec: TreeSpec | None) -> None:
        if spec != self._spec or [part.shape for part in parts] != self._shapes:
            raise ValueError(
                f"velocity returned shapes {[tuple(part.shape) for part in parts]} for x of "
                f"shapes {[tuple(shape) for shape in self._shapes]}; it must return dx/dt, built "
                f"and shaped like x"
            )
