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

import triton
import triton.language as tl

__all__ = ["norm_rotate_backward_kernel", "norm_rotate_kernel"]


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
