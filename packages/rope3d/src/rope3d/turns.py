"""Angles in turns: exact far from the origin in float32 arithmetic alone.

A whole number of turns changes no cosine, so the angle is counted in turns and reduced to
[-1/2, 1/2] before it is rounded. The frequency is a double-float, and what position * frequency
loses in rounding is recovered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rope3d.double_float import exact_product

__all__ = ["split_turns", "turn_angles"]


def split_turns(frequencies: Tensor) -> Tensor:
    """Write frequencies as turns per position, in two float32 parts.

    Args:
        frequencies: `[axes, pairs]`, float64 on the CPU, radians per position.

    Returns:
        `[2 * axes, pairs]` float32: the leading parts of all axes, then what they lack.

    >>> split_turns(torch.tensor([[2 * math.pi]], dtype=torch.float64))
    tensor([[1.],
            [0.]])
    """
    turns = frequencies / (2 * math.pi)
    high = turns.to(torch.float32)
    return torch.cat((high, (turns - high.to(torch.float64)).to(torch.float32)))


def turn_angles(positions: Tensor, high: Sequence[Tensor], low: Sequence[Tensor]) -> Tensor:
    """Sum position times frequency over the axes, modulo a turn.

    Args:
        positions: `[..., tokens, axes]`, float32; at most 2^24 from the origin if whole.
        high: For each axis `[pairs]`, or what broadcasts to `[..., tokens, pairs]`: the leading
            part of the frequencies in turns per position.
        low: What `high` lacks.

    Returns:
        Angles in [-pi, pi], `[..., tokens, pairs]`, float32; cosine and sine are within 1e-6 of
        the exact ones for positions up to 1e6.
    """
    total = _part(positions[..., :1], high[0], low[0])
    for axis in range(1, positions.shape[-1]):
        total = total + _part(positions[..., axis : axis + 1], high[axis], low[axis])
    return (total - total.round()) * (2 * math.pi)


def _part(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    product, error = exact_product(x, high)
    return (product - product.round()) + (error + x * low)
