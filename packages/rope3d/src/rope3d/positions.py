"""Positions: where the tokens of an image, a video or a packed batch are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["grid", "pack"]


def grid(
    *,
    height: int,
    width: int,
    frames: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Number the tokens of an image or a video from 0, row by row.

    Args:
        height: Tokens from top to bottom.
        width: Tokens from left to right.
        frames: Frames of a video or views of an object; None for an image.
        device: Where to put the positions.

    Returns:
        `[height * width, 2]` (row, column), or with frames
        `[frames * height * width, 3]` (frame, row, column); float32, exact up to 2**24.

    Raises:
        ValueError: A size is negative.

    Convention:
        Row-major: the column changes fastest, then the row, then the frame; (0, 0) is the top
        left.

    >>> grid(height=2, width=2).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    sizes = (height, width) if frames is None else (frames, height, width)
    if min(sizes) < 0:
        raise ValueError(f"sizes are {sizes}; expected token counts of at least 0")
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def pack(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put the positions of several samples one after another, without padding.

    Args:
        samples: At least one `[tokens, axes]`, of one number of axes, dtype and device; tokens
            may differ and may be 0.

    Returns:
        `(positions, cu_seqlens)`: `[total_tokens, axes]`, and `[samples + 1]` int32 on the same
        device, where sample i is `positions[cu_seqlens[i]:cu_seqlens[i + 1]]`.

    Raises:
        ValueError: There is no sample, or their shapes do not fit one another.

    >>> positions, cu_seqlens = pack([grid(height=2, width=2), grid(height=1, width=3)])
    >>> positions.shape, cu_seqlens.tolist()
    (torch.Size([7, 2]), [0, 4, 7])
    """
    if not samples:
        raise ValueError("nothing to pack: samples is empty; give at least one [tokens, axes]")
    shapes = [tuple(sample.shape) for sample in samples]
    if any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise ValueError(
            f"samples have shapes {shapes}; expected [tokens, axes] with the same axes in each"
        )
    ends = [0]
    for tokens, _ in shapes:
        ends.append(ends[-1] + tokens)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=samples[0].device)
    return torch.cat(list(samples)), cu_seqlens
