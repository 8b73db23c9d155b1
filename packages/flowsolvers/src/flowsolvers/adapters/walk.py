"""A plan carried out one evaluation at a time, for a loop that belongs to somebody else."""

from __future__ import annotations

import torch
from torch import Tensor

from flowsolvers.execute import combine
from flowsolvers.method import Grid
from flowsolvers.plan import Plan, Row, Step
from flowsolvers.program import sum_of
from flowsolvers.registry import method
from flowsolvers.states import Leaves, arithmetic

__all__ = ["Walk", "from_evaluation"]

#: Keep the velocity itself.
_VELOCITY = (0.0, 1.0)


class Walk:
    """Where a plan stands: the point to evaluate next, and what was kept of those before.

    A sum with one product, as in Euler's x + h·v, is rounded twice, as it is written and as
    diffusers computes it. `solve` fuses the two, which rounds once and may differ in the last bit.

    Args:
        plan: The table.
        x: The state where it begins, in the dtype to keep it in.
        first: Index of the evaluation to begin with. Above 0 the past is taken to be the straight
            line through x along the first velocity, so that no weight meets an evaluation that
            never happened.

    Example:
        >>> from flowsolvers import plan
        >>> walk = Walk(plan("midpoint", nfe=2), torch.ones(1))
        >>> walk.advance(walk.point)  # dx/dt = x
        >>> walk.advance(walk.point)
        >>> walk.point, walk.done
        (tensor([2.5000]), True)
    """

    def __init__(self, plan: Plan, x: Tensor, first: int = 0) -> None:
        #: Rows and ends in order, with the start of their step and how many are carried over it.
        self._tables: list[tuple[Row | Step, float, int]] = []
        #: What was kept of earlier evaluations, the newest last, and of which.
        self._kept: list[tuple[Row, Tensor]] = []
        self._x = x
        self._next = 0
        self._row: Row | None = None  # the evaluation that is wanted
        self._begins = first > 0  # a past still to be taken from the first velocity
        met: list[Row] = []
        reach = 0  # of the rows met, how many are still kept
        for step, carried in zip(plan.steps, plan.carried, strict=True):
            for row in step.rows:
                if len(met) == first:
                    self._next, self._row = len(self._tables), row
                    self._kept = [(past, x) for past in met[len(met) - reach :]]
                met.append(row)
                reach += 1
                self._tables.append((row, step.t, 0))
            self._tables.append((step, step.t, carried))
            reach = carried
        #: Where the velocity is wanted next; the final state when done.
        self.point = x
        if not self._begins:
            self._settle()

    @property
    def done(self) -> bool:
        """Whether no evaluation is left."""
        return self._row is None

    def advance(self, v: Tensor, point: Tensor | None = None, moved: Tensor | None = None) -> None:
        """Take in the velocity at the point, and move on to the next one.

        Args:
            v: The velocity there, shaped like the state and in its dtype.
            point: Where it was evaluated in place of `self.point`, if not there.
            moved: Which elements of the point are others, bool; all when None. There the past
                becomes the straight line through the new ones along v.
        """
        row = self._row
        if row is None:
            raise ValueError("the plan is at its end; no velocity is wanted any more")
        if point is not None or self._begins:
            self._start_over(row, v, self.point if point is None else point, moved)
        if row.keep == _VELOCITY:
            self._kept.append((row, v))
        else:
            self._kept.append((row, self.point * row.keep[0] + v * row.keep[1]))
        self._next += 1
        self._settle()

    def _start_over(self, row: Row, v: Tensor, point: Tensor, moved: Tensor | None) -> None:
        start = self._tables[self._next][1]

        def taken(new: Tensor, old: Tensor) -> Tensor:
            return new if moved is None or self._begins else torch.where(moved, new, old)

        self._x = taken(point if row.t == start else point - v * (row.t - start), self._x)
        self._kept = [
            (past, taken(_kept_on_line(past, row.t, v, point), old)) for past, old in self._kept
        ]
        self.point = taken(point, self.point)
        self._begins = False

    def _settle(self) -> None:
        """Carry out the ends of steps up to the next evaluation, and find its point."""
        for table, _, carried in self._tables[self._next :]:
            self.point = self._combine(table)
            if isinstance(table, Row):
                self._row = table
                return
            self._x = self.point
            del self._kept[: len(self._kept) - carried]
            self._next += 1
        self._row = None

    def _combine(self, table: Row | Step) -> Tensor:
        """Return scale·x + Σ_i weights[i]·kept, limited or not."""
        if table.limiter is not None:
            kept: list[Leaves] = [r for _, r in self._kept]
            found = combine(self._x, sum_of(table), kept, arithmetic(self._x))
            assert isinstance(found, Tensor)
            return found
        total = self._x if table.scale == 1.0 else self._x * table.scale
        recent = self._kept[len(self._kept) - len(table.weights) :]
        terms = [(w, r) for w, (_, r) in zip(table.weights, recent, strict=True) if w]
        if len(terms) == 1:
            weight, r = terms[0]
            return (r * weight).add_(total)
        for weight, r in terms:
            total = total.add(r, alpha=weight) if total is self._x else total.add_(r, alpha=weight)
        return total


def _kept_on_line(past: Row, t: float, v: Tensor, point: Tensor) -> Tensor:
    """What an evaluation keeps whose point lies on the line through `point` at t along v."""
    on_point, on_velocity = past.keep
    if past.keep == _VELOCITY:
        return v
    return point * on_point + v * (on_point * (past.t - t) + on_velocity)


def from_evaluation(plan: Plan, first: int) -> Plan | None:
    """Lay the plan's solver out anew from one of its evaluations on, over the same times.

    Args:
        plan: The table.
        first: Index of the evaluation to begin with.

    Returns:
        A plan that refers to nothing before it; None if the solver would evaluate elsewhere than
        at the times that the plan has left, as one that begins with shorter steps does.

    Example:
        >>> from flowsolvers import plan
        >>> [row.t for step in from_evaluation(plan("pec2", nfe=4), 2).steps for row in step.rows]
        [0.5, 0.75]
    """
    times = [row.t for step in plan.steps for row in step.rows][first:]
    ends = (times[0], *(step.t_next for step in plan.steps if step.t_next > times[0]))
    try:
        steps = method(plan.solver).lay_out(len(times), _only(ends))
    except ValueError:  # of _only, or of a solver that has no table for them
        return None
    found = Plan(plan.solver, f"{plan.schedule} from t={times[0]:.4g}", steps)
    return found if [row.t for step in steps for row in step.rows] == times else None


def _only(ends: tuple[float, ...]) -> Grid:
    def grid(steps: int) -> tuple[float, ...]:
        if steps != len(ends) - 1:
            raise ValueError(f"there are {len(ends) - 1} steps left, not {steps}")
        return ends

    return grid
