"""Order of the numbers in a token, here and in the released weights.

Convention: here a patch is (row in it, column in it, channel) on input and output. The authors'
input is (channel, row, column), their output (row, column, channel), where a second half of the
channels, meant for a sigma, is predicted and thrown away.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["add_sigma", "channels_first", "channels_last", "drop_sigma"]


def channels_last(weight: Tensor, patch_size: int) -> Tensor:
    """Reorder the columns `[width, C p p]` of an authors' patch embedding to `[width, p p C]`."""
    return weight.unflatten(1, (-1, patch_size, patch_size)).permute(0, 2, 3, 1).flatten(1)


def channels_first(weight: Tensor, patch_size: int) -> Tensor:
    """Reorder the columns `[width, p p C]` of our patch embedding to `[width, C p p]`."""
    return weight.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).flatten(1)


def drop_sigma(output: Tensor, patch_size: int) -> Tensor:
    """Keep the first half of the channels of `[p p 2C, ...]`."""
    both = output.unflatten(0, (patch_size, patch_size, 2, -1))
    return both[:, :, 0].flatten(0, 2)


def add_sigma(output: Tensor, patch_size: int) -> Tensor:
    """Put zeros behind the channels of `[p p C, ...]`; the authors' forward throws them away."""
    velocity = output.unflatten(0, (patch_size, patch_size, -1))
    both = velocity.new_zeros((*velocity.shape[:2], 2, *velocity.shape[2:]))
    both[:, :, 0] = velocity
    return both.flatten(0, 3)
