"""Positions: where the tokens of an image, a video, a sound, a cloud or a packed batch are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rope3d.angles import real_dtype

__all__ = ["grid", "pack", "points"]


def grid(
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    offset: float | Sequence[float] = 0.0,
    step: float | Sequence[float] = 1.0,
    centred: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Place the tokens of a sound, an image or a video on a regular grid.

    position = offset + step * i, or if centred offset + step * (i - (n - 1) / 2),
    i = 0 ... n - 1 along each axis.

    Args:
        frames: Frames of a video or a sound, or views of an object; None leaves the axis out.
        height: Tokens from top to bottom; None leaves the axis out.
        width: Tokens from left to right; None leaves the axis out.
        offset: Position of the first token, or of the middle if centred; one number, or one per
            axis that is there.
        step: Distance of neighbours; one number, or one per axis that is there, such as 1 / 25
            for seconds at 25 frames a second.
        centred: Put the middle of each axis, rather than its first token, at the offset.
        device: Where to put the positions.

    Returns:
        `[tokens, axes]`, one column for each axis that is there, in the order frame, row, column;
        float32, rounded once; whole numbers are exact up to 2**24.

    Raises:
        ValueError: No axis is there, a size is negative, or `offset` or `step` has the wrong
            length or is not finite.

    Convention:
        Row-major: the column changes fastest, then the row, then the frame. An axis of even
        length is centred on half positions. Qwen-Image centres on whole ones,
        -(n - n // 2) ... n // 2 - 1: give -(n - n // 2) as the offset of rows and of columns,
        uncentred.

    Source:
        Cosmos (`CosmosRotaryPosEmbed` of diffusers) spaces frames by 24 / fps;
        LTX-Video, arXiv 2501.00103, spaces frames by seconds and rows and columns by pixels.

    >>> grid(height=2, width=2).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    >>> grid(frames=3, step=0.5, centred=True).tolist()
    [[-0.5], [0.0], [0.5]]
    """
    sizes = tuple(size for size in (frames, height, width) if size is not None)
    if not sizes or min(sizes) < 0:
        raise ValueError(
            f"sizes are frames={frames}, height={height}, width={width}; expected at least one of "
            "them, and token counts of at least 0"
        )
    axes = len(sizes)
    offsets, steps = _one_per_axis("offset", offset, axes), _one_per_axis("step", step, axes)
    columns: list[Tensor] = []
    for size, first, spacing in zip(sizes, offsets, steps, strict=True):
        index = torch.arange(size, device=device)
        place = index.to(real_dtype(index.device)) - ((size - 1) / 2 if centred else 0)
        columns.append((first + spacing * place).to(torch.float32))
    # Flattened before they are stacked: of a view, torch.compile guards the shape of its base too,
    # and compiles again where a height happens to be the number of heads.
    planes = torch.meshgrid(*columns, indexing="ij")
    return torch.stack([plane.flatten() for plane in planes], dim=-1)


def points(
    coordinates: Tensor,
    *,
    low: float | Sequence[float],
    high: float | Sequence[float],
    length: float | Sequence[float],
) -> Tensor:
    """Measure the points of a cloud in positions: a box of the given length becomes a grid.

    position = (coordinate - low) / (high - low) * length - 1 / 2

    Args:
        coordinates: `[..., points, axes]`, floating point, in any unit; points outside the box
            are allowed.
        low: The corner of the box with the smallest coordinates; one number, or one per axis.
        high: The opposite corner.
        length: How many positions the box is long, which sets how far a rotation turns; one
            number, or one per axis.

    Returns:
        `[..., points, axes]`, as the coordinates in dtype, differentiable.

    Raises:
        ValueError: The coordinates are not floating-point `[..., points, axes]`, a corner or the
            length has not one number per axis, or the box or the length is not positive.

    Convention:
        The middle of cell i, when the box is cut into `length` cells, is at position i, where
        `grid` puts token i; so the corner `low` is at -1 / 2.

    >>> points(torch.tensor([[-1.0, 0.0, 0.75]]), low=-1.0, high=1.0, length=4.0)
    tensor([[-0.5000,  1.5000,  3.0000]])
    """
    if coordinates.ndim < 2 or not coordinates.dtype.is_floating_point:
        raise ValueError(
            f"coordinates are {coordinates.dtype} of shape {tuple(coordinates.shape)}; expected "
            "floating point [..., points, axes]"
        )
    axes = coordinates.shape[-1]
    lows, highs = _one_per_axis("low", low, axes), _one_per_axis("high", high, axes)
    lengths = _one_per_axis("length", length, axes)
    if not all(a < b for a, b in zip(lows, highs, strict=True)) or not all(n > 0 for n in lengths):
        raise ValueError(
            f"the box is from {low} to {high} and {length} long; expected low < high and a "
            "positive length on every axis"
        )
    scale = [n / (b - a) for a, b, n in zip(lows, highs, lengths, strict=True)]
    columns = coordinates.unbind(-1)
    return torch.stack(
        [(x - a) * s - 0.5 for x, a, s in zip(columns, lows, scale, strict=True)], dim=-1
    )


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


def _one_per_axis(name: str, value: float | Sequence[float], axes: int) -> tuple[float, ...]:
    """Repeat one number for every axis, or check that there is one per axis."""
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * axes
    if len(values) != axes or not all(map(math.isfinite, values)):
        raise ValueError(f"{name} is {value}; expected one finite number, or {axes}, one an axis")
    return values
