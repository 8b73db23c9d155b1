"""The one loop that carries out every plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flowsolvers.limiting import limited
from flowsolvers.program import End, Point, Program, Sum
from flowsolvers.states import Arithmetic, Leaves, arithmetic

__all__ = ["Watch", "combine", "execute"]


class Watch(Protocol):
    """Who is told of every evaluation and every step's end, and may change or end the course."""

    stopped: bool

    def evaluated(self, point: Point, at: Leaves, kept: Leaves) -> None:
        """See an evaluation at a point."""

    def reached(self, end: End, x: Leaves) -> Leaves:
        """See the state at a step's end; give it back, or another in its place."""
        ...


def execute(
    ask: Callable[[Any, Leaves], Leaves],
    x: Leaves,
    program: Program,
    watch: Watch | None = None,
) -> Leaves:
    """Carry out a plan.

    Args:
        ask: Evaluates the velocity at a move's tick, in the state's form and dtype.
        x: The state at the start; it is not written to.
        program: The plan, as `program.compiled` gives it.
        watch: Is told what happens; None where nobody asks.

    Returns:
        The state at the end.
    """
    sums = arithmetic(x)
    add, add_ = sums.add, sums.add_
    if program.euler is not None and watch is None:
        for tick, weight in program.euler:
            x = add(x, ask(tick, x), alpha=weight)
        return x
    kept: list[Any] = []  # of earlier evaluations, the newest last
    for tick, plain, point, end in program.moves:
        if plain and watch is None:
            kept.append(ask(tick, x))
        elif point is not None:
            index, weight, others, whole, keep, _ = point
            if index:
                at = add(x, kept[index], alpha=weight)
                for index, weight in others:
                    add_(at, kept[index], alpha=weight)
            else:
                at = x if whole is None else combine(x, whole, kept, sums)
            v = ask(tick, at)
            kept.append(v if keep is None else _keep(at, v, keep, sums))
            if watch is not None:
                watch.evaluated(point, at, kept[-1])
            del at, v  # what the model made is freed as soon as nothing needs it
        if end is not None:
            index, weight, others, dropped, freed, whole, _, _ = end
            if index:
                x = add(x, kept[index], alpha=weight)
                for index, weight in others:
                    add_(x, kept[index], alpha=weight)
            else:
                x = combine(x, whole, kept, sums)
            if dropped:
                del kept[:dropped]
            for index in freed:
                kept[index] = None
            if watch is not None:
                x = watch.reached(end, x)
                if watch.stopped:
                    break
    return x


def combine(x: Leaves, table: Sum, kept: list[Leaves], sums: Arithmetic) -> Leaves:
    """Return scale·x + Σ weight·kept, limited or not; x is untouched."""
    if table.limiter is not None:
        return limited(x, table, kept, sums)
    terms = table.terms
    if table.scale != 1.0:
        total = sums.mul(x, table.scale)
    elif terms:
        (index, weight), *terms = terms
        total = sums.add(x, kept[index], alpha=weight)
    else:
        return x
    for index, weight in terms:
        sums.add_(total, kept[index], alpha=weight)
    return total


def _keep(point: Leaves, v: Leaves, weights: tuple[float, float], sums: Arithmetic) -> Leaves:
    scaled = point if weights[0] == 1.0 else sums.mul(point, weights[0])
    return sums.add(scaled, v, alpha=weights[1])
