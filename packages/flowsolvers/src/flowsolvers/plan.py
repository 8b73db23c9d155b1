"""The whole solver as a table of floats, known before the first model call.

The state x and what was kept of earlier evaluations r_0, r_1, ... are combined with numbers that
depend on the times alone. Runge-Kutta, multistep, predictor-corrector and exponential methods
are all such tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

__all__ = ["Limiter", "Plan", "Row", "Step"]

#: Version of what `Plan.to_json` writes.
_FORMAT = 3


@dataclass(frozen=True)
class Limiter:
    """Less of a sum's higher orders in samples where two velocities part.

    Of Σ_i w_i·r_i = W·r_base + D, with W = Σ_i w_i, the sum becomes W·r_base + φ·D, where
    φ = 1 / (1 + (strength·s)⁴) and s = ‖r_base - r_other‖² / (2·(‖r_base‖² + ‖r_other‖²)), each
    sample along the first dimension by itself, and each tensor of a tree. Velocities that agree
    have s = 0, those at right angles 1/2, opposite ones 1. What is left at φ = 0 is Euler's step.
    On fine grids 1 - φ vanishes as the eighth power of the step, so that no order is lost, except
    where the velocity itself vanishes on the way: there the order is 2.

    Args:
        base: Index of the evaluation at the step's start, from the newest, -1.
        other: Index of the one that it is compared with.
        strength: At least 0.

    Example:
        >>> from flowsolvers import plan
        >>> plan(nfe=4).steps[1].limiter.strength > 0
        True
    """

    base: int
    other: int
    strength: float


@dataclass(frozen=True)
class Row:
    """One evaluation at a point, and what is kept of it.

    point = scale·x + Σ_j weights[j]·r_j;  v = velocity(t, point);  r = keep[0]·point + keep[1]·v

    Args:
        t: Time of the evaluation, 0 = noise and 1 = data.
        weights: Of what was kept of the evaluations before this one, the newest last, also
            across steps; older ones than there are weights count 0.
        scale: Of x, the state at the step's start.
        keep: What later rows and ends combine: (0, 1) keeps the velocity; (1, 1 - t) the
            prediction of the data.
        limiter: Of the sum; None takes it as it is.

    Example:
        >>> from flowsolvers import plan
        >>> plan("midpoint", nfe=2).steps[0].rows[1]
        Row(t=0.5, weights=(0.5,), scale=1.0, keep=(0.0, 1.0), limiter=None)
    """

    t: float
    weights: tuple[float, ...]
    scale: float = 1.0
    keep: tuple[float, float] = (0.0, 1.0)
    limiter: Limiter | None = None


@dataclass(frozen=True)
class Step:
    """From one time to another, x ← scale·x + Σ_i weights[i]·r_i.

    Args:
        t: Where the step starts.
        t_next: Where it ends.
        rows: The evaluations, in order; none where those of earlier steps suffice.
        weights: Of what was kept, the newest last, also across steps.
        scale: Of x, the state at the step's start.
        limiter: Of the sum; None takes it as it is.

    Raises:
        ValueError: The step ends where it starts, a number is not finite, or a limiter is of
            evaluations that have no weight in its sum.

    Example:
        >>> from flowsolvers import plan
        >>> plan("euler", nfe=2).steps[1].weights
        (0.5,)
    """

    t: float
    t_next: float
    rows: tuple[Row, ...]
    weights: tuple[float, ...]
    scale: float = 1.0
    limiter: Limiter | None = None

    def __post_init__(self) -> None:
        """Prove that it goes somewhere, in numbers."""
        if self.t == self.t_next:
            raise ValueError(f"a step must go somewhere, got t={self.t!r} to {self.t_next!r}")
        numbers = [self.t, self.t_next]
        for row in self.rows:
            numbers += [row.t, *row.keep]
        for table in (*self.rows, self):
            numbers += [table.scale, *table.weights]
            if table.limiter is not None:
                numbers.append(table.limiter.strength)
                _check_limiter(table.limiter, table, self.t)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"the step at t={self.t} holds a number that is not finite")


@dataclass(frozen=True)
class Plan:
    """A solver on a time grid, as the floats that `solve` multiplies with.

    Args:
        solver: Name of the solver, for reading.
        schedule: Name of the time grid, for reading.
        steps: In order, each starting where the one before it ends, within [0, 1]; all towards
            data, or all towards noise.

    Raises:
        ValueError: There is no step, the steps do not follow one another or not one way, or a
            weight refers to an evaluation before the first.

    Example:
        >>> from flowsolvers import plan
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
    #: After each step, how many of the newest evaluations later rows or ends combine.
    carried: tuple[int, ...] = field(init=False, repr=False, compare=False)
    #: What is derived from the plan and made once, such as its times on a device.
    memo: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Prove that the steps are one path."""
        if not self.steps:
            raise ValueError("a plan needs at least one step, got none")
        start, end = self.steps[0].t, self.steps[-1].t_next
        if not (min(start, end) >= 0.0 and max(start, end) <= 1.0):
            raise ValueError(f"a plan must stay in [0, 1], got t={start!r} to {end!r}")
        for before, after in pairwise(self.steps):
            if before.t_next != after.t:
                raise ValueError(
                    f"a step ends at t={before.t_next!r}, but the next starts at {after.t!r}; "
                    f"steps must follow one another"
                )
        if len({step.t < step.t_next for step in self.steps}) > 1:
            raise ValueError(
                "some steps go towards data and some towards noise; all must go one way"
            )
        kept = 0
        for step in self.steps:
            for row in step.rows:
                _check_reach(row.weights, kept, row.t)
                kept += 1
            _check_reach(step.weights, kept, step.t_next)
        object.__setattr__(self, "carried", self._count_carried())

    def __reduce__(self) -> tuple[type[Plan], tuple[Any, ...]]:
        """Copy and pickle the numbers alone."""
        return type(self), (self.solver, self.schedule, self.steps)

    @cached_property
    def nfe(self) -> int:
        """Velocity evaluations in all."""
        return sum(len(step.rows) for step in self.steps)

    @property
    def times(self) -> tuple[float, ...]:
        """Where the steps end, and before them where the first starts."""
        return (self.steps[0].t, *(step.t_next for step in self.steps))

    def __str__(self) -> str:
        """Draw the table, one line for each evaluation and each step's end."""
        return "\n".join(self._lines())

    def _count_carried(self) -> tuple[int, ...]:
        carried: list[int] = []
        need = 0  # how far back what follows reaches
        for step in reversed(self.steps):
            carried.append(need)
            need = max(need, len(step.weights))
            for row in reversed(step.rows):
                need = max(need - 1, len(row.weights))
        return tuple(reversed(carried))

    def _lines(self) -> Iterator[str]:
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) > 1)}"
        evaluations = f"{self.nfe} evaluation{'s' * (self.nfe > 1)}"
        yield f"{self.solver} on {self.schedule}: {evaluations} in {steps}"
        yield "step  eval        t  point"
        names: list[str] = []
        for n, step in enumerate(self.steps, start=1):
            for row in step.rows:
                point = _sum(row, names)
                names.append(f"{'v' if row.keep == (0.0, 1.0) else 'd'}{len(names)}")
                yield f"{n:4}  {names[-1]:>4}  {row.t:7.4f}  {point}"
            yield f"{n:4}   end  {step.t_next:7.4f}  {_sum(step, names)}"

    def to_json(self) -> str:
        """Write the plan as JSON, every float exactly.

        Returns:
            One JSON object, with the keys format, solver, schedule and steps.

        Example:
            >>> from flowsolvers import plan
            >>> Plan.from_json(plan(nfe=7).to_json()) == plan(nfe=7)
            True
        """
        data = {
            "format": _FORMAT,
            "solver": self.solver,
            "schedule": self.schedule,
            "steps": [asdict(step) for step in self.steps],
        }
        return json.dumps(data, allow_nan=False)

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
            >>> from flowsolvers import plan
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
                    tuple(_row(row) for row in step["rows"]),
                    _floats(step["weights"]),
                    float(step["scale"]),
                    _limiter(step["limiter"]),
                )
                for step in data["steps"]
            )
            return cls(str(data["solver"]), str(data["schedule"]), steps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a plan ({type(error).__name__}: {error}); give what Plan.to_json wrote"
            ) from error


def _row(data: dict[str, Any]) -> Row:
    point, velocity = _floats(data["keep"])
    return Row(
        float(data["t"]),
        _floats(data["weights"]),
        float(data["scale"]),
        (point, velocity),
        _limiter(data["limiter"]),
    )


def _limiter(data: dict[str, Any] | None) -> Limiter | None:
    if data is None:
        return None
    return Limiter(int(data["base"]), int(data["other"]), float(data["strength"]))


def _check_limiter(limiter: Limiter, table: Row | Step, t: float) -> None:
    reach = range(-len(table.weights), 0)
    if limiter.base not in reach or limiter.other not in reach or limiter.strength < 0.0:
        raise ValueError(
            f"in the step at t={t} the limiter must be of two of the {len(reach)} evaluations "
            f"in its sum, counted from -1 back, and not negative, got {limiter}"
        )
    if table.scale != 1.0:
        raise ValueError(
            f"in the step at t={t} the state is scaled by {table.scale!r}, which a sum with a "
            f"limiter cannot be"
        )


def _check_reach(weights: tuple[float, ...], kept: int, t: float) -> None:
    if len(weights) > kept:
        raise ValueError(
            f"the point at t={t} combines {len(weights)} evaluations, but {kept} come before it"
        )


def _sum(table: Row | Step, names: list[str]) -> str:
    text = "x" if table.scale == 1.0 else f"{table.scale:.4g} x"
    recent = names[len(names) - len(table.weights) :]
    terms = zip(table.weights, recent, strict=True)
    text += "".join(f" {'-' if w < 0 else '+'} {abs(w):.4g} {r}" for w, r in terms if w)
    if table.limiter is None:
        return text
    base, other = names[table.limiter.base], names[table.limiter.other]
    return f"{text}, less as {other} parts from {base}"


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
