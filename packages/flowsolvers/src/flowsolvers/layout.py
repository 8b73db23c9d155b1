"""Lay out a solver on a time grid."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from numbers import Integral

from flowsolvers.method import Method
from flowsolvers.plan import Plan, Step
from flowsolvers.registry import method
from flowsolvers.schedules import Schedule, uniform

__all__ = ["plan"]


def plan(
    solver: str = "auto",
    *,
    nfe: int,
    schedule: Schedule | None = None,
    start: float = 0.0,
    end: float = 1.0,
    jumps: Iterable[float] = (),
) -> Plan:
    """Lay out a solver on a time grid for an exact number of velocity evaluations.

    All steps are equal in u, the schedule's own variable.

    Args:
        solver: One of `solvers()`; "auto" chooses order and grid by the budget.
        nfe: Velocity evaluations, at least 1, met exactly. A Runge-Kutta method of s stages takes
            nfe / s steps, with a remainder spent on one cheaper step that comes first; multistep
            methods take one step for each.
        schedule: The time grid; when None the solver's own, if it has a method
            `default_schedule(nfe)`, and else `uniform()`.
        start: Time to start from, in [0, 1]: above 0 to go on from data with some noise.
        end: Time to end at, in [0, 1]: before start to go from data back to noise.
        jumps: Times at which the velocity jumps, such as the edges of an interval of guidance.
            A step ends at each, and methods with a memory begin anew there. Those that are not
            strictly between start and end are left out.

    Returns:
        The table that `solve` carries out.

    Raises:
        ValueError: `nfe` is less than 1, not an integer, or less than one for each part between
            jumps; the solver is unknown, or cannot go from data to noise when that is asked; the
            schedule is not a `Schedule` or does not increase at this number of steps; start, end
            or a jump is outside [0, 1].

    Example:
        >>> [len(step.rows) for step in plan("rk4", nfe=10).steps]
        [2, 4, 4]
        >>> [round(step.t, 2) for step in plan("ab2", nfe=5, jumps=[0.45]).steps]
        [0.0, 0.23, 0.45, 0.63, 0.82]
    """
    if not isinstance(nfe, Integral) or nfe < 1:
        raise ValueError(f"nfe must be an integer of at least 1, got {nfe!r}")
    found_method = method(solver)
    own = getattr(found_method, "default_schedule", None)
    default = uniform() if own is None else own(int(nfe))
    time_grid = default if schedule is None else schedule
    if not isinstance(time_grid, Schedule):
        raise ValueError(
            f"schedule must be a Schedule, got {schedule!r}; make one, as in "
            f"flowsolvers.schedule('shift:4')"
        )
    ends = _ends(start, end, jumps)
    if nfe < len(ends) - 1:
        raise ValueError(
            f"nfe={nfe} is too few for {len(ends) - 1} parts between start, jumps and end at "
            f"{', '.join(f'{t:g}' for t in ends)}; each needs at least one evaluation"
        )
    steps: list[Step] = []
    for (low, high), share in zip(
        pairwise(ends), _shares(int(nfe), ends, time_grid, found_method), strict=True
    ):
        steps += found_method.lay_out(share, partial(time_grid.grid, start=low, end=high))
    found = Plan(solver, str(time_grid), tuple(steps))
    if found.nfe != nfe:
        raise ValueError(
            f"solver {solver!r} laid out {found.nfe} evaluations for a budget of {nfe}; its "
            f"lay_out must meet the budget"
        )
    return found


def _ends(start: float, end: float, jumps: Iterable[float]) -> list[float]:
    """Order start, the jumps between, and end."""
    times = sorted({float(t) for t in jumps})
    if not all(0.0 <= t <= 1.0 for t in times):
        raise ValueError(f"jumps must be times in [0, 1], got {times}")
    between = [t for t in times if min(start, end) < t < max(start, end)]
    return [start, *(between if start < end else between[::-1]), end]


def _shares(nfe: int, ends: list[float], schedule: Schedule, method: Method) -> list[int]:
    """Share evaluations among parts by their length in u, whole steps where that is possible."""
    parts = len(ends) - 1
    if parts == 1:
        return [nfe]
    stages = getattr(method, "stages", 1)
    unit = stages if nfe // stages >= parts else 1
    inverse = schedule.inverse()
    lengths = [abs(inverse(high) - inverse(low)) for low, high in pairwise(ends)]
    spare = nfe // unit - parts  # after one for each
    ideal = [max(length / sum(lengths) * (nfe // unit) - 1.0, 0.0) for length in lengths]
    scaled = [share * spare / (sum(ideal) or 1.0) for share in ideal]
    shares = [1 + int(share) for share in scaled]
    order = sorted(range(parts), key=lambda i: int(scaled[i]) - scaled[i])  # largest rest first
    for i in order[: nfe // unit - sum(shares)]:
        shares[i] += 1
    counts = [share * unit for share in shares]
    counts[0] += nfe % unit
    return counts
