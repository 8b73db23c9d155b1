"""Check a solver, a time grid and a budget before any expensive work."""

from __future__ import annotations

import flowsolvers
from nextdit_core.errors import UserError

__all__ = ["check_sampling"]


def check_sampling(solver: str, schedule: str, nfe: int) -> flowsolvers.Plan:
    """Resolve the names that a recipe or a request gives.

    Args:
        solver: A flowsolvers solver name.
        schedule: A flowsolvers time grid, or "auto" for the solver's own.
        nfe: Velocity evaluations.

    Returns:
        The plan.

    Raises:
        UserError: A name is unknown or the budget is not possible.
    """
    try:
        grid = None if schedule == "auto" else flowsolvers.schedule(schedule)
        return flowsolvers.plan(solver, nfe=nfe, schedule=grid)
    except ValueError as error:
        raise UserError(str(error)) from error
