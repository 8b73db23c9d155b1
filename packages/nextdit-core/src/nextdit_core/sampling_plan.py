"""Check a solver, a time grid and a budget before any expensive work."""

from __future__ import annotations

import flowsolvers
from nextdit_core.errors import UserError

__all__ = ["check_sampling", "named_schedule"]


def check_sampling(
    solver: str,
    schedule: str | flowsolvers.Schedule,
    nfe: int,
    *,
    start: float = 0.0,
    end: float = 1.0,
) -> flowsolvers.Plan:
    """Resolve the names that a recipe or a request gives.

    Args:
        solver: A flowsolvers solver name.
        schedule: A flowsolvers time grid or its name, or "auto" for the solver's own.
        nfe: Velocity evaluations.
        start: Time at which to begin, in [0, 1).
        end: Time at which to end.

    Returns:
        The plan.

    Raises:
        UserError: A name is unknown or the budget is not possible.
    """
    try:
        return flowsolvers.plan(
            solver, nfe=nfe, schedule=named_schedule(schedule), start=start, end=end
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def named_schedule(name: str | flowsolvers.Schedule) -> flowsolvers.Schedule | None:
    """Find a time grid by name; "auto" is None, which stands for the solver's own.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(name, str):
        return name
    return None if name == "auto" else flowsolvers.schedule(name)
