"""QK-norm and rotary embedding: normalise queries and keys and turn them, in one launch each way.

A group is the channels that share a mean and a deviation: all those of a token, or those of a head.
As many programs as the device runs at once walk over the groups of q and of k. A group is read once
and stays in registers until it is written, normalised and turned. Weights and biases stay there
from group to group, and so do the sums for their gradients: each program writes one row of partial
sums, and one sum over the programs, in a fixed order, finishes them without atomics.

Tiles must be powers of two. A group of 2304 channels (32 heads of 72) would fill 56 % of a tile of
4096, so its first 2048 channels are one tile and its last 256 another; likewise 576 is 512 and 64,
four groups at a time. Compiled for compute capability 9.0 with bfloat16, LayerNorm, weight and
bias, what a token costs (q of 2304 and k of 576), in lines of machine code times warps, is:

    ====================  =====  ======================  ============================
    tiles of a group      lines  registers of a thread   programs of a multiprocessor
    ====================  =====  ======================  ============================
    4096, forward          3400                     111                             2
    2048 + 256, forward    2020                     128                             4
    4096, backward         4580                     128                             2
    2048 + 256, backward   2810                     167                             3
    ====================  =====  ======================  ============================

A multiprocessor of an H100 issues at most four of them in a clock, in which its share of the
memory's 3.35 TB/s is some 14 bytes. The forward pass moves 11520 bytes for such a token, 800 clocks
of that share, so with one tile the 850 clocks of instructions would set the pace. The price is that
the last 256 channels are loaded 4 bytes by each thread, 128 by a warp, instead of 16. Where the
rest is more than a quarter of the first tile, and over heads, one tile holds the group. Reading a
group twice, the second time from a cache, would save registers but load and convert it twice.

For one token, with numbers of E bytes, C channels in q and k together, and S bytes of statistics
(8 for each group of LayerNorm, 4 for RMSNorm): forward reads C E and writes C E + S; backward reads
2 C E + S and writes C E; both read 4 bytes of table for each channel of a head. With Next-DiT's
2880 channels in bfloat16 that is 11824 bytes and 17584, the table included. Gradients to weights
and biases add 4 bytes for each channel of a group and program, written and read once, whatever the
number of tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nextdit_kernels import operators, rotary, served

__all__ = ["norm_rotate", "norm_rotate_backward_kernel", "norm_rotate_kernel", "why_not"]

# Elements of a tile, groups times channels, at least; elements of a thread; channels of a group, at
# most, rounded up to a power of two.
_TILE, _THREAD, _WIDE = 2048, 16, 8192

# Registers of a thread, forward and backward, for 16-bit tensors. Left to itself the compiler aims
# at fewer on some architectures, and spills. A multiprocessor has 2048 for each of the 32 threads
# of a warp, so 2048 / registers warps run at once. On compute capability 10.0 the backward pass
# over 1152, 5120 or 8192 channels still spills 16 to 32 bytes; more registers would cost programs.
_REGISTERS = {
    ("layer", "hidden"): (128, 168),
    ("rms", "hidden"): (128, 128),
    ("layer", "head"): (80, 128),
    ("rms", "head"): (64, 128),
}
_FORWARD, _BACKWARD = 0, 1


@triton.jit
def _groups(step: tl.tensor, blocks: tl.tensor, BLOCK_G: tl.constexpr):
    """Give the sample of a step, and its groups there: `[BLOCK_G]`, or a number if it is one."""
    o_g = (step % blocks) * BLOCK_G
    if BLOCK_G > 1:
        o_g += tl.arange(0, BLOCK_G)
    return (step // blocks).to(tl.int64), o_g


@triton.jit
def _rows(x: tl.tensor):
    """Put what belongs to groups beside their channels: `[BLOCK_G, 1]`, or the number."""
    if len(x.shape) == 1:
        return x[:, None]
    else:
        return x


@triton.jit
def _mean(
    x: tl.tensor,
    x_rest: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    REST: tl.constexpr,
):
    """Average over the channels of each group: `[BLOCK_G, 1]`, or a number if the group is one."""
    if BLOCK_G == 1:
        total = tl.sum(x)
        if REST:
            total += tl.sum(x_rest)
    else:
        total = tl.sum(x, 1)[:, None]
        if REST:
            total += tl.sum(x_rest, 1)[:, None]
    return total / WIDTH


@triton.jit
def _load(
    x_ptr: tl.tensor,
    strides: tl.tuple,
    i_b: tl.tensor,
    o_g: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    START: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load channels of groups as float32, `[BLOCK_G, BLOCK_C]`, whatever the strides."""
    s_b, s_t, s_h, s_d = strides
    o_c = START + tl.arange(0, BLOCK_C)
    o_h = tl.max_constancy(o_c // D, VECTOR)
    o_d = tl.max_contiguous(tl.multiple_of(o_c % D, VECTOR), VECTOR)
    row = tl.multiple_of(i_b * s_b + (o_g // GROUPS).to(tl.int64) * s_t, VECTOR)
    row += tl.multiple_of((o_g % GROUPS).to(tl.int64) * s_h, VECTOR)
    column = tl.multiple_of(o_h.to(tl.int64) * s_h, VECTOR) + o_d.to(tl.int64) * s_d
    p_x = x_ptr + _rows(row) + column[None, :]
    return tl.load(p_x, mask=_mask(o_c, o_g, T * GROUPS, WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _mask(o_c: tl.tensor, o_g: tl.tensor, groups: tl.tensor, width: tl.constexpr):
    # A block, not a number: the interpreter of Triton 3.9 refuses a number in a mask.
    o_c = o_c[None, :]
    return (o_c < width) & (tl.zeros_like(o_c) + _rows(o_g) < groups)


@triton.jit
def _load_table(
    x_ptr: tl.tensor,
    strides: tl.tuple,
    i_b: tl.tensor,
    o_g: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    START: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load the cosines or sines of the pairs among these channels, `[BLOCK_G, BLOCK_C / 2]`."""
    s_b, s_t, s_p = strides
    o_c = START // 2 + tl.arange(0, BLOCK_C // 2)
    o_p = tl.max_contiguous(tl.multiple_of(o_c % (D // 2), VECTOR), VECTOR)
    row = tl.multiple_of(i_b * s_b + (o_g // GROUPS).to(tl.int64) * s_t, VECTOR)
    p_x = x_ptr + _rows(row) + (o_p.to(tl.int64) * s_p)[None, :]
    return tl.load(p_x, mask=_mask(o_c, o_g, T * GROUPS, WIDTH // 2), other=0.0)


@triton.jit
def _load_tile(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    s_x: tl.tuple,
    s_cos: tl.tuple,
    s_sin: tl.tuple,
    i_b: tl.tensor,
    o_g: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    START: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load channels of groups, and the cosines and sines of their pairs."""
    # fmt: off
    x = _load(x_ptr, s_x, i_b, o_g, T, D, GROUPS, WIDTH, VECTOR, START, BLOCK_C)
    cos = _load_table(
        cos_ptr, s_cos, i_b, o_g, T, D, GROUPS, WIDTH, TABLE_VECTOR, START, BLOCK_C
    )
    sin = _load_table(
        sin_ptr, s_sin, i_b, o_g, T, D, GROUPS, WIDTH, TABLE_VECTOR, START, BLOCK_C
    )
    # fmt: on
    return x, cos, sin


@triton.jit
def _load_weight(w_ptr: tl.tensor, WIDTH: tl.constexpr, START: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load the weights or biases of these channels as float32, `[1, BLOCK_C]`."""
    o_c = START + tl.arange(0, BLOCK_C)[None, :]
    return tl.load(w_ptr + o_c, mask=o_c < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _center(
    x: tl.tensor, mean: tl.tensor, WIDTH: tl.constexpr, START: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Take the mean away where there are channels."""
    o_c = START + tl.arange(0, BLOCK_C)[None, :]
    return tl.where(o_c < WIDTH, x - mean, 0.0)


@triton.jit
def _turn(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Turn neighbouring channels."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_G, BLOCK_C // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (BLOCK_G, BLOCK_C))


@triton.jit
def _store(
    y_ptr: tl.tensor,
    y: tl.tensor,
    i_b: tl.tensor,
    o_g: tl.tensor,
    T: tl.tensor,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store channels of groups, rounded, into a contiguous output."""
    o_c = START + tl.arange(0, BLOCK_C)
    p_y = y_ptr + _rows((i_b * T * GROUPS + o_g) * WIDTH) + o_c[None, :]
    tl.store(p_y, y, mask=_mask(o_c, o_g, T * GROUPS, WIDTH))


@triton.jit
def _forward_groups(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    w_ptr: tl.tensor,
    b_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    s_x: tl.tuple,
    s_cos: tl.tuple,
    s_sin: tl.tuple,
    i_p: tl.tensor,
    programs: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    eps: tl.tensor,
    CENTER: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Normalise and turn the groups of one tensor that program i_p of `programs` has to walk."""
    w, w_rest, b, b_rest = 1.0, 1.0, 0.0, 0.0
    if w_ptr is not None:
        w = _load_weight(w_ptr, WIDTH, 0, MAIN)
        if REST:
            w_rest = _load_weight(w_ptr, WIDTH, MAIN, REST)
    if b_ptr is not None:
        b = _load_weight(b_ptr, WIDTH, 0, MAIN)
        if REST:
            b_rest = _load_weight(b_ptr, WIDTH, MAIN, REST)
    blocks = (T * GROUPS + BLOCK_G - 1) // BLOCK_G
    for step in tl.range(i_p, B * blocks, programs):
        i_b, o_g = _groups(step, blocks, BLOCK_G)
        # fmt: off
        x, cos, sin = _load_tile(
            x_ptr, cos_ptr, sin_ptr, s_x, s_cos, s_sin, i_b, o_g, T,
            D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, 0, MAIN,
        )
        x_rest, cos_rest, sin_rest = x, cos, sin  # not used where there is no rest
        if REST:
            x_rest, cos_rest, sin_rest = _load_tile(
                x_ptr, cos_ptr, sin_ptr, s_x, s_cos, s_sin, i_b, o_g, T,
                D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, MAIN, REST,
            )
        # fmt: on
        p_stats = stats_ptr + i_b * T * GROUPS + _rows(o_g)
        m_stats = _rows(o_g) < T * GROUPS
        if CENTER:
            mean = _mean(x, x_rest, WIDTH, BLOCK_G, REST)
            tl.store(p_stats + B.to(tl.int64) * T * GROUPS, mean, mask=m_stats)
            x = _center(x, mean, WIDTH, 0, MAIN)
            if REST:
                x_rest = _center(x_rest, mean, WIDTH, MAIN, REST)
        rstd = tl.rsqrt(_mean(x * x, x_rest * x_rest, WIDTH, BLOCK_G, REST) + eps)
        tl.store(p_stats, rstd, mask=m_stats)
        y = x * rstd * w
        if b_ptr is not None:
            y += b
        y = _turn(y, cos, sin, BLOCK_G, MAIN)
        _store(y_ptr, y, i_b, o_g, T, GROUPS, WIDTH, 0, MAIN)
        if REST:
            y_rest = x_rest * rstd * w_rest
            if b_ptr is not None:
                y_rest += b_rest
            y_rest = _turn(y_rest, cos_rest, sin_rest, BLOCK_G, REST)
            _store(y_ptr, y_rest, i_b, o_g, T, GROUPS, WIDTH, MAIN, REST)


# Lengths and strides are not specialised, so that another resolution does not compile the kernels
# again; only a channel stride of 1 is.
@triton.jit(
    do_not_specialize=[
        *("P_Q", "B", "T", "q_sb", "q_st", "q_sh", "k_sb", "k_st", "k_sh"),
        *("cos_sb", "cos_st", "sin_sb", "sin_st"),
    ]
)
def norm_rotate_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    q_stats_ptr: tl.tensor,
    k_stats_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    q_bias_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    k_bias_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    eps: tl.tensor,
    P_Q: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    q_sb: tl.tensor,
    q_st: tl.tensor,
    q_sh: tl.tensor,
    q_sd: tl.tensor,
    k_sb: tl.tensor,
    k_st: tl.tensor,
    k_sh: tl.tensor,
    k_sd: tl.tensor,
    cos_sb: tl.tensor,
    cos_st: tl.tensor,
    cos_sp: tl.tensor,
    sin_sb: tl.tensor,
    sin_st: tl.tensor,
    sin_sp: tl.tensor,
    CENTER: tl.constexpr,
    D: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    Q_MAIN: tl.constexpr,
    Q_REST: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
):
    """Normalise and turn q and k into contiguous outputs, and write 1 / deviation and the mean.

    Of all programs the first P_Q walk over the groups of q, the others over those of k. A tensor
    has Q_GROUPS groups of Q_WIDTH channels in a token: 1 of H * D, or H of D.
    """
    i_p = tl.program_id(0)
    s_cos, s_sin = (cos_sb, cos_st, cos_sp), (sin_sb, sin_st, sin_sp)
    # fmt: off
    if i_p < P_Q:
        _forward_groups(
            q_ptr, q_out_ptr, q_stats_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr,
            (q_sb, q_st, q_sh, q_sd), s_cos, s_sin, i_p, P_Q, B, T, eps, CENTER,
            D, Q_GROUPS, Q_WIDTH, VECTOR, TABLE_VECTOR, Q_BLOCK, Q_MAIN, Q_REST,
        )
    else:
        _forward_groups(
            k_ptr, k_out_ptr, k_stats_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr,
            (k_sb, k_st, k_sh, k_sd), s_cos, s_sin, i_p - P_Q, tl.num_programs(0) - P_Q, B, T, eps,
            CENTER, D, K_GROUPS, K_WIDTH, VECTOR, TABLE_VECTOR, K_BLOCK, K_MAIN, K_REST,
        )
    # fmt: on


@triton.jit
def _load_gradient(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    s_dy: tl.tuple,
    s_x: tl.tuple,
    s_cos: tl.tuple,
    s_sin: tl.tuple,
    mean: tl.tensor,
    rstd: tl.tensor,
    i_b: tl.tensor,
    o_g: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    START: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give the normalised x, and dy turned back by the opposite angle."""
    # fmt: off
    x, cos, sin = _load_tile(
        x_ptr, cos_ptr, sin_ptr, s_x, s_cos, s_sin, i_b, o_g, T,
        D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, START, BLOCK_C,
    )
    # fmt: on
    dy = _load(dy_ptr, s_dy, i_b, o_g, T, D, GROUPS, WIDTH, VECTOR, START, BLOCK_C)
    return (x - mean) * rstd, _turn(dy, cos, -sin, BLOCK_G, BLOCK_C)


@triton.jit
def _store_sum(
    sum_ptr: tl.tensor,
    x: tl.tensor,
    i_p: tl.tensor,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store the sum over groups as part of row i_p of the partial sums."""
    o_c = START + tl.arange(0, BLOCK_C)
    tl.store(sum_ptr + i_p.to(tl.int64) * WIDTH + o_c, tl.sum(x, 0), mask=o_c < WIDTH)


@triton.jit
def _backward_groups(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    w_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    db_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    s_dy: tl.tuple,
    s_x: tl.tuple,
    s_cos: tl.tuple,
    s_sin: tl.tuple,
    i_p: tl.tensor,
    programs: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    CENTER: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Write dx of the groups of one tensor that program i_p has to walk, and its sums of dw and db.

    With n the normalised x and g = w times dy turned back, each mean over a group:
    dx = (g - n mean(g n) - mean(g)) / deviation, the last mean of LayerNorm alone.
    """
    w, w_rest = 1.0, 1.0
    if w_ptr is not None:
        w = _load_weight(w_ptr, WIDTH, 0, MAIN)
        if REST:
            w_rest = _load_weight(w_ptr, WIDTH, MAIN, REST)
    dw = tl.zeros((BLOCK_G, MAIN), tl.float32)
    db = tl.zeros((BLOCK_G, MAIN), tl.float32)
    dw_rest = tl.zeros((BLOCK_G, REST if REST else MAIN), tl.float32)
    db_rest = tl.zeros((BLOCK_G, REST if REST else MAIN), tl.float32)
    blocks = (T * GROUPS + BLOCK_G - 1) // BLOCK_G
    for step in tl.range(i_p, B * blocks, programs):
        i_b, o_g = _groups(step, blocks, BLOCK_G)
        p_stats = stats_ptr + i_b * T * GROUPS + _rows(o_g)
        m_stats = _rows(o_g) < T * GROUPS
        rstd = tl.load(p_stats, mask=m_stats, other=0.0)
        mean = 0.0
        if CENTER:
            mean = tl.load(p_stats + B.to(tl.int64) * T * GROUPS, mask=m_stats, other=0.0)
        # fmt: off
        x, g = _load_gradient(
            dy_ptr, x_ptr, cos_ptr, sin_ptr, s_dy, s_x, s_cos, s_sin, mean, rstd, i_b, o_g, T,
            D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, 0, BLOCK_G, MAIN,
        )
        x_rest, g_rest = x, g  # not used where there is no rest
        if REST:
            x_rest, g_rest = _load_gradient(
                dy_ptr, x_ptr, cos_ptr, sin_ptr, s_dy, s_x, s_cos, s_sin, mean, rstd, i_b, o_g, T,
                D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, MAIN, BLOCK_G, REST,
            )
        # fmt: on
        if dw_ptr is not None:
            dw += g * x
            if REST:
                dw_rest += g_rest * x_rest
        if db_ptr is not None:
            db += g
            if REST:
                db_rest += g_rest
        g *= w
        g_rest *= w_rest
        along = _mean(g * x, g_rest * x_rest, WIDTH, BLOCK_G, REST)
        dx, dx_rest = g - x * along, g_rest - x_rest * along
        if CENTER:
            shift = _mean(g, g_rest, WIDTH, BLOCK_G, REST)
            dx, dx_rest = dx - shift, dx_rest - shift
        _store(dx_ptr, dx * rstd, i_b, o_g, T, GROUPS, WIDTH, 0, MAIN)
        if REST:
            _store(dx_ptr, dx_rest * rstd, i_b, o_g, T, GROUPS, WIDTH, MAIN, REST)
    if dw_ptr is not None:
        _store_sum(dw_ptr, dw, i_p, WIDTH, 0, MAIN)
        if REST:
            _store_sum(dw_ptr, dw_rest, i_p, WIDTH, MAIN, REST)
    if db_ptr is not None:
        _store_sum(db_ptr, db, i_p, WIDTH, 0, MAIN)
        if REST:
            _store_sum(db_ptr, db_rest, i_p, WIDTH, MAIN, REST)


@triton.jit(
    do_not_specialize=[
        *("P_Q", "B", "T", "dq_sb", "dq_st", "dq_sh", "dk_sb", "dk_st", "dk_sh"),
        *("q_sb", "q_st", "q_sh", "k_sb", "k_st", "k_sh"),
        *("cos_sb", "cos_st", "sin_sb", "sin_st"),
    ]
)
def norm_rotate_backward_kernel(
    dq_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    q_stats_ptr: tl.tensor,
    k_stats_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    q_weight_sums_ptr: tl.tensor,
    q_bias_sums_ptr: tl.tensor,
    k_weight_sums_ptr: tl.tensor,
    k_bias_sums_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    P_Q: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    dq_sb: tl.tensor,
    dq_st: tl.tensor,
    dq_sh: tl.tensor,
    dq_sd: tl.tensor,
    dk_sb: tl.tensor,
    dk_st: tl.tensor,
    dk_sh: tl.tensor,
    dk_sd: tl.tensor,
    q_sb: tl.tensor,
    q_st: tl.tensor,
    q_sh: tl.tensor,
    q_sd: tl.tensor,
    k_sb: tl.tensor,
    k_st: tl.tensor,
    k_sh: tl.tensor,
    k_sd: tl.tensor,
    cos_sb: tl.tensor,
    cos_st: tl.tensor,
    cos_sp: tl.tensor,
    sin_sb: tl.tensor,
    sin_st: tl.tensor,
    sin_sp: tl.tensor,
    CENTER: tl.constexpr,
    D: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    Q_MAIN: tl.constexpr,
    Q_REST: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
):
    """Write the gradients to q and k, and each program's sums of those to weights and biases.

    The programs are shared out as those of `norm_rotate_kernel`; a pointer to sums is None where
    nobody asked.
    """
    i_p = tl.program_id(0)
    s_cos, s_sin = (cos_sb, cos_st, cos_sp), (sin_sb, sin_st, sin_sp)
    # fmt: off
    if i_p < P_Q:
        _backward_groups(
            dq_ptr, q_ptr, q_out_ptr, q_stats_ptr, q_weight_ptr, q_weight_sums_ptr,
            q_bias_sums_ptr, cos_ptr, sin_ptr, (dq_sb, dq_st, dq_sh, dq_sd),
            (q_sb, q_st, q_sh, q_sd), s_cos, s_sin, i_p, P_Q, B, T, CENTER,
            D, Q_GROUPS, Q_WIDTH, VECTOR, TABLE_VECTOR, Q_BLOCK, Q_MAIN, Q_REST,
        )
    else:
        _backward_groups(
            dk_ptr, k_ptr, k_out_ptr, k_stats_ptr, k_weight_ptr, k_weight_sums_ptr,
            k_bias_sums_ptr, cos_ptr, sin_ptr, (dk_sb, dk_st, dk_sh, dk_sd),
            (k_sb, k_st, k_sh, k_sd), s_cos, s_sin, i_p - P_Q, tl.num_programs(0) - P_Q, B, T,
            CENTER, D, K_GROUPS, K_WIDTH, VECTOR, TABLE_VECTOR, K_BLOCK, K_MAIN, K_REST,
        )
    # fmt: on


def why_not(q: Tensor, k: Tensor, *, over: str = "hidden") -> str | None:
    """Say why the kernels cannot serve these tensors, or None if they can.

    Args:
        q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        over: As `norm_rotate` takes it.

    Returns:
        A reason that names what is served, or None.

    >>> why_not(torch.zeros(5, 2, 7), torch.zeros(5, 2, 7).half())
    'q is torch.float32 and k torch.float16; the kernel takes one of bfloat16, float16, float32'
    """
    reason = served.why_not(norm_rotate_kernel, q=q, k=k)
    if reason is not None:
        return reason
    if q.shape[-1] % 2 or q.shape[-1] > rotary.MAX_HEAD_DIM:
        return f"head_dim is {q.shape[-1]}; the kernel takes even ones up to {rotary.MAX_HEAD_DIM}"
    for name, x in {"q": q, "k": k}.items():
        if _width(x, over) > _WIDE:
            return f"{name} has {_width(x, over)} channels in a token; the kernel takes {_WIDE}"
    return None


def norm_rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None,
    k_bias: Tensor | None = None,
    norm: str = "layer",
    over: str = "hidden",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys and rotate them, in one launch.

    n = (x - mean) / sqrt(mean((x - mean)^2) + eps) for "layer", x / sqrt(mean(x^2) + eps) for "rms"
    y = rotate(n weight + bias, cos, sin), as `nextdit_kernels.rotate` does

    The arithmetic is float32 and the result is rounded once; PyTorch's two steps in bfloat16 round
    after the norm too. Out of place; differentiable once, in q, k, weights and biases but not in
    cos and sin, keeping the inputs and 4 ("rms") or 8 ("layer") bytes for each group; compiles
    without graph breaks. The gradients do not depend on the order in which programs run.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[tokens, heads, head_dim]`; bfloat16,
            float16 or float32, any strides, head_dim even and at most 256.
        k: As `q`, with its own number of heads.
        cos: `[tokens, pairs]`, or for dense q `[batch or 1, tokens, pairs]`, any strides; float32.
        sin: As `cos`.
        q_weight: `[heads * head_dim]` for over="hidden", `[head_dim]` for over="head"; float32 or
            the dtype of q; None is 1.
        q_bias: As `q_weight`, for norm="layer" alone; None is 0.
        k_weight: As `q_weight`, with the heads of k.
        k_bias: As `q_bias`, with the heads of k.
        norm: "layer" or "rms".
        over: What shares a mean and a deviation: "hidden", all channels of a token, at most 8192,
            or "head", those of each head.
        eps: Added to the mean square.

    Returns:
        The rotated `(q, k)`, contiguous, same shapes and dtypes.

    Raises:
        ValueError: The shapes or dtypes do not fit one another, norm or over is another word, there
            is a bias with norm="rms", the kernels do not serve such tensors (see `why_not`), or cos
            or sin requires a gradient.

    Convention:
        The pairs and the direction of `nextdit_kernels.rotate`.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450), eq. 4; Zhang and Sennrich, Root Mean
        Square Layer Normalization (arXiv 1910.07467), eq. 4, with eps under the root as PyTorch has
        it; Su et al., RoFormer (arXiv 2104.09864), eq. 34. Over the hidden size as in Lumina-Next
        (arXiv 2406.18583).

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> x = torch.tensor([[[3.0, 3.0]]], device=device)  # one token, one head, one pair
    >>> cos, sin = torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)
    >>> y, _ = norm_rotate(x, x, cos, sin, q_weight=None, k_weight=None, norm="rms")
    >>> y.round(decimals=3).tolist()
    [[[-1.0, 1.0]]]
    """
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(
            "cos or sin requires a gradient, which the kernel does not compute; detach them, or "
            "normalise with PyTorch and rotate with the backend 'reference' of rope3d to learn "
            "frequencies or positions"
        )
    outputs = _norm_rotate(
        q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, norm, over, float(eps)
    )
    return outputs[0], outputs[1]


def _width(x: Tensor, over: str) -> int:
    """Count the channels of a group."""
    return x.shape[-1] * (x.shape[-2] if over == "hidden" else 1)


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: str,
    over: str,
    q_parameters: dict[str, Tensor | None],
    k_parameters: dict[str, Tensor | None],
) -> None:
    """Refuse whatever would make a kernel read outside its tensors or misread them."""
    if norm not in ("layer", "rms") or over not in ("hidden", "head"):
        raise ValueError(
            f"norm is {norm!r} and over {over!r}; expected norm 'layer' or 'rms', and over "
            "'hidden' or 'head'"
        )
    rotary.check(q, k, cos, sin)
    for x, parameters in ((q, q_parameters), (k, k_parameters)):
        for name, parameter in parameters.items():
            if parameter is None:
                continue
            if norm == "rms" and name.endswith("bias"):
                raise ValueError(f"{name} is given, but norm='rms' has no bias; leave it out")
            if parameter.shape != (_width(x, over),):
                raise ValueError(
                    f"{name} {tuple(parameter.shape)} does not fit; expected "
                    f"[{_width(x, over)}] for over={over!r}"
                )
            if parameter.dtype not in (torch.float32, x.dtype) or parameter.device != x.device:
                raise ValueError(
                    f"{name} is {parameter.dtype} on {parameter.device}; expected float32 or "
                    f"{x.dtype} on {x.device}"
                )


def _power_of_2(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _tiles(width: int) -> tuple[int, int]:
    """Cut the channels of a group into a tile and the rest, 0 where one tile is little larger."""
    whole = max(16, _power_of_2(width))
    rest = _power_of_2(width - whole // 2)
    if width <= rotary.MAX_HEAD_DIM or width == whole or rest > whole // 8:
        return whole, 0
    return whole // 2, rest


@cache
def _processors(device: torch.device) -> int:
    """Count the multiprocessors; on the CPU two, so that programs and their steps are several."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(
    q: Tensor, k: Tensor, norm: str, over: str, direction: int
) -> tuple[int, int, tuple[int, int], dict[str, Any]]:
    """Share the groups out among as many programs as the device runs at once.

    Returns:
        The programs of q and those of k; batch and tokens; the kernel's constants and options.
    """
    batch = q.shape[0] if q.ndim == 4 else 1
    tokens, width = q.shape[-3], q.shape[-1]
    tiles = {"Q": _tiles(_width(q, over)), "K": _tiles(_width(k, over))}
    block = max(_TILE, tiles["Q"][0], tiles["K"][0])
    warps = block // (32 * _THREAD)
    registers = _REGISTERS[norm, over][direction] * q.itemsize // 2
    registers = min(registers, 2048 // warps, 255)
    constants: dict[str, Any] = {"CENTER": norm == "layer", "D": width}
    steps = []
    for name, x in {"Q": q, "K": k}.items():
        main, rest = tiles[name]
        groups = 1 if over == "hidden" else max(1, x.shape[-2])
        constants[f"{name}_GROUPS"] = groups
        constants[f"{name}_WIDTH"] = _width(x, over)
        constants[f"{name}_BLOCK"] = block // main
        constants[f"{name}_MAIN"] = main
        constants[f"{name}_REST"] = rest
        blocks = -(-tokens * groups // (block // main))
        steps.append(batch * blocks if x.shape[-2] and width else 0)
    programs = min(sum(steps), _processors(q.device) * max(1, 2048 // registers // warps))
    q_programs = round(programs * steps[0] / max(1, sum(steps)))
    q_programs = min(max(q_programs, min(1, steps[0])), programs - min(1, steps[1]))
    options = {"num_warps": warps, "maxnreg": registers}
    return q_programs, programs - q_programs, (batch, tokens), constants | options


def _hints(
    x: tuple[tuple[int, ...], ...], tables: tuple[tuple[int, ...], ...], width: int, itemsize: int
) -> dict[str, int]:
    """Count the neighbours that one load may take, by the strides of tensors and of tables."""
    return {
        "VECTOR": served.aligned(width, itemsize, *x),
        "TABLE_VECTOR": served.aligned(width // 2, 4, *tables),
    }


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    over: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel; the operator's implementation on CUDA and in the interpreter."""
    outputs = _fake(q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, norm, over, eps)
    reason = why_not(q, k, over=over)
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot take these tensors: {reason}")
    q_programs, k_programs, sizes, constants = _plan(q, k, norm, over, _FORWARD)
    if q_programs + k_programs == 0:
        return outputs
    s_x = rotary.strides(q, 4), rotary.strides(k, 4)
    s_tables = rotary.strides(cos, 3), rotary.strides(sin, 3)
    constants |= _hints(s_x, s_tables, q.shape[-1], q.itemsize)
    parameters = [_contiguous(x) for x in (q_weight, q_bias, k_weight, k_bias)]
    arguments: tuple[Any, ...] = (q, k, *outputs, *parameters, cos, sin, eps, q_programs, *sizes)
    numbers = [number for stride in (*s_x, *s_tables) for number in stride]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        norm_rotate_kernel[(q_programs + k_programs,)](*arguments, *numbers, **constants)
    return outputs


def _outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _statistics(x: Tensor, norm: str, over: str) -> Tensor:
    """Make room for 1 / deviation of each group, and for its mean."""
    groups = x.shape[:-2] if over == "hidden" else x.shape[:-1]
    return x.new_empty((2 if norm == "layer" else 1, *groups), dtype=torch.float32)


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    over: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check as the launch does, and give the outputs without numbers."""
    q_parameters = {"q_weight": q_weight, "q_bias": q_bias}
    k_parameters = {"k_weight": k_weight, "k_bias": k_bias}
    _check(q, k, cos, sin, norm, over, q_parameters, k_parameters)
    q_out, k_out = _outputs(q, k)
    return q_out, k_out, _statistics(q, norm, over), _statistics(k, norm, over)


def _launch_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_stats: Tensor,
    k_stats: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    over: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    _check_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, norm, over)
    reason = why_not(q, k, over=over) or why_not(grad_q, grad_k, over=over)
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot take these tensors: {reason}")
    outputs = _outputs(q, k)
    q_programs, k_programs, sizes, constants = _plan(q, k, norm, over, _BACKWARD)
    sums = [
        _sums(x, programs, _width(x, over)) if asked else None
        for x, programs, asked in zip(
            (q, q, k, k), (q_programs, q_programs, k_programs, k_programs), wanted, strict=True
        )
    ]
    if q_programs + k_programs:
        s_x = tuple(rotary.strides(x, 4) for x in (grad_q, grad_k, q, k))
        s_tables = rotary.strides(cos, 3), rotary.strides(sin, 3)
        constants |= _hints(s_x, s_tables, q.shape[-1], q.itemsize)
        inputs = (grad_q, grad_k, q, k, *outputs, q_stats, k_stats)
        weights = (_contiguous(q_weight), _contiguous(k_weight))
        arguments: tuple[Any, ...] = (*inputs, *weights, *sums, cos, sin, q_programs, *sizes)
        numbers = [number for stride in (*s_x, *s_tables) for number in stride]
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            norm_rotate_backward_kernel[(q_programs + k_programs,)](
                *arguments, *numbers, **constants
            )
    return (*outputs, *(_sums(q, 0) if each is None else each.sum(0) for each in sums))


def _sums(x: Tensor, *shape: int) -> Tensor:
    """Make room for sums in float32."""
    return x.new_empty(shape, dtype=torch.float32)


def _check_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    over: str,
) -> None:
    _check(q, k, cos, sin, norm, over, {"q_weight": q_weight}, {"k_weight": k_weight})
    if grad_q.shape != q.shape or grad_k.shape != k.shape:
        raise ValueError(
            f"grad_q {tuple(grad_q.shape)} and grad_k {tuple(grad_k.shape)} do not fit q "
            f"{tuple(q.shape)} and k {tuple(k.shape)}; expected the same shapes"
        )


def _fake_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_stats: Tensor,
    k_stats: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    over: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Check as the launch does, and give gradients without numbers, empty where nobody asked."""
    _check_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, norm, over)
    widths = (
        _width(x, over) if asked else 0 for x, asked in zip((q, q, k, k), wanted, strict=True)
    )
    return (*_outputs(q, k), *(_sums(q, width) for width in widths))


class _Context(FunctionCtx):
    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    words: tuple[str, str]
    dtypes: list[torch.dtype | None]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, cos, sin, q_weight, _, k_weight, _, norm, over, _ = inputs
    ctx.words = norm, over
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[4:8]]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, *output[2:], cos, sin, q_weight, k_weight)


def _backward(
    ctx: _Context, grad_q: Tensor | None, grad_k: Tensor | None, *_: object
) -> tuple[Tensor | None, ...]:
    q, k, *kept = ctx.saved_tensors
    # Written out where nobody used an output: one number for all would slow the loads of the rest.
    grad_q = torch.zeros_like(q) if grad_q is None else grad_q
    grad_k = torch.zeros_like(k) if grad_k is None else grad_k
    wanted = list(ctx.needs_input_grad[4:8])
    grads = _norm_rotate_backward(grad_q, grad_k, q, k, *kept, *ctx.words, wanted)
    parameters = (
        grad.to(dtype) if asked and dtype is not None else None
        for grad, dtype, asked in zip(grads[2:], ctx.dtypes, wanted, strict=True)
    )
    return (*grads[:2], None, None, *parameters, None, None, None)


_norm_rotate = operators.define(
    "norm_rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? q_bias, "
    "Tensor? k_weight, Tensor? k_bias, str norm, str over, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_norm_rotate_backward = operators.define(
    "norm_rotate_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_stats, "
    "Tensor k_stats, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, str norm, "
    "str over, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
