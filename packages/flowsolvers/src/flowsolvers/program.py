"""A plan as the loop reads it: sums without their zeros, times on the device, all made once."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowsolvers.context import Context
from flowsolvers.plan import Plan, Row, Step

__all__ = ["Clock", "End", "Move", "Point", "Sum", "clock", "moves"]


class Sum(NamedTuple):
    """scale·x + Σ weight·kept[index]; indices count from the newest, -1."""

    scale: float
    terms: tuple[tuple[int, float], ...]


class Point(NamedTuple):
    """Where to evaluate and what to keep; None stands for x itself, and for the velocity."""

    sum: Sum | None
    keep: tuple[float, float] | None
    row: Row


class End(NamedTuple):
    """Where a step ends, x + weight·kept[index] + the others, unless it needs the whole `sum`.

    Args:
        index: Of the first term; 0 where x is scaled, or nothing is added.
        weight: Of the first term.
        others: The other terms.
        dropped: How many of what was kept, the oldest, nothing needs any more.
        sum: All of it.
        number: Of the step.
        step: The step.
    """

    index: int
    weight: float
    others: tuple[tuple[int, float], ...]
    dropped: int
    sum: Sum
    number: int
    step: Step


class Move(NamedTuple):
    """An evaluation, the end of a step, or both, one after the other.

    Args:
        plain: Whether the velocity is evaluated at x itself and kept.
        point: Where it is evaluated; None if it is not.
        end: The step's end, if it is one.
    """

    plain: bool
    point: Point | None
    end: End | None


#: For each move its time on the device, or that and its `Context`; None where nothing is evaluated.
Clock: TypeAlias = "list[Tensor | None] | list[tuple[Tensor, Context] | None]"


def moves(plan: Plan) -> tuple[Move, ...]:
    """Write a plan as moves; a second time, give the first answer."""
    if "moves" not in plan.memo:
        plan.memo["moves"] = tuple(_moves(plan))
    return plan.memo["moves"]


def _moves(plan: Plan) -> list[Move]:
    found: list[Move] = []
    kept = 0
    for number, (step, carried) in enumerate(zip(plan.steps, plan.carried, strict=True)):
        kept += len(step.rows)
        dropped, kept = max(kept - carried, 0), min(kept, carried)
        whole = _sum(step)
        (index, weight), *others = whole.terms if step.scale == 1.0 and whole.terms else [(0, 0.0)]
        end = End(index, weight, tuple(others), dropped, whole, number, step)
        points = [_point(row) for row in step.rows]
        found += [Move(_plain(point), point, None) for point in points[:-1]]
        last = points[-1] if points else None
        found.append(Move(_plain(last), last, end))
    return found


def _plain(point: Point | None) -> bool:
    return point is not None and point.sum is None and point.keep is None


def _point(row: Row) -> Point:
    stays = row.scale == 1.0 and not any(row.weights)
    keep = None if row.keep == (0.0, 1.0) else row.keep
    return Point(None if stays else _sum(row), keep, row)


def _sum(table: Row | Step) -> Sum:
    first = -len(table.weights)
    return Sum(table.scale, tuple((first + i, w) for i, w in enumerate(table.weights) if w))


def clock(plan: Plan, dtype: torch.dtype, device: torch.device, *, contextual: bool) -> Clock:
    """Put the times of all evaluations on a device; a second time, give the first answer.

    So nothing is copied in the loop, and a solve repeated under CUDA graph capture copies nothing.
    """
    key = (dtype, device, contextual)
    if key in plan.memo and not torch.compiler.is_compiling():
        return plan.memo[key]
    times = [row.t for step in plan.steps for row in step.rows]
    ticks = iter(torch.tensor(times, dtype=dtype, device=device).unbind())
    found = [None if move.point is None else next(ticks) for move in moves(plan)]
    if contextual:
        known = iter(contexts(plan))
        found = [None if tick is None else (tick, next(known)) for tick in found]
    if not torch.compiler.is_compiling():
        plan.memo[key] = found
    return found


def contexts(plan: Plan) -> list[Context]:
    """Say of each evaluation where it stands."""
    found: list[Context] = []
    for index, step in enumerate(plan.steps):
        for stage, row in enumerate(step.rows):
            count = len(found)
            found.append(
                Context(
                    t=row.t,
                    t_next=step.t_next,
                    step=index,
                    steps=len(plan.steps),
                    stage=stage,
                    evaluation=count,
                    evaluations=plan.nfe,
                    is_last=count == plan.nfe - 1,
                    t_start=step.t,
                )
            )
    return found
