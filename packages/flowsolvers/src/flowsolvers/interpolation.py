"""Weights of polynomials through earlier evaluations, as floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["integrals", "lagrange"]


def _gauss_legendre(n: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights on [-1, 1], exact for degree 2n - 1, by Newton's iteration."""
    pairs: list[tuple[float, float]] = []
    for i in range(n):
        z = math.cos(math.pi * (i + 0.75) / (n + 0.5))
        slope = 1.0
        for _ in range(100):
            before, value = 0.0, 1.0
            for j in range(n):
                before, value = value, ((2 * j + 1) * z * value - j * before) / (j + 1)
            slope = n * (z * value - before) / (z * z - 1)
            change = value / slope
            z -= change
            if abs(change) < 1e-16:
                break
        pairs.append((z, 2 / ((1 - z * z) * slope * slope)))
    return tuple(pairs)


#: For polynomials of degree 5, and for an exponential over a few units besides.
_SHORT, _LONG = _gauss_legendre(3), _gauss_legendre(24)


def integrals(
    nodes: Sequence[float],
    begin: float,
    end: float,
    kernel: Callable[[float], float] | None = None,
) -> tuple[float, ...]:
    """Integrate each Lagrange polynomial of the nodes, times a smooth kernel.

    w_j = ∫ kernel(τ) L_j(τ) dτ from begin to end; L_j is 1 at node j and 0 at the others.

    Args:
        nodes: All different, any order.
        begin: Lower end.
        end: Upper end.
        kernel: Such as τ ↦ e^(τ - end); None is 1.

    Returns:
        One weight for each node, to rounding where the kernel is an exponential over a few units.

    Example:
        >>> [round(w, 12) for w in integrals((0.0, -1.0), 0.0, 1.0)]  # Adams-Bashforth 2
        [1.5, -0.5]
    """
    half, middle = (end - begin) / 2, (end + begin) / 2
    terms: list[list[float]] = [[] for _ in nodes]
    for z, weight in _SHORT if kernel is None else _LONG:
        tau = middle + half * z
        factor = half * weight * (1.0 if kernel is None else kernel(tau))
        for term, value in zip(terms, lagrange(nodes, tau), strict=True):
            term.append(factor * value)
    return tuple(map(math.fsum, terms))


def lagrange(nodes: Sequence[float], tau: float) -> tuple[float, ...]:
    """Evaluate the Lagrange polynomial of each node.

    Args:
        nodes: All different, any order.
        tau: Where.

    Returns:
        L_j(tau) for each node j; they sum to 1.

    Example:
        >>> lagrange((0.0, 1.0), 2.0)
        (-1.0, 2.0)
    """
    values: list[float] = []
    for j, node in enumerate(nodes):
        value = 1.0
        for i, other in enumerate(nodes):
            if i != j:
                value *= (tau - other) / (node - other)
        values.append(value)
    return tuple(values)
