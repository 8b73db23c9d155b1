"""Exponential multistep methods: the linear part of the flow solved exactly.

With sigma = 1 - t and D = x + sigma v, the prediction of the data, the flow is linear in x and in
D, so that a polynomial through earlier D is integrated in closed form. Which variable the
polynomial is in makes the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from flowsolvers.adams import Kept
from flowsolvers.interpolation import integrals, lagrange
from flowsolvers.method import Grid
from flowsolvers.plan import Row, Step

__all__ = ["DPMSolver", "Exponential", "UniPC"]

Variable = Literal["log-snr", "log-sigma"]


@dataclass(frozen=True)
class Exponential:
    """Adams-Bashforth on D with the exact linear part, one evaluation a step.

    In s = -log sigma: x' = (sigma'/sigma) x + Σ_j D_j ∫ e^(s - s') L_j ds. In lambda =
    log(t / sigma), where DPM-Solver++ works, the factor is t' e^(lambda - lambda'); steps that
    combine a prediction of t = 0, where lambda is infinite, are taken in s. At t = 1 both are
    infinite and the flow ends in D, which the last step extrapolates in t. Order 3 starts with a
    step of the midpoint rule, which costs 1 evaluation more.

    Args:
        order: How many predictions are combined, 1 to 3.
        variable: "log-sigma" (s) or "log-snr" (lambda).

    Raises:
        ValueError: A number or a name is not one of these.

    Source: Hochbruck & Ostermann, Exponential integrators, Acta Numerica 2010; RES, arXiv
        2308.02157; DPM-Solver++, arXiv 2211.01095.

    Example:
        >>> Exponential(1).lay_out(1, lambda n: (0.0, 1.0))[0].weights  # Euler: x' = D
        (1.0,)
    """

    order: int
    variable: Variable = "log-sigma"

    def __post_init__(self) -> None:
        """Refuse what is not a method."""
        if self.order not in range(1, 4) or self.variable not in ("log-snr", "log-sigma"):
            raise ValueError(
                f"order must be 1 to 3 and variable 'log-sigma' or 'log-snr', got {self.order!r} "
                f"and {self.variable!r}"
            )

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write the steps."""
        start = self.order == 3 and nfe >= 4
        kept = Kept()
        steps: list[Step] = []
        for n, (t, t_next) in enumerate(pairwise(_forward(grid(nfe - start)))):
            if n == 0 and start:
                kept.times += [t, None]
                steps.append(_midpoint(t, t_next))
                continue
            kept.times.append(t)
            weights = exponential_weights(kept.last(self.order), t, t_next, self.variable)
            row = Row(t, (), keep=(1.0, 1.0 - t))
            scale = (1.0 - t_next) / (1.0 - t)
            steps.append(Step(t, t_next, (row,), kept.spread(weights), scale=scale))
        return tuple(steps)


def _midpoint(t: float, t_next: float) -> Step:
    """Write the midpoint rule in terms of the predictions D = x + sigma v."""
    h, middle = t_next - t, (t + t_next) / 2
    first, second = 1.0 - t, 1.0 - middle  # sigma
    back = h / 2 / first  # x + (h / 2) (D0 - x) / sigma
    rows = (
        Row(t, (), keep=(1.0, first)),
        Row(middle, (back,), scale=1.0 - back, keep=(1.0, second)),
    )
    whole = h / second  # x + h (D1 - point) / sigma
    return Step(t, t_next, rows, (-whole * back, whole), scale=1.0 - whole * (1.0 - back))


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ (2M): the midpoint rule of its authors on predictions of the data.

    x' = (sigma'/sigma) x - t' (e^-h - 1) [(1 + 1/2r) D_n - (1/2r) D_{n-1}],  r = h_prev / h, with
    h in lambda = log(t / sigma). The first and the last step are first order.

    Args:
        last_first_order: Whether the last step is first order although its end is before t = 1,
            as diffusers has it for fewer than 15 steps.

    Source: Lu et al., DPM-Solver++, arXiv 2211.01095, algorithm 2; in velocity form.

    Example:
        >>> len(DPMSolver().lay_out(3, lambda n: (0.1, 0.3, 0.6, 1.0))[1].weights)
        2
    """

    last_first_order: bool = False
    order: int = 2

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write `nfe` steps of one evaluation each."""
        times = _forward(grid(nfe))
        steps: list[Step] = []
        for n, (t, t_next) in enumerate(pairwise(times)):
            scale = (1.0 - t_next) / (1.0 - t)
            row = Row(t, (), keep=(1.0, 1.0 - t))
            first = n == 0 or times[n - 1] == 0.0 or t_next == 1.0
            if first or (self.last_first_order and n == nfe - 1):
                weights: tuple[float, ...] = (1.0 - scale,)
            else:
                h = _log_snr(t_next) - _log_snr(t)
                r = (_log_snr(t) - _log_snr(times[n - 1])) / h
                whole = -t_next * math.expm1(-h)
                weights = (-whole / (2 * r), whole * (1 + 1 / (2 * r)))
            steps.append(Step(t, t_next, (row,), weights, scale=scale))
        return tuple(steps)


@dataclass(frozen=True)
class UniPC:
    """UniPC: a predictor and a corrector that share one evaluation, in log-SNR.

    With hh = -h, B = e^hh - 1 ("bh2") or hh ("bh1"), r_i = (lambda_{n-i} - lambda_n) / h and
    D1_i = (D_{n-i} - D_n) / r_i: x~ = (sigma'/sigma) x - t' (e^hh - 1) D_n; predicted
    x~ - t' B Σ rho_i D1_i; corrected with D at the predicted point, of r = 1, besides. rho solves
    R rho = b, R_ki = r_i^(k-1), b_k = k! phi_{k+1}(hh) hh / B; one rho is 1/2.

    Args:
        predictor: p, how many predictions of the data the predictor combines, 1 to 3; the order
            of convergence is p + 1, in log-SNR.
        solver: "bh2" or "bh1".
        last_lower_order: Whether the last steps lower the order although the end is before t = 1,
            as diffusers has it.

    Raises:
        ValueError: A number or a name is not one of these.

    Source: Zhao et al., UniPC, arXiv 2302.04867, algorithms 1 and 2, with predictions of the data.

    Example:
        >>> [len(step.rows) for step in UniPC(2).lay_out(3, lambda n: (0.0, 0.3, 0.6, 1.0))]
        [2, 1, 0]
    """

    predictor: int = 2
    solver: Literal["bh1", "bh2"] = "bh2"
    last_lower_order: bool = False

    def __post_init__(self) -> None:
        """Refuse what is not a method."""
        if self.predictor not in range(1, 4) or self.solver not in ("bh1", "bh2"):
            raise ValueError(
                f"predictor must be 1 to 3 and solver 'bh1' or 'bh2', got {self.predictor!r} and "
                f"{self.solver!r}"
            )

    @property
    def order(self) -> int:
        """Order of convergence."""
        return self.predictor + 1

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write `nfe` steps, two evaluations in the first and none in the last."""
        times = _forward(grid(nfe))
        steps: list[Step] = []
        for n, (t, t_next) in enumerate(pairwise(times)):
            order = min(self.predictor, n + 1)
            last = n == len(times) - 2
            if self.last_lower_order or times[-1] == 1.0:  # towards infinite log-SNR
                order = min(order, len(times) - 1 - n)
            if t == 0.0 or t_next == 1.0:
                order = 1
            while order > 1 and times[n + 1 - order] == 0.0:  # log-SNR is infinite there
                order -= 1
            rows = [Row(t, (), keep=(1.0, 1.0 - t))] if n == 0 else []
            scale = (1.0 - t_next) / (1.0 - t)
            nodes = times[n + 1 - order : n + 1]
            predict = self._weights(nodes, t, t_next, corrects=False)
            if last:
                steps.append(Step(t, t_next, tuple(rows), predict, scale=scale))
                continue
            rows.append(Row(t_next, predict, scale=scale, keep=(1.0, 1.0 - t_next)))
            correct = self._weights(nodes, t, t_next, corrects=True)
            steps.append(Step(t, t_next, tuple(rows), correct, scale=scale))
        return tuple(steps)

    def _weights(
        self, nodes: tuple[float, ...], t: float, t_next: float, *, corrects: bool
    ) -> tuple[float, ...]:
        """Weights of D at the nodes, oldest first, and at t_next if it corrects."""
        whole = 1.0 - (1.0 - t_next) / (1.0 - t)  # of D_n alone: Euler's step
        count = len(nodes) - 1 + corrects
        if count == 0:
            return (whole,)
        if t == 0.0:  # h is infinite: B = hh's limit leaves the corrector's half of the difference
            return (whole / 2, whole / 2) if corrects else (whole,)
        start = _log_snr(t)
        h = _log_snr(t_next) - start
        ratios = [(_log_snr(node) - start) / h for node in reversed(nodes[:-1])]
        ratios += [1.0] if corrects else []
        hh = -h
        factor = math.expm1(hh) if self.solver == "bh2" else hh
        if count == 1:
            rho = [0.5]
        else:
            right: list[float] = []
            phi, factorial = math.expm1(hh) / hh - 1.0, 1.0
            for k in range(1, count + 1):
                right.append(phi * factorial / factor)
                factorial *= k + 1
                phi = phi / hh - 1.0 / factorial
            rho = _solve([[r ** (k - 1) for r in ratios] for k in range(1, count + 1)], right)
        each = [-t_next * factor * p / r for p, r in zip(rho, ratios, strict=True)]
        older = each[: len(nodes) - 1]
        newest = whole - math.fsum(each)
        return (*reversed(older), newest, *each[len(nodes) - 1 :])


def exponential_weights(
    nodes: tuple[float, ...], t: float, t_next: float, variable: Variable
) -> tuple[float, ...]:
    """Integrate the polynomials through the nodes against the exact linear part.

    Args:
        nodes: Times of the predictions, oldest first, the last one t.
        t: Where the step starts.
        t_next: Where it ends.
        variable: Of the polynomials.

    Returns:
        One weight for each node.
    """
    scale = (1.0 - t_next) / (1.0 - t)
    if len(nodes) == 1:
        return (1.0 - scale,)
    if t_next == 1.0:
        return lagrange(nodes, 1.0)
    snr = variable == "log-snr" and nodes[0] != 0.0
    of, factor = (_log_snr, t_next) if snr else (_log_sigma, 1.0)
    end = of(t_next)
    raw = integrals([of(x) for x in nodes], of(t), end, lambda tau: factor * math.exp(tau - end))
    # They sum to 1 - scale: let rounding of the quadrature not move a constant.
    return (*raw[:-1], 1.0 - scale - math.fsum(raw[:-1]))


def _forward(times: tuple[float, ...]) -> tuple[float, ...]:
    if times[-1] < times[0]:
        raise ValueError(
            "exponential methods run from noise to data only, and the end comes before the start; "
            "take a Runge-Kutta or Adams method, such as 'midpoint' or 'pec2'"
        )
    return times


def _log_snr(t: float) -> float:
    return -math.inf if t == 0.0 else math.inf if t == 1.0 else math.log(t / (1.0 - t))


def _log_sigma(t: float) -> float:
    return math.inf if t == 1.0 else -math.log1p(-t)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small linear system by elimination with pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(i + 1, n):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        known = math.fsum(rows[i][j] * found[j] for j in range(i + 1, n))
        found[i] = (rows[i][n] - known) / rows[i][i]
    return found
