"""The default solver: order, damping, limits and time grid by the budget."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from flowsolvers.adams import predict_correct
from flowsolvers.curves import logistic, uniform
from flowsolvers.method import Grid
from flowsolvers.piecewise import from_times
from flowsolvers.plan import Step
from flowsolvers.shifts import shift, terminal
from flowsolvers.tableaus import EULER, KUTTA3
from flowsolvers.warps import Schedule

__all__ = ["AUTO", "Auto", "Rule"]


@dataclass(frozen=True)
class Rule:
    """What to do with a budget.

    Args:
        nfe: The budget.
        velocities: How many predict, and correct besides the one at the predicted point; at
            least 1. A fraction takes a part of each of two neighbouring orders.
        trust: In the velocity at the predicted point, 0 to 1.
        last: Noise level at which the last step starts, times the budget; 1 is an even step.
        shift: Of the steps before that towards noise; 1 is none.
        slope: Of a logistic curve under the shift; 0 is even steps.
        limit: Strength of the `Limiter`s; 0 is none.
    """

    nfe: int
    velocities: float
    trust: float
    last: float
    shift: float
    slope: float
    limit: float


#: Found by benchmarks/solvers/search.py on mixtures of Gaussians drawn at random, plain and guided
#: by 1.5 to 8, in 2 to 256 dimensions, and rounded. At 4 evaluations, where most is lost by trust
#: in a bad prediction, what counted was that next to no flow is worse than by Euler's method.
_RULES = (
    Rule(4, 1.0, 1.0, 1.0, 1.15, 0.0, 10.5),
    Rule(6, 1.65, 0.7, 0.65, 1.0, 0.0, 2.5),
    Rule(8, 1.85, 0.75, 0.6, 1.1, 0.0, 1.9),
    Rule(10, 1.8, 0.85, 0.55, 1.15, 0.6, 0.5),
    Rule(16, 2.3, 0.8, 0.5, 1.05, 0.6, 0.6),
    Rule(20, 2.5, 0.9, 0.5, 1.0, 2.0, 0.6),
    Rule(30, 3.0, 1.0, 0.5, 1.0, 2.0, 0.0),
)

#: From so many evaluations on a step of Kutta's third order at the start pays for its two more.
_STARTED = 64


@dataclass(frozen=True)
class Auto:
    """Predictor and corrector on the velocity, with an order that grows with the budget.

    Up to 3 evaluations it is Euler's method, and from 30 on PEC of order 4. Between, the number
    of velocities that are combined is a fraction, the corrector trusts the velocity at the
    predicted point in part, and a `Limiter` takes every sum back towards Euler's step in samples
    whose velocity turns, since there the past says nothing of the future: with few evaluations
    and strong guidance that is what makes higher orders swing out. Its own time grid has nearly
    even steps, up to 16 evaluations a little shorter at the noise, and from 5 on a shorter last
    one; from 10 on it bends to a logistic curve.

    Args:
        rules: What to do with some budgets, which is interpolated between them; the last holds
            for all above it.

    Source: `PEC`, with numbers of our own.

    Example:
        >>> [len(step.rows) for step in AUTO.lay_out(4, AUTO.default_schedule(4).grid)]
        [2, 1, 1, 0]
    """

    rules: tuple[Rule, ...] = _RULES

    @property
    def order(self) -> int:
        """Order of convergence."""
        return 4

    def default_schedule(self, nfe: int) -> Schedule:
        """Give the time grid that goes with a budget.

        Args:
            nfe: At least 1.

        Returns:
            A schedule that prints `auto:NFE`.
        """
        rule = self._rule(nfe)
        if rule is None:
            return Schedule(f"auto:{nfe}", uniform().warp)
        bent = logistic(rule.slope) if rule.slope else uniform()
        times = (terminal(rule.last / nfe) @ shift(rule.shift) @ bent).grid(nfe)
        return Schedule(f"auto:{nfe}", from_times(times).warp)

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write the steps."""
        rule = self._rule(nfe)
        if rule is None:
            return EULER.lay_out(nfe, grid)
        start = KUTTA3 if nfe >= _STARTED else None
        times = grid(nfe if start is None else nfe - (KUTTA3.stages - 1))
        counts = [rule.velocities] * (len(times) - 1)
        return predict_correct(times, counts, start, trust=rule.trust, limit=rule.limit)

    def _rule(self, nfe: int) -> Rule | None:
        """Interpolate; None below the first."""
        if nfe < self.rules[0].nfe:
            return None
        after = next((rule for rule in self.rules if nfe <= rule.nfe), self.rules[-1])
        before = next(rule for rule in reversed(self.rules) if rule.nfe <= nfe)
        if before == after:
            return before
        part = (nfe - before.nfe) / (after.nfe - before.nfe)
        low, high = astuple(before)[1:], astuple(after)[1:]
        return Rule(nfe, *(a + part * (b - a) for a, b in zip(low, high, strict=True)))


AUTO = Auto()
