"""What a `Limiter` makes of a sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowsolvers.program import Sum
from flowsolvers.states import Arithmetic, Leaves, each

__all__ = ["limited"]


def limited(x: Leaves, table: Sum, kept: Sequence[Leaves], sums: Arithmetic) -> Leaves:
    """Add up, with less of what is not along the base.

    Args:
        x: The state at the step's start; it is not written to.
        table: With a limiter, and a scale of 1.
        kept: What was kept of evaluations, the newest last.
        sums: For their form.

    Returns:
        x + W·base + φ·(Σ weight·kept[index] - W·base), W = Σ weight.
    """
    limiter = table.limiter
    assert limiter is not None
    base, other = kept[limiter.base], kept[limiter.other]
    parts = [_part(a, b, limiter.strength) for a, b in zip(each(base), each(other), strict=True)]
    rest = sums.mul(base, -table.total)
    for index, weight in table.terms:
        sums.add_(rest, kept[index], alpha=weight)
    for leaf, part in zip(each(rest), parts, strict=True):
        leaf.mul_(part)
    sums.add_(rest, base, alpha=table.total)
    sums.add_(rest, x)
    return rest


def _part(base: Tensor, other: Tensor, strength: float) -> Tensor:
    """Give φ of each sample along the first dimension."""
    whole = _square(base) + _square(other)
    share = _square(base - other) / (2.0 * whole).clamp_min(torch.finfo(base.dtype).tiny)
    return (1.0 + (strength * share) ** 4).reciprocal()


def _square(leaf: Tensor) -> Tensor:
    """Squared length of each sample, by a reduction that makes no tensor of the leaf's size."""
    if leaf.dim() < 2:
        return leaf.square()
    inner = tuple(range(1, leaf.dim()))
    return torch.linalg.vector_norm(leaf, dim=inner, keepdim=True).square()
