"""Multistep methods on the velocity: Adams-Bashforth, and the corrector that reuses itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flowsolvers.interpolation import integrals
from flowsolvers.method import Grid
from flowsolvers.plan import Limiter, Row, Step
from flowsolvers.tableaus import KUTTA3, MIDPOINT, Tableau

__all__ = ["PEC", "Adams", "Kept", "predict_correct"]


class Kept:
    """When what was kept of each evaluation belongs to, None where it is a Runge-Kutta stage."""

    def __init__(self) -> None:
        self.times: list[float | None] = []

    def last(self, count: int) -> tuple[float, ...]:
        """Give the times of the newest evaluations at step ends, oldest first."""
        return tuple(t for t in self.times if t is not None)[-count:]

    def spread(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Line up the weights of the newest evaluations at step ends with all that was kept."""
        left = list(weights)
        lined_up: list[float] = []
        for t in reversed(self.times):
            if not left:
                break
            lined_up.append(0.0 if t is None else left.pop())
        return tuple(reversed(lined_up))

    def limiter(self, t: float, weights: Sequence[float], strength: float) -> Limiter | None:
        """Compare the velocity at the step's start with the newest other one in a sum."""
        if strength == 0.0 or sum(map(bool, weights)) < 2:
            return None
        found = [i for i in range(-1, -len(weights) - 1, -1) if self.times[i] is not None]
        base = next(i for i in found if self.times[i] == t)
        return Limiter(base, next(i for i in found if i != base), strength)

    def run(self, tableau: Tableau, t: float, t_next: float) -> Step:
        """Write a Runge-Kutta step."""
        self.times += [t, *[None] * (tableau.stages - 1)]
        return tableau.step(t, t_next)


@dataclass(frozen=True)
class Adams:
    """Adams-Bashforth with weights for the steps as they are, one evaluation a step.

    x_{n+1} = x_n + Σ_j v_{n-j} ∫ L_j(t) dt over the step, L_j the Lagrange polynomials of the
    times t_n, t_{n-1}, ... Order 3 starts with a step of the midpoint rule and order 4 with two of
    Kutta's third order, which cost 1 and 4 evaluations more; where the budget is too small for
    that, the first steps combine the evaluations that there are, and the order is 2.

    Args:
        order: How many velocities are combined, 1 to 4.

    Raises:
        ValueError: `order` is not 1 to 4.

    Source: Bashforth & Adams (1883); E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary
        Differential Equations I, III.5 (variable steps).

    Example:
        >>> [round(w, 9) for w in Adams(2).lay_out(2, lambda n: (0.0, 0.5, 1.0))[1].weights]
        [-0.25, 0.75]
    """

    order: int

    def __post_init__(self) -> None:
        """Refuse orders without a use."""
        _check_order(self.order, 4)

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write the steps."""
        tableau, count = {3: (MIDPOINT, 1), 4: (KUTTA3, 2)}.get(self.order, (MIDPOINT, 0))
        extra = count * (tableau.stages - 1)
        if nfe < 2 * count + extra:
            count = extra = 0
        kept = Kept()
        steps: list[Step] = []
        for n, (t, t_next) in enumerate(pairwise(grid(nfe - extra))):
            if n < count:
                steps.append(kept.run(tableau, t, t_next))
                continue
            kept.times.append(t)
            weights = integrals(kept.last(self.order), t, t_next)
            steps.append(Step(t, t_next, (Row(t, ()),), kept.spread(weights)))
        return tuple(steps)


@dataclass(frozen=True)
class PEC:
    """Predict by Adams-Bashforth, evaluate there, correct by Adams-Moulton, evaluate no more.

    p = x_n + Σ_{j<k} a_j v_{n-j};  v_{n+1} = v(t_{n+1}, p);  x_{n+1} = x_n + Σ_{j≤k} m_j v_{n+1-j}

    One evaluation a step: the one at the predicted point also starts the next step. The last
    step only predicts. The first steps combine the evaluations that there are, which is enough
    for orders 2 and 3; order 4 begins with a step of Kutta's third order, which costs 2
    evaluations more, from 16 evaluations on.

    Args:
        predictor: k, how many velocities predict, 1 to 3; the order of convergence is k + 1.

    Raises:
        ValueError: `predictor` is not 1 to 3.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.1 and III.5,
        in the mode PEC; that the corrector's evaluation is worth reusing in a sampler is UniPC's
        idea, arXiv 2302.04867, here on the velocity itself.

    Example:
        >>> first, last = PEC(1).lay_out(2, lambda n: (0.0, 0.5, 1.0))
        >>> len(first.rows), [round(w, 9) for w in first.weights], len(last.rows)
        (2, [0.25, 0.25], 0)
    """

    predictor: int

    def __post_init__(self) -> None:
        """Refuse orders without a use."""
        _check_order(self.predictor, 3)

    @property
    def order(self) -> int:
        """Order of convergence."""
        return self.predictor + 1

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write the steps."""
        if self.predictor < 3 or nfe < 16:
            return predict_correct(grid(nfe), [self.predictor] * nfe)
        times = grid(nfe - (KUTTA3.stages - 1))
        return predict_correct(times, [self.predictor] * (len(times) - 1), KUTTA3)


def predict_correct(
    times: tuple[float, ...],
    predictors: Sequence[float],
    start: Tableau | None = None,
    *,
    correctors: Sequence[float] | None = None,
    trust: float = 1.0,
    limit: float = 0.0,
) -> tuple[Step, ...]:
    """Write a PEC method whose number of velocities may differ between steps.

    A number of velocities may be a fraction: 1.3 takes 0.7 of the weights of 1 and 0.3 of those
    of 2. The corrector of k velocities, which has the one at the predicted point besides, is
    mixed with the formula of the same order that has not, trust·AM_{k+1} + (1 - trust)·AB_{k+1}:
    where the prediction is bad, its evaluation is. Every mixture sums to the step's length.

    Args:
        times: Ends of the steps.
        predictors: For each step, how many velocities predict, at least 1; fewer where there are
            fewer.
        start: A Runge-Kutta method for the first step; None predicts and corrects there too.
        correctors: For each step, how many correct besides the one at the predicted point;
            None as many as predict.
        trust: In the velocity at the predicted point, 0 to 1; 1 wherever it is the second one.
        limit: Strength of a `Limiter` on every sum of two velocities or more; 0 is none.

    Returns:
        The steps. One row each, but two in the first step that predicts, and none in the last.
    """
    correctors = predictors if correctors is None else correctors
    kept = Kept()
    steps: list[Step] = []
    for n, (t, t_next) in enumerate(pairwise(times)):
        if n == 0 and start is not None and len(times) > 2:
            steps.append(kept.run(start, t, t_next))
            continue
        rows: list[Row] = []
        if t not in kept.times:
            rows.append(Row(t, ()))
            kept.times.append(t)
        known = kept.last(4)
        predict = kept.spread(_blended(known, predictors[n], t, t_next))
        limiter = kept.limiter(t, predict, limit)
        if n == len(times) - 2:
            steps.append(Step(t, t_next, tuple(rows), predict, limiter=limiter))
            continue
        rows.append(Row(t_next, predict, limiter=limiter))
        kept.times.append(t_next)
        correct = _blended(known, correctors[n], t, t_next, (t_next,))
        if trust != 1.0 and len(known) > 1:
            without = _blended(known, correctors[n] + 1, t, t_next)
            correct = _mixed(trust, correct, (*without, 0.0))
        correct = kept.spread(correct)
        limiter = kept.limiter(t, correct, limit)
        steps.append(Step(t, t_next, tuple(rows), correct, limiter=limiter))
    return tuple(steps)


def _blended(
    known: tuple[float, ...], count: float, t: float, t_next: float, ahead: tuple[float, ...] = ()
) -> tuple[float, ...]:
    """Weights of the newest `count` of what is known, and of what is ahead."""
    least = 0 if ahead else 1  # with a velocity ahead that may be none: Euler's step
    whole = max(min(int(count), len(known)), least)
    weights = _adams(known, whole, t, t_next, ahead)
    if whole in (count, len(known)):
        return weights
    return _mixed(count - whole, _adams(known, whole + 1, t, t_next, ahead), weights)


def _adams(
    known: tuple[float, ...], count: int, t: float, t_next: float, ahead: tuple[float, ...]
) -> tuple[float, ...]:
    if count == 0:
        return (t_next - t, 0.0)
    return integrals((*known[-count:], *ahead), t, t_next)


def _mixed(part: float, one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """Take `part` of one and the rest of the other, lined up at the newest."""
    length = max(len(one), len(other))
    one, other = ((*[0.0] * (length - len(w)), *w) for w in (one, other))
    return tuple(part * a + (1.0 - part) * b for a, b in zip(one, other, strict=True))


def _check_order(order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"the number of velocities must be 1 to {most}, got {order!r}")
