"""Angles: positions times frequencies, exact far from the origin."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from rope3d.compile_constant import compile_constant, static_sizes
from rope3d.turns import split_turns, turn_angles

__all__ = [
    "cos_sin",
    "exact_cos_sin",
    "has_float64",
    "matrix",
    "real_dtype",
    "spell",
    "turn_cos_sin",
]

#: What cosines and sines are rounded to: all that backends need to know.
TABLE = torch.float32


class _Matrices:
    """Matrices on their device, `[rows, columns]`, as attributes; only ever added to.

    Attributes rather than a dictionary: torch.compile looks each up when it meets it, and so sees
    those that were added since it began to trace.
    """


_MATRICES = _Matrices()


# torch.compile guards a layout by one string, compared by value: no guard per frequency, and no
# recompilation for an equal layout.
@compile_constant
def spell(rows: tuple[tuple[float, ...], ...]) -> str:
    """Write a matrix as a string that reads back exactly."""
    return repr(rows)


def has_float64(device: torch.device) -> bool:
    """Tell whether a device computes in float64; MPS does not."""
    return device.type != "mps"


def real_dtype(device: torch.device) -> torch.dtype:
    """Name the widest real dtype of a device: float64, or float32 on MPS."""
    return torch.float64 if has_float64(device) else torch.float32


def matrix(
    spelled: str, rows: tuple[tuple[float, ...], ...], dtype: torch.dtype | None, like: Tensor
) -> Tensor:
    """Copy rows to the device of a tensor, once per process.

    Args:
        spelled: The rows as `spell` writes them.
        rows: Numbers of the matrix.
        dtype: Wanted dtype; None divides by 2 pi and splits in two parts, as `split_turns` does.
        like: A tensor on the wanted device.

    Returns:
        `[rows, columns]`, or in parts `[2 * rows, columns]`; do not write to it.
    """
    if type(like) is Tensor:
        return getattr(_MATRICES, _on_device(spelled, dtype, like.device))
    # A tensor subclass, such as the fake tensors of torch.export, must not be cached.
    if dtype is None:
        return split_turns(torch.tensor(rows, dtype=torch.float64)).to(like.device)
    return torch.tensor(rows, dtype=dtype, device=like.device)


def exact_cos_sin(
    positions: Tensor, spelled: str, rows: tuple[tuple[float, ...], ...]
) -> tuple[Tensor, Tensor]:
    """Take cosine and sine of position times frequency, exact far from the origin.

    Args:
        positions: `[..., tokens, axes]`.
        spelled: The frequencies as `spell` writes them.
        rows: The frequencies, `[axes][pairs]`.

    Returns:
        Cosine and sine, `[..., tokens, pairs]`, float32.
    """
    # One CPU thread, torch 2.13: 2.2 ms against 2.1 ms in turns for lumina(72) at 4096 tokens,
    # 25 ms against 49 ms for wan() at 16384. So turns serve only where float64 is missing.
    if has_float64(positions.device):
        return cos_sin(positions, matrix(spelled, rows, torch.float64, positions))
    high, low = matrix(spelled, rows, None, positions).chunk(2)
    return turn_cos_sin(positions, high.unbind(), low.unbind())


def turn_cos_sin(
    positions: Tensor, high: Sequence[Tensor], low: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Do what `cos_sin` does in float32 arithmetic alone, as exactly.

    Args:
        positions: `[..., tokens, axes]`.
        high: Frequencies in turns, in two float32 parts, as `turn_angles` takes them.
        low: As `high`.

    Returns:
        Cosine and sine, `[..., tokens, pairs]`, float32.
    """
    angle = turn_angles(positions.to(torch.float32), high, low)
    return angle.cos(), angle.sin()


def cos_sin(positions: Tensor, frequencies: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum position times frequency over the axes, and take cosine and sine.

    A sum over axes rather than a matrix product: a token's angle then has the same bits whatever
    else is in the batch.

    Args:
        positions: `[..., tokens, axes]`.
        frequencies: For each axis `[pairs]`, or what broadcasts to `[..., tokens, pairs]`.

    Returns:
        Cosine and sine, `[..., tokens, pairs]`, float32.
    """
    dtype = frequencies[0].dtype
    angle = positions[..., :1].to(dtype) * frequencies[0]
    for axis in range(1, positions.shape[-1]):
        angle = angle + positions[..., axis : axis + 1].to(dtype) * frequencies[axis]
    return angle.cos().to(TABLE), angle.sin().to(TABLE)


@compile_constant
def _on_device(spelled: str, dtype: torch.dtype | None, device: torch.device) -> str:
    """Copy the rows to a device the first time, None as turns; name their attribute."""
    name = "m" + blake2b(f"{device} {dtype} {spelled}".encode(), digest_size=16).hexdigest()
    matrices = vars(_MATRICES)
    if name not in matrices:
        with torch.inference_mode(False):  # an inference tensor could not serve a later backward
            rows = torch.tensor(literal_eval(spelled), dtype=torch.float64)
            rows = split_turns(rows) if dtype is None else rows.to(dtype)
            matrices.setdefault(name, static_sizes(rows.to(device)))
    return name
