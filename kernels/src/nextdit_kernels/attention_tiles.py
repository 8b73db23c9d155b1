"""What the kernels of attention share: where a program works, and how it reads and writes rows.

A head of 72 channels is a block of 64 and a tail of 16, not one block of 128: Triton's blocks are
powers of two, and 80 channels cost 0.63 times the matrix work of 128.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

__all__ = [
    "has_narrow_tail",
    "head_of_sample",
    "load_rows",
    "split_head",
    "store_rows",
    "where_to_work",
]

# The least inner dimension of a product of matrices on a GPU.
_NARROWEST = 16


@lru_cache
def split_head(head_dim: int) -> tuple[int, int]:
    """Split the channels of a head into a main block and a tail, both powers of two from 16 on.

    Returns:
        Widths of the main block and of the tail, which is narrower, or 0. Together they may be a
        little wider than the head.

    >>> [split_head(head_dim) for head_dim in (64, 72, 80, 96, 104, 128)]
    [(64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0)]
    """
    whole = max(_NARROWEST, int(triton.next_power_of_2(head_dim)))
    main = whole // 2
    tail = max(_NARROWEST, int(triton.next_power_of_2(head_dim - main)))
    return (whole, 0) if tail >= main else (main, tail)


def has_narrow_tail(head_dim: int) -> bool:
    """Tell whether the tail has the least width, which asks for few warps.

    A row of such a tail is two loads of 16 bytes in 16-bit types and four in float32, so a block of
    64 rows feeds four warps or eight. With more, Triton gives each thread a part of these 16 bytes.

    >>> [has_narrow_tail(head_dim) for head_dim in (64, 72, 80, 96)]
    [False, True, True, False]
    """
    return split_head(head_dim)[1] == _NARROWEST


@triton.jit
def where_to_work(
    cu_ptr: tl.tensor, i: tl.tensor, T: tl.tensor, SAMPLES: tl.tensor, BLOCK: tl.constexpr
):
    """Give the sample of tile i, its first packed row, its length, and the tile's first row in it.

    Dense samples, cu_ptr None, have T rows each. Packed ones lie between the numbers at cu_ptr, and
    sample s owns the tiles from cu[s] // BLOCK + s on: at least as many as it needs, found without
    a table, and in all TOTAL // BLOCK + SAMPLES.
    """
    if cu_ptr is None:
        tiles = (T + BLOCK - 1) // BLOCK
        i_b = i // tiles
        start = i_b * 0
        length = T
        first = (i - i_b * tiles) * BLOCK
    else:
        i_b = i * 0
        high = i_b + SAMPLES
        while i_b + 1 < high:
            middle = (i_b + high) // 2
            before = tl.load(cu_ptr + middle) // BLOCK + middle <= i
            i_b = tl.where(before, middle, i_b)
            high = tl.where(before, high, middle)
        start = tl.load(cu_ptr + i_b)
        length = tl.load(cu_ptr + i_b + 1) - start
        first = (i - start // BLOCK - i_b) * BLOCK
    return i_b.to(tl.int64), start, length, first


@triton.jit
def head_of_sample(
    i_b: tl.tensor,
    i_h: tl.tensor,
    start: tl.tensor,
    s_b: tl.tensor,
    s_t: tl.tensor,
    s_h: tl.tensor,
    cu_ptr: tl.tensor,
    VECTOR: tl.constexpr,
):
    """Give the offset of a head in the first row of a sample, which every stride keeps aligned."""
    # No sum of both with a 0 in one of them: the compiler would fold it, and the hint with it.
    if cu_ptr is None:
        return tl.multiple_of(i_b * s_b + i_h * s_h, VECTOR)
    else:
        return tl.multiple_of(i_h * s_h + start.to(tl.int64) * s_t, VECTOR)


@triton.jit
def load_rows(
    p_row: tl.tensor,
    m_row: tl.tensor,
    s_d: tl.tensor,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    EVERY_ROW: tl.constexpr,
):
    """Load WIDTH channels from FIRST on, 0 beyond D and, unless EVERY_ROW, where m_row is not."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p = p_row[:, None] + (o_d.to(tl.int64) * s_d)[None, :]
    if FIRST + WIDTH > D:
        m = (o_d < D)[None, :] & (m_row[:, None] | EVERY_ROW)
        return tl.load(p, mask=m, other=0.0)
    if EVERY_ROW:
        return tl.load(p)
    return tl.load(p, mask=m_row[:, None], other=0.0)


@triton.jit
def store_rows(
    x_ptr: tl.tensor,
    row: tl.tensor,
    x: tl.tensor,
    m_row: tl.tensor,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store WIDTH channels from FIRST on, rounded, into rows of D contiguous ones."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p = x_ptr + (row * D)[:, None] + o_d[None, :]
    m = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p, x, mask=m)
