"""Solve to a tolerance: the steps are as short as an estimate of their error demands."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, cast

import torch
from torch import Tensor

from flowsolvers.context import jumps as jumps_of
from flowsolvers.context import model_rows
from flowsolvers.control import Controller
from flowsolvers.embedded import Attempt, Interpolant, Tolerance, rms_of_all, rms_of_each
from flowsolvers.embedded import State as Parts
from flowsolvers.events import Event, Watch, WatchEach
from flowsolvers.flowing import Flow, Flowing
from flowsolvers.marching import EachStep, March, StuckError, march, march_each
from flowsolvers.pairs import Pair, embedded_pair
from flowsolvers.states import State
from flowsolvers.watch import NotFiniteError
from flowsolvers.whereabouts import Whereabouts

__all__ = [
    "AdaptiveError",
    "AdaptiveNotFiniteError",
    "AdaptiveSolution",
    "error_of",
    "solve_adaptive",
]


class AdaptiveError(RuntimeError):
    """An adaptive solve that could not go on.

    Args:
        message: What happened, at which time, and what to do.
        t: Time of the last good state; `[B]` with a step for each sample.
        x: The last good state, shaped like x0.
        nfe: Velocity evaluations made.
    """

    def __init__(self, message: str, t: float | Tensor, x: Any, nfe: int) -> None:
        super().__init__(message)
        self.t, self.x, self.nfe = t, x, nfe


class AdaptiveNotFiniteError(AdaptiveError, NotFiniteError):
    """An adaptive solve that met a velocity that is not finite.

    Whoever catches `NotFiniteError` of `solve` catches this too. It knows no evaluation or step,
    since what is not finite is tried again with shorter steps first.
    """

    def __init__(self, message: str, t: float | Tensor, x: Any, nfe: int) -> None:
        super().__init__(message, t, x, nfe)
        self.step: int | None = None
        self.evaluation: int | None = None


def error_of(stuck: StuckError, flow: Flowing[Any], nfe: int) -> AdaptiveError:
    """Make the error of a march that is stuck."""
    kind = AdaptiveError if stuck.finite else AdaptiveNotFiniteError
    return kind(str(stuck), stuck.t, flow.whole(stuck.x), nfe)


@dataclass(frozen=True, eq=False)
class AdaptiveSolution(Generic[State]):
    """Where the flow led, and what it took.

    Args:
        x: The state at `t`, shaped like x0; float32, or float64 when x0 is float64.
        t: Time reached: the end, or that of an event; `[B]` with a step for each sample.
        nfe: Velocity evaluations made, those of rejected steps included.
        rows: How often the rows of the state went through a model (see `model_rows`).
        accepted: Steps; `[B]` with a step for each sample.
        rejected: Attempts that were made again with a shorter step; likewise.
        states: The states at the times of `at`, stacked, `[M, ...]` for each tensor; NaN where an
            event came first. None without `at`.
        event: Index of the event that ended the solve, None for none; with a step for each
            sample `[B]`, -1 for none.
    """

    x: State
    t: float | Tensor
    nfe: int
    rows: int
    accepted: int | Tensor
    rejected: int | Tensor
    states: State | None = None
    event: int | Tensor | None = None
    _dense: Callable[[float | Tensor], State] | None = field(default=None, repr=False)

    def at(self, t: float | Tensor) -> State:
        """Return the state at any time of the solve, by the pair's dense output.

        Args:
            t: Between the start and the time reached; a number, or `[B]` with a step for each
                sample.

        Returns:
            The state, shaped like x0.

        Raises:
            ValueError: The solve was made without `dense=True`, or t is outside it.

        Example:
            >>> found = solve_adaptive(lambda t, x: x, torch.ones(1).double(), dense=True)
            >>> round(found.at(0.5).item(), 4)
            1.6487
        """
        if self._dense is None:
            raise ValueError("no dense output was kept; make the solve with dense=True")
        return self._dense(t)


def solve_adaptive(
    velocity: Flow[State],
    x0: State,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    pair: str | Pair = "dopri5",
    start: float | Tensor = 0.0,
    end: float | Tensor = 1.0,
    at: Sequence[float] | Tensor | None = None,
    per_sample: bool = False,
    first_step: float | Tensor | None = None,
    max_nfe: int = 100_000,
    jumps: Sequence[float] = (),
    events: Sequence[Callable[[Tensor, State], Tensor]] = (),
    dense: bool = False,
    controller: Controller | None = None,
    norm: Callable[[State], Tensor] | None = None,
) -> AdaptiveSolution[State]:
    """Integrate dx/dt = velocity(t, x) to a tolerance, by an embedded Runge-Kutta pair.

    For references, likelihood and other solves in which the error matters more than the number
    of evaluations; for sampling on a budget there is `solve`. The state is float32 (float64 when
    x0 is float64) whatever the model's dtype. Time is float64, on the host; one number is read
    from the device for each attempted step. Gradients flow through the accepted steps, and the
    lengths of steps count as constants.

    Args:
        velocity: `velocity(t, x) -> dx/dt`, as for `solve`: t is a 0-dim tensor on x0's device in
            the state's dtype. With `per_sample` t is `[B]`, and so must be broadcast, as in
            t[:, None]. One that is contextual is given a `Context` in which what is not known
            before, such as the number of evaluations, is None; with `per_sample` it is given none.
        x0: The state at the start: a tensor, or a tree of tensors; floating point.
        rtol: Error allowed in each step relative to each element of the state.
        atol: Error allowed besides; a step is kept if the norm of error / (atol + rtol·|x|) is at
            most 1.
        pair: `bosh3`, `dopri5`, `tsit5`, `dopri8` or another of `pairs.PAIRS`, or a `Pair`.
        start: Time of x0. Times need not be in [0, 1].
        end: Time to reach; one before `start` goes backwards. With `per_sample` both may be `[B]`,
            and some samples may go backwards.
        at: Times whose states to return, in the order in which they are passed; with `per_sample`
            they may be `[B, M]`. They do not shorten steps.
        per_sample: Give each row of the first dimension its own time, step and acceptance. It then
            ends as it would alone, though in one call of the model for all rows; the calls are
            as many as the slowest row needs.
        first_step: Length of the first attempt, with `per_sample` perhaps `[B]`; guessed from
            one more evaluation when None.
        max_nfe: Evaluations after which to give up.
        jumps: Times at which the velocity jumps, besides those that it names itself, as guidance
            in an interval does; a step ends at each, and the next one starts on its other side.
        events: Functions `event(t, x)` of one number (`[B]` with `per_sample`); where the sign of
            one changes the solve ends, found on the dense output by halving.
        dense: Keep the dense output for `AdaptiveSolution.at`: the order of the polynomial times
            the size of the state, for each step.
        controller: The rule for the lengths of steps; `Controller()` when None.
        norm: Of a state to one number, to `[B]` with `per_sample`; the root mean square of all
            elements (of the sample) when None, in which a tensor counts as much as it is large.

    Returns:
        The state at the end or at the first event, and what it took.

    Raises:
        ValueError: A setting is out of range, the state is not floating point, or the velocity
            has not the state's shape.
        AdaptiveError: A step became too short, or `max_nfe` was reached. It has the last good
            state.
        AdaptiveNotFiniteError: The velocity is not finite. It is an AdaptiveError, and a
            `NotFiniteError` as `solve` raises it.

    Convention: t=0 is noise and t=1 is data. An event whose value is 0 at the start does not end
        the solve there.

    Source: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I (1993), II.4 to
        II.6; one step for each sample as in torchode, Lienen & Günnemann, arXiv 2210.12375.

    Example:
        >>> found = solve_adaptive(lambda t, x: x, torch.ones(2).double(), rtol=1e-8, atol=1e-8)
        >>> found.x, found.accepted, found.rejected
        (tensor([2.7183, 2.7183], dtype=torch.float64), 10, 0)
    """
    where = None
    if getattr(velocity, "takes_context", False) and not (per_sample or isinstance(start, Tensor)):
        where = Whereabouts(velocity, float(start))
    flow = Flowing(velocity, x0, per_sample, where)
    _check_numbers(rtol, atol, max_nfe, jumps)
    _check_first_step(first_step, len(flow.x0[0]) if per_sample else None)
    count = len(flow.x0)
    by = March(
        embedded_pair(pair),
        Tolerance([rtol] * count, [atol] * count),
        controller or Controller(),
        first_step,
        max_nfe,
        (*jumps, *jumps_of(velocity)),
        norm=_norm(norm, flow, per_sample),
    )
    if where is not None:
        by.watch = where
    watched = [flow.event(event) for event in events]
    try:
        found = (_each if per_sample else _together)(flow, by, start, end, at, watched, dense)
    except StuckError as stuck:
        raise error_of(stuck, flow, by.nfe) from None
    return AdaptiveSolution(
        x=flow.whole(found.x),
        t=found.t,
        nfe=by.nfe,
        rows=by.nfe * model_rows(velocity) if where is None else where.rows,
        accepted=found.accepted,
        rejected=found.rejected,
        states=None if found.states is None else flow.whole(found.states),
        event=found.event,
        _dense=None if found.dense is None else lambda t: flow.whole(found.dense(t)),
    )


def _norm(
    given: Callable[[Any], Tensor] | None, flow: Flowing[Any], per_sample: bool
) -> Callable[[Parts], Tensor]:
    if given is None:
        return rms_of_each if per_sample else rms_of_all
    shape = flow.x0[0].shape[:1] if per_sample else torch.Size()

    def norm(parts: Parts) -> Tensor:
        found = given(flow.whole(parts))
        if found.shape != shape:
            raise ValueError(
                f"norm returned shape {tuple(found.shape)}; it must return one number, or with "
                f"per_sample=True one for each sample, shape {tuple(shape)}"
            )
        return found

    return norm


@dataclass(eq=False)
class _Found:
    """What a march led to, in lists of tensors."""

    x: Parts
    t: float | Tensor
    accepted: int | Tensor
    rejected: int | Tensor
    states: Parts | None
    event: int | Tensor | None
    dense: Callable[[float | Tensor], Parts] | None


def _check_numbers(rtol: float, atol: float, max_nfe: int, jumps: Sequence[float]) -> None:
    if not (0.0 <= rtol < math.inf and 0.0 <= atol < math.inf and rtol + atol > 0.0):
        raise ValueError(
            f"rtol and atol must be finite, at least 0, and not both 0, got {rtol!r} and {atol!r}"
        )
    if max_nfe < 1:
        raise ValueError(f"max_nfe must be at least 1, got {max_nfe!r}")
    if not all(map(math.isfinite, jumps)):
        raise ValueError(f"jumps must be finite times, got {list(jumps)!r}")


def _check_first_step(first_step: float | Tensor | None, batch: int | None) -> None:
    if first_step is None:
        return
    if isinstance(first_step, Tensor) and first_step.shape not in ((), (batch,)):
        raise ValueError(
            f"first_step has shape {tuple(first_step.shape)}; it must be one number, or with "
            f"per_sample=True one for each sample"
        )
    lengths = torch.as_tensor(first_step)
    if not bool(((lengths > 0.0) & lengths.isfinite()).all()):
        raise ValueError(f"first_step is a length, above 0 in either direction, got {first_step!r}")


def _together(
    flow: Flowing[Any],
    by: March,
    start: float | Tensor,
    end: float | Tensor,
    at: Sequence[float] | Tensor | None,
    events: Sequence[Event],
    dense: bool,
) -> _Found:
    if not all(isinstance(t, int | float) and math.isfinite(t) for t in (start, end)):
        raise ValueError(
            f"start and end must be finite numbers, got {start!r} and {end!r}; times of each "
            f"sample need per_sample=True"
        )
    t, x, end = float(start), flow.x0, float(end)
    begin, sign = t, 1.0 if end >= t else -1.0
    asked: list[float] = [] if at is None else [float(time) for time in at]
    if sorted(asked, key=lambda time: sign * time) != asked or not all(
        min(t, end) <= time <= max(t, end) for time in asked
    ):
        raise ValueError(
            f"the times of at must lie between {start} and {end}, in that order, got {asked}"
        )
    watch = Watch(events, t, x) if events else None
    kept: list[Interpolant] = []
    states: list[Parts] = []
    hit: tuple[int, float, Parts] | None = None
    while len(states) < len(asked) and asked[len(states)] == t:
        states.append(x)
    for step in march(flow, x, t=t, end=end, by=by) if t != end else ():
        t, x = cast("float", step.t_next), step.x_next
        hit = None if watch is None else watch.crossing(step)
        within: Interpolant | None = None
        if hit is not None:
            _, t, x = hit
        if dense:
            within = step.interpolant()
            kept.append(within)
        while len(states) < len(asked) and sign * asked[len(states)] <= sign * t:
            time = asked[len(states)]
            within = within or step.interpolant()
            states.append(x if time == t else within.at(time))
        if hit is not None:
            break
    states += [[torch.full_like(part, math.nan) for part in x]] * (len(asked) - len(states))
    return _Found(
        x=x,
        t=t,
        accepted=by.accepted,
        rejected=by.rejected,
        states=None if at is None else [torch.stack(parts) for parts in zip(*states, strict=True)],
        event=None if hit is None else hit[0],
        dense=_Dense(kept, begin, t, x) if dense else None,
    )


@dataclass(frozen=True, eq=False)
class _Dense:
    """The dense output of all steps."""

    steps: list[Interpolant]
    start: float
    end: float
    x: Parts

    def __call__(self, t: float | Tensor) -> Parts:
        time = float(t)
        if not min(self.start, self.end) <= time <= max(self.start, self.end):
            raise ValueError(f"the solve went from {self.start} to {self.end}, got t={time}")
        if time == self.end or not self.steps:
            return self.x
        sign = 1.0 if self.end >= self.start else -1.0
        index = bisect.bisect_right(self.steps, sign * time, key=lambda s: sign * s.t) - 1
        return self.steps[index].at(time)


def _each(
    flow: Flowing[Any],
    by: March,
    start: float | Tensor,
    end: float | Tensor,
    at: Sequence[float] | Tensor | None,
    events: Sequence[Event],
    dense: bool,
) -> _Found:
    batch = len(flow.x0[0])
    clock = torch.float32 if flow.device.type == "mps" else torch.float64
    t, stop = (
        torch.as_tensor(time, dtype=clock, device=flow.device).expand(batch).clone()
        for time in (start, end)
    )
    asked = None
    if at is not None:
        asked = torch.as_tensor(at, dtype=clock, device=flow.device)
        asked = asked.expand(batch, asked.shape[-1])
        low, high = torch.minimum(t, stop)[:, None], torch.maximum(t, stop)[:, None]
        if not bool(((asked >= low) & (asked <= high)).all()):
            raise ValueError(f"the times of at must lie between start and end, got {at!r}")
    begin, x = t, flow.x0
    states = None if asked is None else _Asked(asked, t, x)
    counts = torch.zeros_like(t, dtype=torch.long), torch.zeros_like(t, dtype=torch.long)
    watch = WatchEach(events, t, x) if events else None
    kept: list[tuple[Interpolant, EachStep]] = []
    for step in march_each(
        flow, x, t=t, end=stop, by=by, counts=counts, halt=watch or (lambda step: None)
    ):
        t, x = step.t, step.x
        if dense:
            kept.append((step.attempt.interpolant(), step))
        if states is not None:
            states.pass_by(step)
    if watch is not None:
        stopped = watch.event >= 0
        t = torch.where(stopped, watch.t, t)
        x = [_pick(stopped, new, old) for new, old in zip(watch.x, x, strict=True)]
        if states is not None:
            states.forget_after(t, begin)
    return _Found(
        x=x,
        t=t,
        accepted=counts[0],
        rejected=counts[1],
        states=None if states is None else states.found,
        event=None if watch is None else watch.event,
        dense=_DenseEach(kept, begin, t, flow.x0, x) if dense else None,
    )


class _Asked:
    """The states at the times that were asked for, `[M, B, ...]`, as samples pass them."""

    def __init__(self, times: Tensor, t: Tensor, x: Parts) -> None:
        self._times = times.unbind(1)
        self._host = list(zip(times.amin(0).tolist(), times.amax(0).tolist(), strict=True))
        self._states = [
            [_pick(time == t, part, torch.full_like(part, math.nan)) for part in x]
            for time in self._times
        ]

    @property
    def found(self) -> Parts:
        return [torch.stack(parts) for parts in zip(*self._states, strict=True)]

    def pass_by(self, step: EachStep) -> None:
        within: Interpolant | None = None
        for i, (low, high) in enumerate(self._host):
            if high < step.first or low > step.last:
                continue
            within = within or step.attempt.interpolant()
            self._states[i] = _within(step, within, self._times[i], self._states[i])

    def forget_after(self, t: Tensor, begin: Tensor) -> None:
        for i, time in enumerate(self._times):
            passed = (time - begin).abs() > (t - begin).abs()
            self._states[i] = [
                _pick(passed, torch.full_like(part, math.nan), part) for part in self._states[i]
            ]


@dataclass(frozen=True, eq=False)
class _DenseEach:
    """The dense output of all samples' steps."""

    steps: list[tuple[Interpolant, EachStep]]
    start: Tensor
    end: Tensor
    x0: Parts
    x: Parts

    def __call__(self, t: float | Tensor) -> Parts:
        time = torch.as_tensor(t, dtype=self.end.dtype, device=self.end.device)
        time = time.expand_as(self.end)
        low, high = torch.minimum(self.start, self.end), torch.maximum(self.start, self.end)
        if not bool(((time >= low) & (time <= high)).all()):
            raise ValueError(
                f"the solve went from {self.start.tolist()} to {self.end.tolist()}, got t={t!r}"
            )
        found = self.x0
        for within, step in self.steps:
            found = _within(step, within, time, found)
        return [_pick(time == self.end, new, old) for new, old in zip(self.x, found, strict=True)]


def _within(step: EachStep, within: Interpolant, time: Tensor, otherwise: Parts) -> Parts:
    """Take the state at a time from those samples' step that passes it."""
    made: Attempt = step.attempt
    h, since = torch.as_tensor(made.h), time - made.t
    passed = step.moved & (since * h.sign() > 0) & (since.abs() <= h.abs())
    inside = [
        _pick(time == made.t_next, new, old)
        for new, old in zip(made.x_next, within.at(time), strict=True)
    ]
    return [_pick(passed, new, old) for new, old in zip(inside, otherwise, strict=True)]


def _pick(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (new.ndim - 1)), new, old)
