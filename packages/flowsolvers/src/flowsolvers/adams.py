"""Multistep methods on the velocity: Adams-Bashforth, and the corrector that reuses itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flowsolvers.interpolation import integrals
from flowsolvers.method import Grid
from flowsolvers.plan import Row, Step

__all__ = ["PEC", "Adams"]


@dataclass(frozen=True)
class Adams:
    """Adams-Bashforth with weights for the steps as they are, one evaluation a step.

    x_{n+1} = x_n + Σ_j v_{n-j} ∫ L_j(t) dt over the step, L_j the Lagrange polynomials of the
    times t_n, t_{n-1}, ... The first steps use the evaluations that there are.

    Args:
        order: How many velocities are combined, 1 to 4. Started with Euler's step, the error of
            the first step keeps orders above 2 near 2 on a uniform grid.

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
        """Write `nfe` steps of one evaluation each."""
        times = grid(nfe)
        steps: list[Step] = []
        for n, (t, t_next) in enumerate(pairwise(times)):
            known = times[max(0, n + 1 - self.order) : n + 1]
            steps.append(Step(t, t_next, (Row(t, ()),), integrals(known, t, t_next)))
        return tuple(steps)


@dataclass(frozen=True)
class PEC:
    """Predict by Adams-Bashforth, evaluate there, correct by Adams-Moulton, evaluate no more.

    p = x_n + Σ_{j<k} a_j v_{n-j};  v_{n+1} = v(t_{n+1}, p);  x_{n+1} = x_n + Σ_{j≤k} m_j v_{n+1-j}

    One evaluation a step: the one at the predicted point also starts the next step. The last
    step only predicts. The first steps use the evaluations that there are.

    Args:
        order: k, how many velocities predict, 1 to 3; the order of convergence is k + 1.

    Raises:
        ValueError: `order` is not 1 to 3.

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
        """Write `nfe` steps, two evaluations in the first and none in the last."""
        return predict_correct(grid(nfe), [self.predictor] * nfe)


def predict_correct(times: tuple[float, ...], orders: list[int]) -> tuple[Step, ...]:
    """Write a PEC method whose number of velocities differs between steps.

    Args:
        times: Ends of the steps.
        orders: For each step, how many velocities predict; fewer where there are fewer.

    Returns:
        The steps, with one row fewer in the last and one more in the first.
    """
    steps: list[Step] = []
    for n, (t, t_next) in enumerate(pairwise(times)):
        known = times[max(0, n + 1 - orders[n]) : n + 1]  # the times that predict, oldest first
        predict = integrals(known, t, t_next)
        rows = [Row(t, ())] if n == 0 else []
        if n == len(times) - 2:
            steps.append(Step(t, t_next, tuple(rows), predict))
            continue
        rows.append(Row(t_next, predict))
        steps.append(Step(t, t_next, tuple(rows), integrals((*known, t_next), t, t_next)))
    return tuple(steps)


def _check_order(order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"the number of velocities must be 1 to {most}, got {order!r}")
