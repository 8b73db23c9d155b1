"""The whole solver as a table of floats, known before the first model call."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Integral

from flowsolvers.registry import tableau
from flowsolvers.schedules import Schedule, uniform
from flowsolvers.tableaus import EULER, KUTTA3, MIDPOINT, RK4, Tableau

__all__ = ["Plan", "Row", "Step", "plan"]

#: What spends a remainder of 1, 2, 3 or 4 evaluations.
_FILLERS = (EULER, MIDPOINT, KUTTA3, RK4)

#: Version of what `Plan.to_json` writes.
_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One evaluation, v_i = velocity(t, x + Σ_j weights[j]·v_j) over the step's earlier v_j.

    Args:
        t: Time of the evaluation, 0 = noise and 1 = data.
        weights: Of the velocities before this one in the step, oldest first, the length of the
            step multiplied in. x is the state at the step's start.

    Example:
        >>> plan("midpoint", nfe=2).steps[0].rows[1]
        Row(t=0.5, weights=(0.5,))
    """

    t: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """From one time to the next, x ← x + Σ_i weights[i]·v_i.

    Args:
        t: Where the step starts.
        t_next: Where it ends.
        rows: The evaluations, in order; row i has i weights.
        weights: One for each row, the length of the step multiplied in.

    Raises:
        ValueError: The step does not go forward, the numbers of weights do not fit, or a
            number is not finite.

    Example:
        >>> plan("euler", nfe=2).steps[1]
        Step(t=0.5, t_next=1.0, rows=(Row(t=0.5, weights=()),), weights=(0.5,))
    """

    t: float
    t_next: float
    rows: tuple[Row, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Prove the shape."""
        if not self.t < self.t_next:
            raise ValueError(f"a step must go forward, got t={self.t!r} to {self.t_next!r}")
        found = [*(len(row.weights) for row in self.rows), len(self.weights)]
        if not self.rows or found != list(range(len(self.rows) + 1)):
            raise ValueError(
                f"the step at t={self.t} needs one row or more, row i with i weights, and one "
                f"weight for each row at its end; got {found[:-1]} and {found[-1]} weights"
            )
        numbers = [self.t, self.t_next, *self.weights]
        numbers += [number for row in self.rows for number in (row.t, *row.weights)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"the step at t={self.t} holds a number that is not finite")


@dataclass(frozen=True)
class Plan:
    """A solver on a time grid, as the floats that `solve` multiplies with.

    Args:
        solver: Name of the solver, for reading.
        schedule: Name of the time grid, for reading.
        steps: In order, each starting where the one before it ends, within [0, 1].

    Raises:
        ValueError: There is no step, or the steps do not follow one another.

    Example:
        >>> print(plan("midpoint", nfe=2))
        midpoint on uniform: 2 evaluations in 1 step
        step  eval        t  point
           1    v0   0.0000  x
           1    v1   0.5000  x + 0.5 v0
           1   end   1.0000  x + 1 v1
    """

    solver: str
    schedule: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        """Prove that the steps are one path."""
        if not self.steps:
            raise ValueError("a plan needs at least one step, got none")
        if not 0.0 <= self.steps[0].t < self.steps[-1].t_next <= 1.0:
            raise ValueError(
                f"a plan must stay in [0, 1], got t={self.steps[0].t!r} to "
                f"{self.steps[-1].t_next!r}"
            )
        for before, after in pairwise(self.steps):
            if before.t_next != after.t:
                raise ValueError(
                    f"a step ends at t={before.t_next!r}, but the next starts at {after.t!r}; "
                    f"steps must follow one another"
                )

    @property
    def nfe(self) -> int:
        """Velocity evaluations in all."""
        return sum(len(step.rows) for step in self.steps)

    def __str__(self) -> str:
        """Draw the table, one line for each evaluation and each step's end."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) > 1)}"
        evaluations = f"{self.nfe} evaluation{'s' * (self.nfe > 1)}"
        yield f"{self.solver} on {self.schedule}: {evaluations} in {steps}"
        yield "step  eval        t  point"
        for n, step in enumerate(self.steps, start=1):
            for i, row in enumerate(step.rows):
                yield f"{n:4}  {f'v{i}':>4}  {row.t:7.4f}  {_sum(row.weights)}"
            yield f"{n:4}   end  {step.t_next:7.4f}  {_sum(step.weights)}"

    def to_json(self) -> str:
        """Write the plan as JSON, every float exactly.

        Returns:
            One JSON object, with the keys format, solver, schedule and steps.

        Example:
            >>> Plan.from_json(plan(nfe=7).to_json()) == plan(nfe=7)
            True
        """
        return json.dumps({"format": _FORMAT, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Args:
            text: The JSON object.

        Returns:
            The plan, equal to the one written.

        Raises:
            ValueError: The text is not JSON, is of another format, or is not a valid plan.

        Example:
            >>> Plan.from_json(plan("rk4", nfe=4).to_json()).nfe
            4
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}, but this version reads {_FORMAT}")
            steps = tuple(
                Step(
                    float(step["t"]),
                    float(step["t_next"]),
                    tuple(Row(float(row["t"]), _floats(row["weights"])) for row in step["rows"]),
                    _floats(step["weights"]),
                )
                for step in data["steps"]
            )
            return cls(str(data["solver"]), str(data["schedule"]), steps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a plan ({type(error).__name__}: {error}); give what Plan.to_json wrote"
            ) from error


def plan(solver: str = "midpoint", *, nfe: int, schedule: Schedule | None = None) -> Plan:
    """Lay out a solver on a time grid for an exact number of velocity evaluations.

    A method of s stages takes ⌊nfe / s⌋ steps. A remainder is spent on one more step of lower
    cost, which comes first: 1 left is Euler, 2 midpoint, 3 Kutta's third order, 4 classic RK4
    (with more than 4 left, which takes a method of 6 stages, several such steps).
    All steps are equal in u, the schedule's own variable.

    Args:
        solver: One of `solvers()`.
        nfe: Velocity evaluations, at least 1, met exactly.
        schedule: The time grid; `uniform()` when None.

    Returns:
        The table that `solve` carries out.

    Raises:
        ValueError: `nfe` is less than 1 or not an integer, the solver is unknown, or the
            schedule is not a `Schedule` or does not increase at this number of steps.

    Convention: the remainder comes first, where a grid for few evaluations (shift, sigmoid)
        has its shortest steps, so that the coarse step is a short one.

    Example:
        >>> [len(step.rows) for step in plan("rk4", nfe=10).steps]
        [2, 4, 4]
    """
    if not isinstance(nfe, Integral) or nfe < 1:
        raise ValueError(f"nfe must be an integer of at least 1, got {nfe!r}")
    time_grid = uniform() if schedule is None else schedule
    if not isinstance(time_grid, Schedule):
        raise ValueError(
            f"schedule must be a Schedule, got {schedule!r}; make one, as in "
            f"flowsolvers.schedule('shift:4')"
        )
    method = tableau(solver)
    whole, remainder = divmod(int(nfe), method.stages)
    methods = [*_fill(remainder), *[method] * whole]
    times = time_grid.grid(len(methods))
    steps = [_step(one, *ends) for one, ends in zip(methods, pairwise(times), strict=True)]
    return Plan(solver, str(time_grid), tuple(steps))


def _fill(remainder: int) -> Iterator[Tableau]:
    while remainder:
        filler = _FILLERS[min(remainder, len(_FILLERS)) - 1]
        yield filler
        remainder -= filler.stages


def _step(method: Tableau, t: float, t_next: float) -> Step:
    h = t_next - t
    rows = tuple(
        Row(t_next if c == 1.0 else t + c * h, tuple(h * weight for weight in a))
        for c, a in zip(method.c, method.a, strict=True)
    )
    return Step(t, t_next, rows, tuple(h * weight for weight in method.b))


def _sum(weights: tuple[float, ...]) -> str:
    terms = (f" {'-' if w < 0 else '+'} {abs(w):.4g} v{j}" for j, w in enumerate(weights) if w)
    return "x" + "".join(terms)


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
