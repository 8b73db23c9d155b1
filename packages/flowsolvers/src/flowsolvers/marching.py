"""March from one time to another with steps of the length that an error estimate allows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowsolvers.control import Controller
from flowsolvers.embedded import (
    Attempt,
    Field,
    Norm,
    State,
    Tolerance,
    attempt,
    initial_step,
    rms_of_all,
)
from flowsolvers.pairs import Pair

__all__ = ["EachStep", "March", "StuckError", "judge", "march", "march_each"]

_EPS = sys.float_info.epsilon

#: Less than this, relative to its distance, is not left to a step of its own.
_SLIVER = 1 + 1e-6


class StuckError(RuntimeError):
    """The march cannot go on; the state is the last good one.

    `finite` says whether it is for another reason than numbers that are not finite.
    """

    def __init__(self, message: str, t: float | Tensor, x: State, *, finite: bool = True) -> None:
        super().__init__(message)
        self.t, self.x, self.finite = t, x, finite


def _ignore(event: str, t: float, t_next: float, x: State) -> None:
    """Watch nothing."""


@dataclass(eq=False)
class March:
    """What to march with, and how far it has come.

    Args:
        pair: The embedded pair.
        tolerance: The error that a step may make.
        controller: The rule for the next step's length.
        first_step: Length of the first attempt, `[B]` where samples have their own; found from
            the flow when None.
        max_nfe: Velocity evaluations that may be made.
        jumps: Times at which the velocity jumps: a step ends there, and the next one evaluates
            the other side.
        stops: Times at which a step ends, without a jump.
        norm: Error over tolerance to one number, or to `[B]` where each sample has its own step.
        watch: Called as watch("step" | "accept" | "reject", t, t_next, x), x at t.
    """

    pair: Pair
    tolerance: Tolerance
    controller: Controller = field(default_factory=Controller)
    first_step: float | Tensor | None = None
    max_nfe: int = sys.maxsize
    jumps: Sequence[float] = ()
    stops: Sequence[float] = ()
    norm: Norm = rms_of_all
    watch: Callable[[str, float, float, State], None] = _ignore
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0

    def spend(self, evaluations: int, t: float | Tensor, x: State) -> None:
        """Count evaluations before they are made."""
        if self.nfe + evaluations > self.max_nfe:
            raise StuckError(
                f"max_nfe={self.max_nfe} evaluations do not suffice: after {self.nfe} the solve "
                f"is at t={_shown(t)}; allow more, loosen rtol and atol, or take a pair of "
                f"another order",
                t,
                x,
            )
        self.nfe += evaluations


def march(flow: Field, x: State, *, t: float, end: float, by: March) -> Iterator[Attempt]:
    """Yield the accepted steps from t to end, for ever where end is infinite.

    One number is read from the device for each attempt, its error.
    """
    direction = 1.0 if end > t else -1.0
    marks = sorted({*by.jumps, *by.stops}, key=lambda mark: direction * mark)
    marks = [mark for mark in marks if direction * (mark - t) > 0]
    by.spend(1, t, x)
    slope = flow(t, x, direction if t in by.jumps else 0.0)
    if by.first_step is None:
        by.spend(1, t, x)
        with torch.no_grad():
            guess = initial_step(
                flow,
                t,
                x,
                slope,
                direction=direction,
                limit=abs(end - t),
                order=by.pair.order,
                tolerance=by.tolerance,
                norm=by.norm,
            )
        size = float(guess)
        if math.isnan(size):
            raise StuckError(_not_finite(t), t, x, finite=False)
    else:
        size = float(by.first_step)
    reach = abs(end) if math.isfinite(end) else size
    earlier = (1.0, 1.0)
    while t != end:
        size = min(max(size, by.controller.min_step), by.controller.max_step)
        target = marks[0] if marks else end
        lands = abs(target - t) <= size * _SLIVER
        t_next: float = target if lands else t + direction * size
        length = abs(t_next - t)
        jumps = lands and target in by.jumps
        by.watch("step", t, t_next, x)
        by.spend(by.pair.stages - 1, t, x)
        found = attempt(flow, by.pair, t, t_next, x, slope, -direction if jumps else 0.0)
        with torch.no_grad():
            ratio = float(by.norm(by.tolerance.over(found.error(), x, found.x_next)))
        accepted = ratio <= 1.0 or (length <= by.controller.min_step and math.isfinite(ratio))
        size = length * by.controller.factor(ratio, accepted, earlier, order=by.pair.order)
        if accepted:
            by.accepted += 1
            by.watch("accept", t, t_next, x)
            earlier = (ratio, earlier[0])
            t, x, slope = t_next, found.x_next, found.slopes[-1]
            if lands and marks:
                del marks[0]
            yield found
            if jumps and t != end:
                by.spend(1, t, x)
                slope = flow(t, x, direction)
        else:
            by.rejected += 1
            by.watch("reject", t, t_next, x)
            if size <= 8 * _EPS * max(abs(t), reach) or length <= by.controller.min_step:
                finite = math.isfinite(ratio)
                raise StuckError(_too_short(t) if finite else _not_finite(t), t, x, finite=finite)


@dataclass(frozen=True, eq=False)
class EachStep:
    """An attempt by every sample, and where they are after it.

    `moved` says `[B]` whose attempt was accepted; `first` and `last` bound the times of those,
    on the host.
    """

    attempt: Attempt
    moved: Tensor
    first: float
    last: float
    t: Tensor
    x: State


def march_each(
    flow: Field,
    x: State,
    *,
    t: Tensor,
    end: Tensor,
    by: March,
    counts: tuple[Tensor, Tensor],
    halt: Callable[[EachStep], Tensor | None] = lambda step: None,
) -> Iterator[EachStep]:
    """Yield attempts in which every sample has a step of its own, until all are at their end.

    Five numbers are read from the device for each attempt, at once. `counts` are the accepted and
    the rejected steps of each sample, `[B]`, counted in place. `halt` may say after a step which
    samples, `[B]`, go no further.
    """
    batch, clock = len(t), t.dtype
    direction = torch.where(end >= t, 1.0, -1.0).to(clock)
    jumps = t.new_tensor(sorted(by.jumps)) if by.jumps else None
    starts = None if jumps is None else (t[:, None] == jumps).any(1)
    by.spend(1, t, x)
    slope = flow(t, x, 0.0 if starts is None else direction * starts)
    if by.first_step is None:
        by.spend(1, t, x)
        with torch.no_grad():
            size = initial_step(
                flow,
                t,
                x,
                slope,
                direction=direction,
                limit=(end - t).abs().to(x[0].dtype),
                order=by.pair.order,
                tolerance=by.tolerance,
                norm=by.norm,
            )
        size = torch.as_tensor(size).nan_to_num(1e-6)
    else:
        size = torch.as_tensor(by.first_step, dtype=clock, device=t.device).expand(batch)
    least = 8 * torch.finfo(clock).eps
    earlier = (x[0].new_ones(batch), x[0].new_ones(batch))
    running = t != end
    going = bool(running.any())
    while going:
        size = size.clamp(by.controller.min_step, by.controller.max_step)  # of the first guess
        target = end if jumps is None else _next(jumps, t, end, direction)
        lands = (target - t).abs() <= size * _SLIVER
        t_next = torch.where(lands, target, t + direction * size)
        t_next = torch.where(running, t_next, t)
        length = (t_next - t).abs()
        at_jump = None
        if jumps is not None:
            at_jump = (t_next[:, None] == jumps).any(1) & running
        by.spend(by.pair.stages - 1, t, x)
        nudge = 0.0 if at_jump is None else -direction * at_jump
        found = attempt(flow, by.pair, t, t_next, x, slope, nudge)
        with torch.no_grad():
            ratio = by.norm(by.tolerance.over(found.error(), x, found.x_next))
            fits, next_size, next_earlier = judge(
                by.controller, ratio, length, earlier, order=by.pair.order
            )
            moved, failed = fits & running, ~fits & running
            size = torch.where(running, next_size, size)
            short = size <= least * torch.maximum(t.abs(), end.abs())
            stuck = failed & (short | (length <= by.controller.min_step))
            counts[0].add_(moved)
            counts[1].add_(failed)
            earlier = (
                torch.where(running, next_earlier[0], earlier[0]),
                torch.where(running, next_earlier[1], earlier[1]),
            )
            low, high = torch.minimum(t, t_next), torch.maximum(t, t_next)
            numbers = torch.stack(
                [
                    stuck.any().to(clock),
                    (moved & (t_next != end)).any().to(clock) + failed.any().to(clock),
                    low.masked_fill(~moved, math.inf).min(),
                    high.masked_fill(~moved, -math.inf).max(),
                    t.new_zeros(()) if at_jump is None else (at_jump & moved).any().to(clock),
                ]
            ).tolist()
        if numbers[0]:
            raise _stuck(stuck, ratio, t, x)
        x = [_where(moved, new, old) for new, old in zip(found.x_next, x, strict=True)]
        slope = [_where(moved, new, old) for new, old in zip(found.slopes[-1], slope, strict=True)]
        t = torch.where(moved, t_next, t)
        running, going = running & (t != end), bool(numbers[1])
        step = EachStep(found, moved, numbers[2], numbers[3], t, x)
        halted = halt(step)
        if halted is not None:
            running = running & ~halted
            going = bool(running.any())
        yield step
        if going and at_jump is not None and numbers[4]:
            by.spend(1, t, x)
            side = at_jump & moved
            other = flow(t, x, direction * side)
            slope = [_where(side, new, old) for new, old in zip(other, slope, strict=True)]


def judge(
    controller: Controller,
    ratio: Tensor,
    length: Tensor,
    earlier: tuple[Tensor, Tensor],
    *,
    order: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Decide for each sample, `[B]`, whether its step is kept, and how long the next one is.

    `ratio` is the error to the tolerance, `length` the step's, `earlier` the ratios of the kept
    steps before it, the newest first. Returns who is kept, the length of the next attempt, and
    `earlier` for it. A step of the least length is kept if only its error is finite.
    """
    fits = (ratio <= 1.0) | ((length <= controller.min_step) & ratio.isfinite())
    factor = controller.factor_each(ratio, fits, earlier, order=order)
    size = (length * factor.to(length.dtype)).clamp(controller.min_step, controller.max_step)
    newer = torch.where(fits, ratio, earlier[0]), torch.where(fits, earlier[0], earlier[1])
    return fits, size, newer


def _next(jumps: Tensor, t: Tensor, end: Tensor, direction: Tensor) -> Tensor:
    """Return of each sample the next jump on its way, or its end."""
    ahead = direction[:, None] * (jumps - t[:, None])
    ahead = ahead.masked_fill(ahead <= 0, math.inf)
    nearest, index = ahead.min(1)
    return torch.where(nearest < (end - t).abs(), jumps[index], end)


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (new.ndim - 1)), new, old)


def _shown(t: float | Tensor) -> str:
    if isinstance(t, Tensor):
        low, high = t.min().item(), t.max().item()
        return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    return f"{t:.6g}"


def _not_finite(t: float, who: str = "") -> str:
    return (
        f"the velocity is not finite at t={t:.6g} or right after it{who}; the exception holds "
        f"the last good state as x. Start after, or end before, a time at which the velocity has "
        f"a singularity"
    )


def _too_short(t: float, who: str = "") -> str:
    return (
        f"the step at t={t:.6g} became too short for a float{who}; the exception holds the last "
        f"good state as x. If the velocity jumps there, name the time in jumps=; otherwise loosen "
        f"rtol and atol, or take a fixed budget with solve"
    )


def _stuck(stuck: Tensor, ratio: Tensor, t: Tensor, x: State) -> StuckError:
    """Name the samples that cannot go on, by the reason of the first."""
    rows = stuck.nonzero().flatten().tolist()
    who = f", for the samples {rows[:8]}" + (", ..." if len(rows) > 8 else "")
    finite = bool(ratio[rows[0]].isfinite())
    message = (_too_short if finite else _not_finite)(t[rows[0]].item(), who)
    return StuckError(message, t, x, finite=finite)
