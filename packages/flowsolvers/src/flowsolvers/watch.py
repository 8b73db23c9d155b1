"""What may be asked of a solve on its way: callbacks, states, errors, and where it went wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from flowsolvers.paths import Linear, Path
from flowsolvers.plan import Plan
from flowsolvers.program import End, Point
from flowsolvers.states import Leaves, State, cast, each, flatten, unflatten

__all__ = ["NotFiniteError", "Observer", "Reached", "finite"]


class NotFiniteError(FloatingPointError):
    """The state became NaN or infinite.

    Args:
        message: What happened, where, and what to do.
        x: The last state that was finite.
        t: Its time; `solve(velocity, error.x, start=error.t, ...)` goes on from there. `[B]` of an
            adaptive solve with a step for each sample.
        step: Index of the step that failed; None where it is not known.
        evaluation: Index of the first evaluation that was not finite; None if all were.
    """

    def __init__(
        self,
        message: str,
        x: object,
        t: float | Tensor,
        step: int | None,
        evaluation: int | None,
    ) -> None:
        super().__init__(message)
        self.x, self.t, self.step, self.evaluation = x, t, step, evaluation


@dataclass(eq=False)
class Reached(Generic[State]):
    """A step's end, as `on_step` sees it.

    Args:
        x: The state there; assign another to go on from that.
        t: The time there, 0 = noise and 1 = data.
        step: Index of the step that ends, from 0.
        steps: Number of steps.
        evaluations: Velocity evaluations made so far.
        stopped: Whether `stop` was called.
    """

    x: State
    t: float
    step: int
    steps: int
    evaluations: int
    stopped: bool = False
    _latest: Callable[[Path], State] | None = field(default=None, repr=False)

    def stop(self) -> None:
        """End the solve here; its solution is the state as it is now."""
        self.stopped = True

    def data(self, path: Path | None = None) -> State:
        """Predict the data from the latest evaluation: a preview for nothing.

        Args:
            path: Of the flow; None is the straight one, whose prediction is x + (1 - t)·v.

        Returns:
            Shaped like x.

        Raises:
            ValueError: There is none: no evaluation was made yet, or the plan keeps neither
                velocities nor predictions of the data.
        """
        if self._latest is None:
            raise ValueError("no evaluation has been made yet, so there is no prediction")
        return self._latest(path or Linear())


def finite(x: Leaves) -> bool:
    """Look whether all numbers of a state are finite; off the CPU this waits for the device.

    Where nobody may look (under vmap, without data), it says True.
    """
    try:
        return all(map(_finite, each(x)))
    except RuntimeError:
        return True


def _finite(leaf: Tensor) -> bool:
    if leaf.requires_grad:
        leaf = leaf.detach()
    if leaf.device.type == "cpu":
        # One pass: what is not finite makes the sum so, and a sum may besides be too large.
        try:
            if math.isfinite(leaf.sum().numpy()):  # the same memory
                return True
        except (RuntimeError, TypeError):  # numpy is not installed, or this is no plain tensor
            pass
    return bool(leaf.isfinite().all())


class Observer:
    """Watches one solve.

    Args:
        plan: What is carried out.
        spec: Of the state's tree.
        x: The state at the start.
        on_step: Called at each step's end.
        states: Whether to keep the state at each step's end.
        estimate: Whether to compare steps' ends with what they were predicted to be.
        look: Whether to look for numbers that are not finite at steps' ends.
        unless_quicker: Than this many seconds was the step, which a look would make slower.
    """

    def __init__(
        self,
        plan: Plan,
        spec: TreeSpec | None,
        x: Leaves,
        *,
        on_step: Callable[[Reached[Any]], object] | None = None,
        states: bool = False,
        estimate: bool = False,
        look: bool = False,
        unless_quicker: float = 0.0,
    ) -> None:
        self._plan, self._spec, self._on_step, self._look = plan, spec, on_step, look
        self._quick, self._begun = unless_quicker, time.perf_counter()
        self.states: list[Leaves] | None = [x] if states else None
        self.errors: list[Tensor] | None = [] if estimate else None
        self.evaluations = 0
        self.t = plan.steps[0].t
        self.stopped = False
        self._x = x
        self._latest: tuple[Point, Leaves, Leaves] | None = None
        self._kept: list[Leaves] = []  # of this step, to tell which evaluation went wrong

    def evaluated(self, point: Point, at: Leaves, kept: Leaves) -> None:
        """See an evaluation at a point."""
        self.evaluations += 1
        if self._look:
            self._kept.append(kept)
        if self._on_step is not None or self.errors is not None:
            self._latest = point, at, kept

    def reached(self, end: End, x: Leaves) -> Leaves:
        """See the state at a step's end; give it back, or another in its place."""
        step = end.step
        if self._look:
            now = time.perf_counter()
            if now - self._begun >= self._quick and not finite(x):
                raise self._failure(end)
            self._kept.clear()
            self._begun = now
        if self.errors is not None:
            self.errors.append(self._estimate(end, x))
        if self._on_step is not None:
            x = self._call(self._on_step, end, x)
        if self.states is not None:
            self.states.append(x)
        self._x, self.t = x, step.t_next
        return x

    def _failure(self, end: End) -> NotFiniteError:
        plan, step = self._plan, end.step
        first = self.evaluations - len(self._kept)
        bad = [first + i for i, kept in enumerate(self._kept) if not finite(kept)]
        where = "its evaluations were finite, but their sum is not"
        if bad:
            t = [row.t for step in plan.steps for row in step.rows][bad[0]]
            where = f"the first was evaluation {bad[0]} of {plan.nfe}, at t={t:.6g}"
        return NotFiniteError(
            f"the state is NaN or infinite after step {end.number} of {len(plan.steps)}, from "
            f"t={step.t:.6g} to {step.t_next:.6g}; {where}. Look at what the model returns there; "
            f"the last finite state is in this error's x",
            unflatten(self._x, self._spec),
            step.t,
            end.number,
            bad[0] if bad else None,
        )

    def _estimate(self, end: End, x: Leaves) -> Tensor:
        """Root mean square of the step's end less its prediction, NaN if it has none."""
        first, count = each(x)[0], sum(leaf.numel() for leaf in each(x))
        if not end.step.rows or end.step.rows[-1].t != end.step.t_next or self._latest is None:
            return torch.full((), math.nan, dtype=first.dtype, device=first.device)
        _, at, _ = self._latest
        squares = [(a - b).square().sum() for a, b in zip(each(x), each(at), strict=True)]
        return (torch.stack(squares).sum() / count).sqrt()

    def _call(self, on_step: Callable[[Reached[Any]], object], end: End, x: Leaves) -> Leaves:
        state = unflatten(x, self._spec)
        event = Reached(
            state,
            end.step.t_next,
            end.number,
            len(self._plan.steps),
            self.evaluations,
            _latest=None if self._latest is None else self._data,
        )
        on_step(event)
        self.stopped = event.stopped
        if event.x is state:
            return x
        leaves, spec = flatten(event.x)
        old, new = each(x), each(leaves)
        if spec != self._spec or [leaf.shape for leaf in old] != [leaf.shape for leaf in new]:
            raise ValueError(
                f"on_step replaced the state after step {end.number} by one of shapes "
                f"{[tuple(leaf.shape) for leaf in new]}; it must be like x, "
                f"{[tuple(leaf.shape) for leaf in old]}"
            )
        return cast(leaves, old[0].dtype)

    def _data(self, path: Path) -> Any:
        assert self._latest is not None
        point, at, kept = self._latest
        t, sigma = point.row.t, 1.0 - point.row.t
        straight = isinstance(path, Linear)
        points, values = each(at), each(kept)
        if point.keep == (1.0, sigma) and straight:
            found = [value.clone() for value in values]
        elif point.keep is None or (point.keep == (1.0, sigma) and sigma):
            if point.keep is not None:
                values = [(d - x) / sigma for d, x in zip(values, points, strict=True)]
            pairs = zip(values, points, strict=True)
            found = [path.convert(v, t, x, "velocity", "data") for v, x in pairs]
        else:
            raise ValueError("this plan keeps neither velocities nor predictions of the data")
        return unflatten(found[0] if isinstance(at, Tensor) else found, self._spec)
