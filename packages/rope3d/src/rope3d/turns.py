"""Angles in turns: exact far from the origin in float32 arithmetic alone.

A whole number of turns changes no cosine, so the angle is counted in turns and reduced to
[-1/2, 1/2] before it is rounded. The frequency is the unevaluated sum of two float32 numbers, and
the rounding error of position * frequency is recovered by Dekker's product, as PyTorch has no
fused multiply-add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["split_turns", "turn_angles"]

#: 2^12 + 1 cuts the 24 bits of a float32 in two halves whose products are exact.
_SPLITTER = 4097.0


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


def turn_angles(positions: Tensor, turns: Tensor) -> Tensor:
    """Sum position times frequency over the axes, modulo a turn.

    Args:
        positions: `[..., tokens, axes]`, float32; at most 2^24 from the origin if whole.
        turns: `[2 * axes, pairs]`, as `split_turns` returns them.

    Returns:
        Angles in [-pi, pi], `[..., tokens, pairs]`, float32; cosine and sine are within 1e-6 of
        the exact ones for positions up to 1e6.

    Source:
        Dekker, A floating-point technique for extending the available precision, 1971.
    """
    high, low = turns.chunk(2)
    total = _part(positions[..., :1], high[0], low[0])
    for axis in range(1, positions.shape[-1]):
        total = total + _part(positions[..., axis : axis + 1], high[axis], low[axis])
    return (total - total.round()) * (2 * math.pi)


def _part(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    product = x * high
    x_high, x_low = _halves(x)
    f_high, f_low = _halves(high)
    error = ((x_high * f_high - product) + x_high * f_low + x_low * f_high) + x_low * f_low
    return (product - product.round()) + (error + x * low)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x * _SPLITTER
    high = scaled - (scaled - x)
    return high, x - high
