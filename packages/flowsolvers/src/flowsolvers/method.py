"""Method: what a solver is before it meets a time grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from flowsolvers.plan import Step

__all__ = ["Grid", "Method"]

#: Number of steps to the times of their ends: one more number, increasing from 0 to 1, or from
#: one time between to another, or decreasing.
Grid: TypeAlias = Callable[[int], tuple[float, ...]]


@runtime_checkable
class Method(Protocol):
    """What an object behind an entry point of the group `flowsolvers.solvers` must offer."""

    @property
    def order(self) -> int:
        """Nominal order of convergence, at least 1."""
        ...

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write the steps for an exact number of evaluations.

        Args:
            nfe: Velocity evaluations, at least 1.
            grid: Gives the times of a number of steps, all equal in the schedule's variable.

        Returns:
            The steps, with `nfe` rows in all.

        Raises:
            ValueError: The method has no table for this number or these times, such as decreasing
                ones.
        """
        ...
