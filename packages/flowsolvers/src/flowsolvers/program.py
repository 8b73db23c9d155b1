"""A plan as the loop reads it: sums without their zeros, times on the device, all made once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowsolvers.context import Context
from flowsolvers.plan import Limiter, Plan, Row, Step

__all__ = ["End", "Move", "Point", "Program", "Sum", "compiled", "contexts", "sum_of"]


class Sum(NamedTuple):
    """scale·x + Σ weight·kept[index]; indices count from the newest, -1.

    Args:
        scale: Of x.
        terms: Index and weight.
        limiter: Which takes less of it, or None.
        total: Σ weight.
    """

    scale: float
    terms: tuple[tuple[int, float], ...]
    limiter: Limiter | None
    total: float


class Point(NamedTuple):
    """Where to evaluate, x + weight·kept[index] + the others unless it needs the whole `sum`.

    Args:
        index: Of the first term; 0 where x is scaled or limited, or nothing is added.
        weight: Of the first term.
        others: The other terms.
        sum: All of it; None stands for x itself.
        keep: What to keep of it; None stands for the velocity.
        row: The row.
    """

    index: int
    weight: float
    others: tuple[tuple[int, float], ...]
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
        freed: Of the rest, which were of use up to here, as indices from the newest.
        sum: All of it.
        number: Of the step.
        step: The step.
    """

    index: int
    weight: float
    others: tuple[tuple[int, float], ...]
    dropped: int
    freed: tuple[int, ...]
    sum: Sum
    number: int
    step: Step


class Move(NamedTuple):
    """An evaluation, the end of a step, or both, one after the other.

    Args:
        tick: The evaluation's time on the device, or that and its `Context`; None without one.
        plain: Whether the velocity is evaluated at x itself and kept.
        point: Where it is evaluated; None if it is not.
        end: The step's end, if it is one.
    """

    tick: Tensor | tuple[Tensor, Context] | None
    plain: bool
    point: Point | None
    end: End | None


class Program(NamedTuple):
    """All moves of a plan.

    Args:
        moves: In order.
        euler: Of each move the tick and the weight, where every one is x + weight·v and nothing
            is kept; else None.
    """

    moves: tuple[Move, ...]
    euler: tuple[tuple[Any, float], ...] | None


def compiled(plan: Plan, dtype: torch.dtype, device: torch.device, *, contextual: bool) -> Program:
    """Write a plan as moves, with all times on the device; a second time, give the first answer.

    So nothing is copied in the loop, and a solve repeated under CUDA graph capture copies nothing.
    """
    key = (dtype, device, contextual)
    remember = not torch.compiler.is_compiling()
    if remember and key in plan.memo:
        return plan.memo[key]
    times = [row.t for step in plan.steps for row in step.rows]
    ticks: list[Any] = list(torch.tensor(times, dtype=dtype, device=device).unbind())
    if contextual:
        ticks = list(zip(ticks, contexts(plan), strict=True))
    moves = tuple(_moves(plan, iter(ticks)))
    found = Program(moves, _as_euler(moves))
    if remember:
        plan.memo[key] = found
    return found


def _moves(plan: Plan, ticks: Iterator[Any]) -> Iterator[Move]:
    last_uses = _last_uses(plan)
    made = kept = 0
    for number, (step, carried) in enumerate(zip(plan.steps, plan.carried, strict=True)):
        made += len(step.rows)
        kept += len(step.rows)
        dropped, kept = max(kept - carried, 0), min(kept, carried)
        freed = tuple(i - made for i in range(made - kept, made) if last_uses[i] == number)
        whole = sum_of(step)
        index, weight, others = _quick(whole)
        end = End(index, weight, others, dropped, freed, whole, number, step)
        for row in step.rows[:-1]:
            yield _evaluation(row, next(ticks), None)
        if step.rows:
            yield _evaluation(step.rows[-1], next(ticks), end)
        else:
            yield Move(None, False, None, end)


def _as_euler(moves: tuple[Move, ...]) -> tuple[tuple[Any, float], ...] | None:
    pairs: list[tuple[Any, float]] = []
    for tick, plain, _, end in moves:
        if not plain or end is None or (end.index, end.others, end.dropped) != (-1, (), 1):
            return None
        pairs.append((tick, end.weight))
    return tuple(pairs)


def _last_uses(plan: Plan) -> list[int]:
    """Say of each evaluation which step is the last that combines it."""
    found: list[int] = []
    for number, step in enumerate(plan.steps):
        for table in (*step.rows, step):
            for index, _ in sum_of(table).terms:
                found[index] = number
            if table.limiter is not None:
                found[table.limiter.base] = found[table.limiter.other] = number
            if isinstance(table, Row):
                found.append(number)
    return found


def _evaluation(row: Row, tick: Any, end: End | None) -> Move:
    stays = row.scale == 1.0 and not any(row.weights)
    keeps = row.keep == (0.0, 1.0)
    whole = sum_of(row)
    point = Point(*_quick(whole), None if stays else whole, None if keeps else row.keep, row)
    return Move(tick, stays and keeps, point, end)


def _quick(whole: Sum) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    """Take a sum apart for the loop, if it is nothing but terms added to x."""
    if not whole.terms or whole.scale != 1.0 or whole.limiter is not None:
        return 0, 0.0, ()
    (index, weight), *others = whole.terms
    return index, weight, tuple(others)


def sum_of(table: Row | Step) -> Sum:
    """Leave out the zeros."""
    first = -len(table.weights)
    terms = tuple((first + i, w) for i, w in enumerate(table.weights) if w)
    return Sum(table.scale, terms, table.limiter, math.fsum(table.weights))


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
