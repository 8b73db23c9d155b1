"""Layouts: which pair of channels turns with which axis, and how fast."""

from __future__ import annotations

import math
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rope3d.compile_constant import compile_constant
from rope3d.rotation import Rotation

__all__ = ["Rope", "axial", "lumina", "paper"]

#: Frequencies on their device, `[axes, pairs]`, by layout; only ever added to.
_MATRICES: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Rope:
    """A rotary layout as data: one frequency for each axis and each pair of channels.

    angle[token, pair] = sum over axes of position[token, axis] * frequencies[axis][pair]

    An axis that does not turn a pair has frequency 0 there. A pair whose frequencies are all 0
    is left as it is (partial rotary).

    Args:
        frequencies: One row per axis, one number per pair; radians per unit of position.

    Raises:
        ValueError: There is no row, rows differ in length or are empty, or a frequency is not
            finite.

    Convention:
        Adjacent channels `(2m, 2m + 1)` form pair m, turned as the complex number
        `x[2m] + i x[2m + 1]` by `exp(i angle)`.

    Source:
        Su et al., RoFormer, arXiv 2104.09864, eq. 34; here with a sum over axes, which contains
        the axis-wise layouts and the mixed one of rope-vit (arXiv 2403.13298).

    >>> Rope(((1.0, 0.0), (0.0, 1.0))).rotation(torch.zeros(5, 2)).cos.shape
    torch.Size([5, 2])
    """

    frequencies: tuple[tuple[float, ...], ...]
    _spelled: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the rows form a matrix of finite numbers."""
        widths = [len(row) for row in self.frequencies]
        if not widths or min(widths) == 0 or len(set(widths)) > 1:
            raise ValueError(
                f"frequencies have rows of lengths {widths}; expected at least one row, all of the "
                "same length >= 1; give one row per axis with 0.0 where an axis turns no pair"
            )
        if not all(math.isfinite(value) for row in self.frequencies for value in row):
            raise ValueError("frequencies hold a value that is not finite; remove inf and nan")
        object.__setattr__(self, "_spelled", _spell(self.frequencies))

    @property
    def axes(self) -> int:
        """How many columns the positions must have."""
        return len(self.frequencies)

    @property
    def head_dim(self) -> int:
        """Channels of a head: two per pair."""
        return 2 * len(self.frequencies[0])

    def on_axes(self, columns: int, axes: Sequence[int]) -> Rope:
        """Read the axes of this layout from chosen columns of wider positions.

        Args:
            columns: How many columns the positions have.
            axes: For each axis of this layout, the column that holds it.

        Returns:
            The same rotation as a layout of `columns` axes; the other columns turn nothing.

        Raises:
            ValueError: `axes` does not name one column in `[0, columns)` per axis, or names one
                twice.

        >>> lumina(72).on_axes(3, (1, 2)).axes
        3
        """
        if len(axes) != self.axes or len(set(axes)) != len(axes):
            raise ValueError(
                f"axes are {tuple(axes)}; expected {self.axes} different columns, "
                "one for each axis of this layout"
            )
        if not all(0 <= axis < columns for axis in axes):
            raise ValueError(
                f"axes are {tuple(axes)}; expected each in [0, {columns}); "
                "raise `columns` or lower the axis"
            )
        still = (0.0,) * len(self.frequencies[0])
        rows = dict(zip(axes, self.frequencies, strict=True))
        return Rope(tuple(rows.get(column, still) for column in range(columns)))

    def rotation(self, positions: Tensor) -> Rotation:
        """Turn positions into the cosine and sine of each pair's angle.

        Nothing is read back from the device. Angles are computed in float64 (float32 on MPS,
        which has no float64), so that they stay exact at large positions.

        Args:
            positions: `[..., tokens, axes]`, any real dtype; fractions are allowed.

        Returns:
            The rotation, `[..., tokens, pairs]`.

        Raises:
            ValueError: `positions` does not end in `[tokens, axes]`.

        >>> lumina(8).rotation(torch.zeros(5, 2)).cos.shape
        torch.Size([5, 4])
        """
        if positions.ndim < 2 or positions.shape[-1] != self.axes:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}; expected "
                f"[..., tokens, {self.axes}]; for wider positions choose columns with `on_axes`"
            )
        dtype = torch.float32 if positions.device.type == "mps" else torch.float64
        if type(positions) is Tensor:
            matrix = _MATRICES[_on_device(self._spelled, dtype, positions.device)]
        else:  # a tensor subclass, such as the fake tensors of torch.export, must not be cached
            matrix = torch.tensor(self.frequencies, dtype=dtype, device=positions.device)
        # A sum over axes rather than a matrix product: a token's angle then has the same bits
        # whatever else is in the batch.
        angle = positions[..., :1].to(dtype) * matrix[0]
        for axis in range(1, self.axes):
            angle = angle + positions[..., axis : axis + 1].to(dtype) * matrix[axis]
        return Rotation(angle.cos().to(torch.float32), angle.sin().to(torch.float32))


# torch.compile guards a layout by one string, compared by value: no guard per frequency, and no
# recompilation for an equal layout.
@compile_constant
def _spell(frequencies: tuple[tuple[float, ...], ...]) -> str:
    """Write the frequencies as a string that reads back exactly."""
    return repr(frequencies)


@compile_constant
def _on_device(spelled: str, dtype: torch.dtype, device: torch.device) -> str:
    """Copy the frequencies to a device the first time; return the key of `_MATRICES`."""
    key = f"{device} {dtype} {spelled}"
    if key not in _MATRICES:
        with torch.inference_mode(False):  # an inference tensor could not serve a later backward
            matrix = torch.tensor(literal_eval(spelled), dtype=dtype, device=device)
            _MATRICES.setdefault(key, matrix)
    return key


def lumina(head_dim: int, base: float = 10000.0) -> Rope:
    """Lay out rows and columns as the released Lumina-Next does, alternating pair by pair.

    Pair 2k turns with the row and pair 2k + 1 with the column, both with frequency
    base^(-4k / head_dim), k = 0 ... head_dim / 4 - 1.

    Args:
        head_dim: Channels of a head; a multiple of 4.
        base: Base of the geometric series of frequencies; positive.

    Returns:
        A layout of 2 axes (row, column).

    Raises:
        ValueError: `head_dim` is not a positive multiple of 4, or `base` is not positive.

    Source:
        Alpha-VLLM/Lumina-T2X, `NextDiT.precompute_freqs_cis`; paper arXiv 2406.18583. The code
        counts k from 0 and interleaves the axes; the paper counts from 1 and concatenates them
        (see `paper`).

    >>> lumina(8).frequencies
    ((1.0, 0.0, 0.01, 0.0), (0.0, 1.0, 0.0, 0.01))
    """
    _check_head_dim(head_dim, 4)
    series = _series(head_dim // 4, 4 / head_dim, base)
    row = tuple(value for frequency in series for value in (frequency, 0.0))
    column = tuple(value for frequency in series for value in (0.0, frequency))
    return Rope((row, column))


def axial(dims: Sequence[int], base: float = 10000.0) -> Rope:
    """Give each axis its own block of channels, one block after another.

    Pair k of block j turns with axis j and frequency base^(-2k / dims[j]),
    k = 0 ... dims[j] / 2 - 1.

    Args:
        dims: Channels of each axis, each positive and even; their sum is the head dimension.
            One entry is ordinary 1-D rotary.
        base: Base of the geometric series of frequencies; positive.

    Returns:
        A layout of `len(dims)` axes.

    Raises:
        ValueError: `dims` is empty or holds a number that is not positive and even, or `base` is
            not positive.

    Source:
        Su et al., arXiv 2104.09864, per axis; as used by Wan 2.1 (44, 42, 42) and by
        Lumina-Image 2.0 (32, 32, 32).

    >>> axial((4, 2)).frequencies
    ((1.0, 0.01, 0.0), (0.0, 0.0, 1.0))
    """
    if not dims or any(dim <= 0 or dim % 2 for dim in dims):
        raise ValueError(
            f"dims are {tuple(dims)}; expected one positive even number of channels per axis; "
            "two channels make a pair, so round each to a multiple of 2"
        )
    return _blocks([_series(dim // 2, 2 / dim, base) for dim in dims])


def paper(head_dim: int, base: float = 10000.0) -> Rope:
    """Lay out (time, row, column) in thirds, as the Lumina-Next paper writes it.

    theta_j = base^(-6j / head_dim), j = 1 ... head_dim / 6, the same for each third.

    Args:
        head_dim: Channels of a head; a multiple of 6.
        base: Base of the geometric series of frequencies; positive.

    Returns:
        A layout of 3 axes (time, row, column), concatenated in this order.

    Raises:
        ValueError: `head_dim` is not a positive multiple of 6, or `base` is not positive.

    Convention:
        j counts from 1, so the fastest pair turns by base^(-6 / head_dim) and not by 1 radian;
        `axial` with three equal blocks is the same layout counted from 0.

    Source:
        Lumina-Next, arXiv 2406.18583, section on 3D RoPE.

    >>> [round(frequency, 4) for frequency in paper(12).frequencies[0]]
    [0.01, 0.0001, 0.0, 0.0, 0.0, 0.0]
    """
    _check_head_dim(head_dim, 6)
    series = _series(head_dim // 6, 6 / head_dim, base, first=1)
    return _blocks([series, series, series])


def _check_head_dim(head_dim: int, multiple: int) -> None:
    if head_dim <= 0 or head_dim % multiple:
        raise ValueError(
            f"head_dim is {head_dim}; expected a positive multiple of {multiple}; "
            f"pad heads to {multiple * max(1, -(-head_dim // multiple))} channels or use `axial`"
        )


def _series(pairs: int, step: float, base: float, first: int = 0) -> tuple[float, ...]:
    if not base > 0:
        raise ValueError(f"base is {base}; expected a positive number, such as 10000.0")
    return tuple(base ** -(step * k) for k in range(first, first + pairs))


def _blocks(blocks: Sequence[tuple[float, ...]]) -> Rope:
    """Concatenate one block of pairs per axis; zeros where another axis owns the pair."""
    return Rope(
        tuple(
            tuple(
                value if owner == axis else 0.0
                for owner, block in enumerate(blocks)
                for value in block
            )
            for axis in range(len(blocks))
        )
    )
