"""Lay out a solver on a time grid."""

from __future__ import annotations

from numbers import Integral

from flowsolvers.plan import Plan
from flowsolvers.registry import method
from flowsolvers.schedules import Schedule, uniform

__all__ = ["plan"]


def plan(solver: str = "midpoint", *, nfe: int, schedule: Schedule | None = None) -> Plan:
    """Lay out a solver on a time grid for an exact number of velocity evaluations.

    All steps are equal in u, the schedule's own variable.

    Args:
        solver: One of `solvers()`.
        nfe: Velocity evaluations, at least 1, met exactly. A Runge-Kutta method of s stages takes
            nfe / s steps, with a remainder spent on one cheaper step that comes first; multistep
            methods take one step for each.
        schedule: The time grid; `uniform()` when None.

    Returns:
        The table that `solve` carries out.

    Raises:
        ValueError: `nfe` is less than 1 or not an integer, the solver is unknown, or the
            schedule is not a `Schedule` or does not increase at this number of steps.

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
    steps = method(solver).lay_out(int(nfe), time_grid.grid)
    found = Plan(solver, str(time_grid), steps)
    if found.nfe != nfe:
        raise ValueError(
            f"solver {solver!r} laid out {found.nfe} evaluations for a budget of {nfe}; its "
            f"lay_out must meet the budget"
        )
    return found
