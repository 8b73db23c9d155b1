r"""Explicit Runge-Kutta methods as frozen data.

With h = t_next - t, stage i is k_i = v(t + c_i·h, x + h·Σ_j a_ij·k_j) over j < i, and the step
ends at x + h·Σ_i b_i·k_i. As usual the table is drawn c | a over b:

    c_0 |
    c_1 | a_10
    c_2 | a_20 a_21
        +----------------
          b_0  b_1  b_2
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from flowsolvers.method import Grid
from flowsolvers.plan import Row, Step

__all__ = [
    "EULER",
    "HEUN",
    "HEUN3",
    "KUTTA3",
    "MIDPOINT",
    "RALSTON",
    "RALSTON3",
    "RK4",
    "RK38",
    "SSPRK3",
    "Tableau",
]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method, checked when it is made.

    Args:
        order: Nominal order of convergence, at least 1.
        c: Where in the step each stage is evaluated, 0 = start and 1 = end; `c[0]` is 0.
        a: For each stage the weights of the stages before it; `a[i]` holds i numbers.
        b: The weights of all stages in the step's end.

    Raises:
        ValueError: The shapes do not fit, a row of `a` does not sum to its c, or `b` does not
            sum to 1.

    Source: J. C. Butcher, Numerical Methods for Ordinary Differential Equations (2016), §23.

    Example:
        >>> Tableau(order=2, c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0)).stages
        2
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        """Prove the shapes and the row sums."""
        stages = len(self.b)
        if self.order < 1 or stages < 1:
            raise ValueError(
                f"a method needs an order and a number of stages of at least 1, "
                f"got {self.order} and {stages}"
            )
        lengths = [len(row) for row in self.a]
        if len(self.c) != stages or lengths != list(range(stages)):
            raise ValueError(
                f"an explicit method of {stages} stages (the length of b) needs {stages} values "
                f"of c and rows of a with {list(range(stages))} weights, "
                f"got {len(self.c)} and {lengths}"
            )
        for i, (c, row) in enumerate(zip(self.c, self.a, strict=True)):
            if not math.isclose(math.fsum(row), c, rel_tol=0.0, abs_tol=1e-12):
                raise ValueError(f"row {i} of a sums to {math.fsum(row)!r}; it must be c[{i}]={c}")
        if not math.isclose(math.fsum(self.b), 1.0, rel_tol=0.0, abs_tol=1e-12):
            raise ValueError(f"b sums to {math.fsum(self.b)!r}; it must sum to 1")

    @property
    def stages(self) -> int:
        """Velocity evaluations in one step."""
        return len(self.b)

    def lay_out(self, nfe: int, grid: Grid) -> tuple[Step, ...]:
        """Write ⌊nfe / stages⌋ steps, and before them what spends the remainder.

        A remainder of 1 is spent on Euler's step, of 2 on the midpoint rule, of 3 on Kutta's
        third order, of 4 on classic RK4; with more than 4 left, on several of these. It comes
        first, where a grid for few evaluations (shift, sigmoid) has its shortest steps, so that
        the coarse step is a short one.
        """
        whole, remainder = divmod(nfe, self.stages)
        methods = [*_fill(remainder), *[self] * whole]
        times = grid(len(methods))
        return tuple(m.step(*ends) for m, ends in zip(methods, pairwise(times), strict=True))

    def step(self, t: float, t_next: float) -> Step:
        """Write one step from t to t_next."""
        h = t_next - t
        rows = tuple(
            Row(t_next if c == 1.0 else t + c * h, tuple(h * weight for weight in a))
            for c, a in zip(self.c, self.a, strict=True)
        )
        return Step(t, t_next, rows, tuple(h * weight for weight in self.b))


#: Euler, Institutionum calculi integralis (1768).
EULER = Tableau(order=1, c=(0.0,), a=((),), b=(1.0,))

#: Runge's midpoint rule (1895); what the Lumina-Next paper samples with.
MIDPOINT = Tableau(order=2, c=(0.0, 1 / 2), a=((), (1 / 2,)), b=(0.0, 1.0))

#: Heun (1900), the explicit trapezoidal rule; torchdiffeq calls it heun2.
HEUN = Tableau(order=2, c=(0.0, 1.0), a=((), (1.0,)), b=(1 / 2, 1 / 2))

#: Ralston (1962), least error bound of order 2. It is the 2/3 method, not the 3/4 one.
RALSTON = Tableau(order=2, c=(0.0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4))

#: Heun (1900), order 3.
HEUN3 = Tableau(
    order=3,
    c=(0.0, 1 / 3, 2 / 3),
    a=((), (1 / 3,), (0.0, 2 / 3)),
    b=(1 / 4, 0.0, 3 / 4),
)

#: Kutta (1901), order 3; Simpson's rule when v depends on t alone.
KUTTA3 = Tableau(
    order=3,
    c=(0.0, 1 / 2, 1.0),
    a=((), (1 / 2,), (-1.0, 2.0)),
    b=(1 / 6, 2 / 3, 1 / 6),
)

#: Ralston (1962), order 3; the propagating row of Bogacki-Shampine 3(2).
RALSTON3 = Tableau(
    order=3,
    c=(0.0, 1 / 2, 3 / 4),
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
)

#: Shu & Osher (1988), strong stability preserving, order 3.
SSPRK3 = Tableau(
    order=3,
    c=(0.0, 1.0, 1 / 2),
    a=((), (1.0,), (1 / 4, 1 / 4)),
    b=(1 / 6, 1 / 6, 2 / 3),
)

#: Kutta (1901), the classic method of order 4.
RK4 = Tableau(
    order=4,
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)

#: Kutta (1901), the 3/8 rule; torchdiffeq, and so the Lumina demo, calls this one rk4.
RK38 = Tableau(
    order=4,
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

#: What spends a remainder of 1, 2, 3 or 4 evaluations.
_FILLERS = (EULER, MIDPOINT, KUTTA3, RK4)


def _fill(remainder: int) -> Iterator[Tableau]:
    while remainder:
        filler = _FILLERS[min(remainder, len(_FILLERS)) - 1]
        yield filler
        remainder -= filler.stages
