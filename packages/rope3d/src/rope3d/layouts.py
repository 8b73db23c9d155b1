"""Layouts: which pair of channels turns with which axis, and how fast."""

from __future__ import annotations

from collections.abc import Sequence

from rope3d.rope import Pairing, Rope

__all__ = ["axial", "lumina", "mrope", "paper"]


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
    powers = [4 * k / head_dim for k in range(head_dim // 4)]
    owners = (0, 1) * len(powers)
    return _owned(owners, [power for power in powers for _ in range(2)], 2, base)


def axial(dims: Sequence[int], base: float = 10000.0, pairing: Pairing = "interleaved") -> Rope:
    """Give each axis its own block of channels, one block after another.

    Pair k of block j turns with axis j and frequency base^(-2k / dims[j]),
    k = 0 ... dims[j] / 2 - 1.

    Args:
        dims: Channels of each axis, each positive and even; their sum is the head dimension.
            One entry is ordinary 1-D rotary.
        base: Base of the geometric series of frequencies; positive.
        pairing: Which channels form a pair, as in `Rope`.

    Returns:
        A layout of `len(dims)` axes.

    Raises:
        ValueError: `dims` is empty or holds a number that is not positive and even, or `base` is
            not positive.

    Source:
        Su et al., arXiv 2104.09864, per axis; the layouts of `model_layouts` are of this kind.

    >>> axial((4, 2)).frequencies
    ((1.0, 0.01, 0.0), (0.0, 0.0, 1.0))
    """
    if not dims or any(dim <= 0 or dim % 2 for dim in dims):
        raise ValueError(
            f"dims are {tuple(dims)}; expected one positive even number of channels per axis; "
            "two channels make a pair, so round each to a multiple of 2"
        )
    owners = [axis for axis, dim in enumerate(dims) for _ in range(dim // 2)]
    powers = [2 * k / dim for dim in dims for k in range(dim // 2)]
    return _owned(owners, powers, len(dims), base, pairing)


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
    third = head_dim // 6
    powers = [6 * j / head_dim for j in range(1, third + 1)]
    return _owned([axis for axis in range(3) for _ in range(third)], powers * 3, 3, base)


def mrope(sections: Sequence[int], base: float = 1000000.0) -> Rope:
    """Share one series of frequencies among the axes, section by section (multimodal rotary).

    With n = sum(sections), pair k turns by base^(-k / n), k = 0 ... n - 1; the first sections[0]
    pairs turn with axis 0, the next sections[1] with axis 1, and so on.

    Args:
        sections: Pairs of each axis; head_dim is twice their sum.
        base: Base of the geometric series of frequencies; positive.

    Returns:
        A layout of `len(sections)` axes, half-split.

    Raises:
        ValueError: `sections` is empty or holds a number below 1, or `base` is not positive.

    Convention:
        Axes are (time, row, column) in Qwen2-VL. The later axes turn slower, as the series is not
        restarted; text has its index on every axis, which is then ordinary 1-D rotary.

    Source:
        Qwen2-VL, arXiv 2409.12191, and Qwen2.5-VL, arXiv 2502.13923: sections (16, 24, 24).

    >>> mrope((16, 24, 24)).head_dim
    128
    """
    if not sections or min(sections) < 1:
        raise ValueError(
            f"sections are {tuple(sections)}; expected one number of pairs >= 1 per axis, such as "
            "(16, 24, 24) for head_dim 128"
        )
    owners = [axis for axis, pairs in enumerate(sections) for _ in range(pairs)]
    powers = [k / len(owners) for k in range(len(owners))]
    return _owned(owners, powers, len(sections), base, "half")


def _check_head_dim(head_dim: int, multiple: int) -> None:
    if head_dim <= 0 or head_dim % multiple:
        raise ValueError(
            f"head_dim is {head_dim}; expected a positive multiple of {multiple}; "
            f"pad heads to {multiple * max(1, -(-head_dim // multiple))} channels or use `axial`"
        )


def _owned(
    owners: Sequence[int],
    powers: Sequence[float],
    axes: int,
    base: float,
    pairing: Pairing = "interleaved",
) -> Rope:
    """Turn pair m by axis `owners[m]` at base ** -powers[m]."""
    if not base > 0:
        raise ValueError(f"base is {base}; expected a positive number, such as 10000.0")
    own = [[owner == axis for owner in owners] for axis in range(axes)]
    return Rope(
        tuple(
            tuple(base**-p if mine else 0.0 for mine, p in zip(row, powers, strict=True))
            for row in own
        ),
        base=(float(base),) * axes,
        exponents=tuple(
            tuple(p if mine else 0.0 for mine, p in zip(row, powers, strict=True)) for row in own
        ),
        pairing=pairing,
    )
