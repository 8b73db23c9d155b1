"""One step of a Runge-Kutta method that has no error estimate."""

from __future__ import annotations

from flowsolvers.embedded import Field, State, add, combine
from flowsolvers.tableaus import Tableau

__all__ = ["tableau_step"]


def tableau_step(
    flow: Field,
    tableau: Tableau,
    t: float,
    t_next: float,
    x: State,
    side: float,
    slope: State | None = None,
) -> tuple[State, State]:
    """Return the state at t_next and the slope at t, which may be given.

    Where `side` is not 0, the ends of the step are evaluated at the numbers next to them inside.
    """
    h = t_next - t
    slopes = [flow(t, x, side) if slope is None else slope]
    for c, weights in zip(tableau.c[1:], tableau.a[1:], strict=True):
        point = add(x, combine(weights, slopes), h)
        if c == 1.0:
            slopes.append(flow(t_next, point, -side))
        else:
            slopes.append(flow(t + c * h, point))
    return add(x, combine(tableau.b, slopes), h), slopes[0]
