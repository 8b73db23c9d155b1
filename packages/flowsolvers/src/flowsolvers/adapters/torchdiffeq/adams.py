"""torchdiffeq's Adams methods: weights for even steps, whatever the grid."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch

from flowsolvers.adapters.torchdiffeq.stages import tableau_step
from flowsolvers.embedded import Field, State, Tolerance, add, combine
from flowsolvers.tableaus import RK38

__all__ = ["Adams", "bashforth", "moulton"]

#: Fewer slopes than this are not combined; the step is one of the 3/8 rule.
_LEAST = 3

_GREATEST_ORDER = 12


class Adams:
    """Steps that combine the slopes of those before, as torchdiffeq's do.

    The first three steps are of the 3/8 rule, as are all where `max_order` is below 4. From then
    on a step combines as many slopes as there are, up to `max_order` - 1; the implicit one goes on
    from there by fixed-point iterations of the Adams-Moulton formula of one order more. The weights
    are those for even steps: on other grids the order is lost, there as here. At its greatest order
    the explicit one is hardly stable, and amplifies rounding from step to step; `max_order=5` is
    safer. `flowsolvers.plan` with `ab2` to `ab4` or `pec1` to `pec3` has weights for the steps
    that it takes.
    """

    def __init__(self, implicit: bool, options: Mapping[str, Any], tolerance: Tolerance) -> None:
        order = int(options.get("max_order", _GREATEST_ORDER))
        if not 2 <= order <= _GREATEST_ORDER:
            raise ValueError(f"max_order must be from 2 to {_GREATEST_ORDER}, got {order}")
        if order <= _LEAST:
            warnings.warn(
                f"max_order is below {_LEAST + 1}, so that all steps are of the 3/8 rule",
                stacklevel=2,
            )
        self._implicit, self._tolerance = implicit, tolerance
        self._iterations = int(options.get("max_iters", 4))
        self._slopes: deque[State] = deque(maxlen=order - 1)  # the newest first

    def step(
        self, flow: Field, t: float, t_next: float, x: State, side: float
    ) -> tuple[State, State]:
        """Return the state at t_next and the slope at t."""
        slope, h = flow(t, x, side), t_next - t
        self._slopes.appendleft(slope)
        count = len(self._slopes)
        if count < _LEAST:
            return tableau_step(flow, RK38, t, t_next, x, side, slope)
        change = combine(bashforth(count), list(self._slopes))
        if self._implicit:
            change = self._corrected(flow, t_next, h, x, change, side)
        return add(x, change, h), slope

    def _corrected(
        self, flow: Field, t_next: float, h: float, x: State, change: State, side: float
    ) -> State:
        first, *others = moulton(len(self._slopes) + 1)
        known = combine(others, list(self._slopes))
        for _ in range(self._iterations):
            before, slope = change, flow(t_next, add(x, change, h), -side)
            change = add(known, slope, first)
            if self._agree(before, change, h):
                return change
        warnings.warn(
            f"the iterations of implicit_adams did not converge at t={t_next:.6g}; take shorter "
            f"steps, or an adaptive method",
            stacklevel=2,
        )
        self._slopes.pop()
        return change

    @torch.no_grad()
    def _agree(self, before: State, change: State, h: float) -> bool:
        old, new = torch._foreach_mul(before, h), torch._foreach_mul(change, h)
        over = self._tolerance.over(list(torch._foreach_sub(new, old)), list(old), list(new))
        largest = torch.stack([part.abs().max() for part in over if part.numel()])
        return bool((largest < 1.0).all())


@lru_cache
def bashforth(count: int) -> tuple[float, ...]:
    """Return the weights by which `count` slopes of even steps, the newest first, make the next.

    Example:
        >>> bashforth(2)
        (1.5, -0.5)
    """
    return _weights([-i for i in range(count)])


@lru_cache
def moulton(count: int) -> tuple[float, ...]:
    """Return the same for `count` slopes, the first of which is at the end of the step.

    Example:
        >>> moulton(2)
        (0.5, 0.5)
    """
    return _weights([1 - i for i in range(count)])


def _weights(nodes: list[int]) -> tuple[float, ...]:
    """Integrate each node's Lagrange polynomial from 0 to 1, exactly."""
    found = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        powers = [Fraction(1)]  # of Π (τ - other) / (node - other), the constant first
        for other in others:
            shifted = [Fraction(0), *powers]
            scaled = [*(-other * p for p in powers), Fraction(0)]
            powers = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        found.append(float(sum(p / (n + 1) for n, p in enumerate(powers))))
    return tuple(found)
