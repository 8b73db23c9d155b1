"""The default solver: order, damping and time grid by the budget."""

from __future__ import annotations

from dataclasses import dataclass

from flowsolvers.adams import predict_correct
from flowsolvers.curves import logistic, uniform
from flowsolvers.method import Grid
from flowsolvers.piecewise import from_times
from flowsolvers.plan import Step
from flowsolvers.shifts import terminal
from flowsolvers.tableaus import EULER, KUTTA3
from flowsolvers.warps import Schedule

__all__ = ["AUTO", "Auto"]


@dataclass(frozen=True)
class _Rule:
    """What to do with a budget.

    Args:
        nfe: The budget.
        velocities: How many predict, and correct besides the one at the predicted point.
        trust: In the velocity at the predicted point.
        last: Noise level at which the last step starts, times the budget; 1 is an even step.
        slope: Of a logistic curve before that; 0 is even steps.
    """

    nfe: int
    velocities: float
    trust: float
    last: float
    slope: float


#: Found on mixtures of Gaussians drawn at random, plain and guided by 1.5 to 8, in 2 to 256
#: dimensions (benchmarks/solvers/training.py): the mean log error, and besides by how much a flow
#: is worse than with Euler's method on even steps. Between, and only there, they are interpolated.
_RULES = (
    _Rule(4, 1.05, 0.5, 1.25, 0.0),
    _Rule(6, 1.6, 0.45, 0.8, 0.0),
    _Rule(8, 1.8, 0.75, 0.5, 0.0),
    _Rule(10, 1.9, 0.8, 0.5, 0.0),
    _Rule(16, 2.25, 0.9, 0.5, 1.0),
    _Rule(20, 2.5, 0.9, 0.5, 2.0),
    _Rule(30, 3.0, 1.0, 0.5, 2.0),
)

#: From so many evaluations on a step of Kutta's third order at the start pays for its two more.
_STARTED = 64


@dataclass(frozen=True)
class Auto:
    """Predictor and corrector on the velocity, with an order that grows with the budget.

    Up to 3 evaluations it is Euler's method, and from 30 on PEC of order 4. Between, the number
    of velocities that are combined is a fraction, which takes a part of each of two neighbouring
    orders, and the corrector trusts the velocity at the predicted point in part, since the
    prediction of a long step is bad. Its own time grid has even steps, the last of them shorter,
    and from 16 evaluations on bends to a logistic curve.

    Source: `PEC`, with the numbers of `_RULES`.

    Example:
        >>> [len(step.rows) for step in AUTO.lay_out(4, AUTO.default_schedule(4).grid)]
        [2, 1, 1, 0]
    """

    order: int = 4

    def default_schedule(self, nfe: int) -> Schedule:
        """Give the time grid that goes with a budget.

        Args:
            nfe: At least 1.

        Returns:
            A schedule that prints `auto:NFE`.
        """
        if nfe < _RULES[0].nfe:
            return Schedule(f"auto:{nfe}", uniform().warp)
        rule = _rule(nfe)
        bent = logistic(rule.slope) if rule.slope else uniform()
        times = (terminal(rule.last / nfe) @ bent).grid(nfe)
        return Schedule(f"auto:{nfe}", from_times(times).warp)

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write the steps."""
        if nfe < _RULES[0].nfe:
            return EULER.lay_out(nfe, grid)
        rule = _rule(nfe)
        start = KUTTA3 if nfe >= _STARTED else None
        times = grid(nfe if start is None else nfe - (KUTTA3.stages - 1))
        counts = [rule.velocities] * (len(times) - 1)
        return predict_correct(times, counts, start, trust=rule.trust)


def _rule(nfe: int) -> _Rule:
    after = next((rule for rule in _RULES if nfe <= rule.nfe), _RULES[-1])
    before = next((rule for rule in reversed(_RULES) if rule.nfe <= nfe), _RULES[0])
    if before == after:
        return before
    part = (nfe - before.nfe) / (after.nfe - before.nfe)

    def between(low: float, high: float) -> float:
        return low + part * (high - low)

    return _Rule(
        nfe,
        between(before.velocities, after.velocities),
        between(before.trust, after.trust),
        between(before.last, after.last),
        between(before.slope, after.slope),
    )


AUTO = Auto()
