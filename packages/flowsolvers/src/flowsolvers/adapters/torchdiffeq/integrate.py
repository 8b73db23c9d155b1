"""Integrate from each time to the next, or until an event."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowsolvers.adapters.torchdiffeq.grid import GridStep, endless, grid_times, walk
from flowsolvers.adapters.torchdiffeq.options import (
    FIXED,
    METHODS,
    Grid,
    callbacks,
    choose,
    march_of,
    tolerance_of,
)
from flowsolvers.adaptive import AdaptiveError, error_of
from flowsolvers.embedded import Attempt, State
from flowsolvers.events import Watch
from flowsolvers.flowing import Flowing
from flowsolvers.marching import StuckError, march

__all__ = ["METHODS", "combined", "odeint", "steps_of"]

#: Steps of a fixed grid after which an event is not waited for any longer.
_PATIENCE = 20_000


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """Integrate dy/dt = func(t, y) from y(t[0]) = y0, as torchdiffeq's function of that name does.

    Gradients flow back through the steps to y0, to what func closes over, and to t.

    Args:
        func: `func(t, y) -> dy/dt`, t a 0-dim tensor. Its attributes `callback_step`,
            `callback_accept_step` and `callback_reject_step`, if any, are called as
            `callback(t0, y0, dt)`.
        y0: A tensor, or a tuple or another tree of tensors.
        t: `[T]`, increasing or decreasing.
        rtol: Relative tolerance of an adaptive method; a tuple has one for each tensor.
        atol: Absolute tolerance.
        method: One of `METHODS`; `dopri5` when None. rk4 is the 3/8 rule.
        options: Of an adaptive method: norm, first_step, min_step, max_step, step_t, jump_t,
            safety, ifactor, dfactor, max_num_steps (dtype is accepted; time is float64). Of a
            method on a grid: step_size or grid_constructor, interp ("linear" or "cubic"), perturb;
            of an Adams method also max_order (2 to 12, which is the default) and max_iters.
        event_fn: Ends the solve where it changes its sign; t then has two times, the second of
            which only tells the direction.

    Returns:
        The states at t, `[T, ...]` for each tensor, in y0's dtype. With `event_fn` the time of
        the event, and the states at the start and there.

    Raises:
        ValueError: The method is not carried, or an argument is not as described.
        AdaptiveError: A step became too short, or too many were needed.
        NotFiniteError: An adaptive method met a velocity that is not finite; an AdaptiveError too.

    Example:
        >>> odeint(lambda t, y: t, torch.tensor(0.0), torch.tensor([2.0, 0.0]), method="midpoint")
        tensor([ 0., -2.])
    """
    name, settings = choose(method, options)
    times = _times(t)
    if event_fn is not None and len(times) != 2:
        raise ValueError(f"with event_fn, t must have two times, got {len(times)}")
    flow = Flowing(func, y0, per_sample=False)
    problem = _Problem(func, flow, y0, t, times, name, settings, rtol, atol)
    try:
        if event_fn is None:
            return problem.states()
        return problem.until(event_fn)
    except StuckError as stuck:
        raise error_of(stuck, flow, 0) from None


def steps_of(
    func: Any,
    flow: Flowing[Any],
    x: State,
    times: list[float],
    name: str,
    settings: Mapping[str, Any],
    rtol: Any,
    atol: Any,
) -> Iterator[Attempt]:
    """Yield an adaptive method's steps for ever; it steps over its last time, as torchdiffeq's."""
    watch = callbacks(flow, func, name)
    by = march_of(flow, name, settings, tolerance_of(flow, rtol, atol), watch)
    direction = 1.0 if times[-1] >= times[0] else -1.0
    return march(flow, x, t=times[0], end=direction * math.inf, by=by)


def combined(
    event_fn: Callable[[Tensor, Any], Tensor], flow: Flowing[Any], t: float, x: State
) -> Callable[[Tensor, Any], Tensor]:
    """Make one event of as many as there are numbers; all are positive at the start."""
    with torch.no_grad():
        signs = event_fn(flow.time(t), flow.whole(x)).sign()
    return lambda time, y: (event_fn(time, y) * signs).min()


@dataclass(eq=False)
class _Problem:
    """What is to be integrated."""

    func: Any
    flow: Flowing[Any]
    y0: Any
    t: Tensor
    times: list[float]
    name: str
    settings: Mapping[str, Any]
    rtol: Any
    atol: Any

    @property
    def sign(self) -> float:
        return 1.0 if self.times[-1] >= self.times[0] else -1.0

    def states(self) -> Any:
        found = [self.flow.x0]
        if len(self.times) > 1:
            x = self._moved_start()
            adaptive = self.name not in FIXED
            ends = self._adaptive(x) if adaptive else self._grid(x)
            found += [self._moved_end(i, *end) for i, end in enumerate(ends, start=1)]
        return self._stacked(found)

    def until(self, event_fn: Callable[[Tensor, Any], Tensor]) -> tuple[Tensor, Any]:
        flow, start = self.flow, self.times[0]
        x = self._moved_start()
        whole = combined(event_fn, flow, start, x)
        event = flow.event(whole)
        if float(event(start, x).detach()) == 0.0:
            return self.t[0].detach(), self._stacked([x, x])
        watch = Watch([event], start, x)
        steps = self._steps_without_end(x)
        for count, step in enumerate(steps):
            hit = watch.crossing(step)
            if hit is not None:
                _, time, found = hit
                return self.t.new_tensor(time), self._stacked([flow.x0, found])
            if isinstance(step, GridStep) and count >= _PATIENCE:
                raise AdaptiveError(
                    f"no event in {count} steps of step_size={self.settings['step_size']}, up to "
                    f"t={step.t_next:.6g}",
                    step.t_next,
                    flow.whole(step.x_next),
                    0,
                )
        raise AssertionError("a march without an end does not end")

    def _steps_without_end(self, x: State) -> Iterator[Attempt] | Iterator[GridStep]:
        if self.name not in FIXED:
            return self._march(x)
        grid = self._on_grid()
        if grid.step_size is None:
            raise ValueError(f"method {self.name!r} needs options['step_size'] for an event")
        ends = endless(self.times[0], self.sign * grid.step_size)
        return walk(self.flow, x, ends, grid, callbacks(self.flow, self.func, self.name))

    def _march(self, x: State) -> Iterator[Attempt]:
        return steps_of(
            self.func, self.flow, x, self.times, self.name, self.settings, self.rtol, self.atol
        )

    def _adaptive(self, x: State) -> Iterator[tuple[State, State]]:
        steps, step = self._march(x), None
        most = int(self.settings.get("max_num_steps", 2**31 - 1))
        for time in self.times[1:]:
            count = 0
            while step is None or self.sign * float(step.t_next) < self.sign * time:
                if count >= most:
                    at = self.times[0] if step is None else float(step.t_next)
                    raise StuckError(
                        f"max_num_steps={most} steps do not suffice: the solve is at t={at:.6g}; "
                        f"allow more, or loosen rtol and atol",
                        at,
                        x if step is None else step.x_next,
                    )
                step, count = next(steps), count + 1
            within = step.interpolant()
            yield within.at(time), within.slope(time) if self.t.requires_grad else []

    def _grid(self, x: State) -> Iterator[tuple[State, State]]:
        grid, flow = self._on_grid(), self.flow
        ends = grid_times(grid, self.func, self.y0, self.t, self.times)
        pending = self.times[1:]
        for step in walk(flow, x, pairwise(ends), grid, callbacks(flow, self.func, self.name)):
            while pending and self.sign * pending[0] <= self.sign * step.t_next:
                time = pending.pop(0)
                if time == step.t_next:
                    state = step.x_next
                    yield state, flow(time, state) if self.t.requires_grad else []
                else:
                    within = step.interpolant()
                    yield within.at(time), within.slope(time) if self.t.requires_grad else []

    def _on_grid(self) -> Grid:
        return Grid.of(self.name, self.settings, tolerance_of(self.flow, self.rtol, self.atol))

    def _moved_start(self) -> State:
        """Let the start depend on t[0]: starting later is starting from where one was before."""
        x0 = self.flow.x0
        if not self.t.requires_grad or len(self.times) < 2:
            return x0
        return self._move(x0, self.flow(self.times[0], x0), 0, -1.0)

    def _moved_end(self, index: int, x: State, slope: State) -> State:
        return self._move(x, slope, index, 1.0) if slope else x

    def _move(self, x: State, slope: State, index: int, sign: float) -> State:
        """Add nothing that has the gradient sign·slope in t[index]."""
        nothing = sign * (self.t[index] - self.t[index].detach()).to(self.flow.dtype)
        return [part + nothing * v.detach() for part, v in zip(x, slope, strict=True)]

    def _stacked(self, states: list[State]) -> Any:
        stacks = [torch.stack(parts) for parts in zip(*states, strict=True)]
        return self.flow.whole(
            [stack.to(dtype) for stack, dtype in zip(stacks, self.flow.dtypes, strict=True)]
        )


def _times(t: Tensor) -> list[float]:
    if not (isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 1 and len(t)):
        raise ValueError(
            f"t must be a floating point tensor of one dimension, got {getattr(t, 'dtype', t)} "
            f"of shape {tuple(getattr(t, 'shape', ()))}"
        )
    times: list[float] = t.detach().tolist()
    rises = [b > a for a, b in pairwise(times)]
    if any(a == b for a, b in pairwise(times)) or (any(rises) and not all(rises)):
        raise ValueError(f"t must be strictly increasing or decreasing, got {times}")
    return times
