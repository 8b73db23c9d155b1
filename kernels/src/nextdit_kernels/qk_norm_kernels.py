"""QK-norm and rotary embedding: normalise queries and keys and turn them, in one launch each way.

A group is the channels that share a mean and a deviation: all those of a token, or those of a head.
As many programs as the device runs at once walk over the groups of q and of k. A group is read once
and stays in registers until it is written, normalised and turned. So do the sums for the gradients
of weights and biases, from group to group: each program writes one row of partial sums, and one sum
over the programs, in a fixed order, finishes them without atomics.

Tiles must be powers of two. A group of 2304 channels (32 heads of 72) would fill 56 % of a tile of
4096, so its first 2048 channels are one tile and its last 256 another; likewise 576 is 512 and 64,
four groups at a time. The rests of several groups are one tile, four of 2304, so that a thread
loads 16 bytes of them too: first their sums are left in memory, then come the first tiles, then the
rests again. Compiled for compute capability 9.0 with bfloat16, LayerNorm, weight and bias, what a
token costs (q of 2304 and k of 576), in lines of machine code times warps, is:

    ====================  =====  ======================  ============================
    tiles of a group      lines  registers of a thread   programs of a multiprocessor
    ====================  =====  ======================  ============================
    4096, forward          3410                     113                             2
    2048 + 256, forward    1930                     128                             4
    4096, backward         4850                     150                             1
    2048 + 256, backward   3020                     168                             3
    ====================  =====  ======================  ============================

A multiprocessor of an H100 issues at most four of them in a clock, in which its share of the
memory's 3.35 TB/s is some 14 bytes. The forward pass moves 11520 bytes for such a token, 800 clocks
of that share, so with one tile the 850 clocks of instructions would set the pace. The price is that
the rests are read twice. Forward that is soon after, from a cache; backward it is at the end of all
that a program walks over, since its sums for the gradients of the rest's weights, held beside those
of the first tile, would spill. A rest of each group for itself would be 4 bytes for a thread. Where
the rest is more than a quarter of the first tile, and over heads, one tile holds the group. Reading
all of a group twice would save registers but load and convert it twice.

Where there is a rest, what does not change from group to group is computed for each of them: LLVM
would keep more of it in registers than there are. A stride of heads that is None says that all
channels of a group are neighbours, which saves the registers of 64-bit offsets and the division by
D.

For one token, with numbers of E bytes, C channels in q and k together, and S bytes of statistics
(8 for each group of LayerNorm, 4 for RMSNorm): forward reads C E and writes C E + S; backward reads
2 C E + S and writes C E; both read 4 bytes of table for each channel of a head. With Next-DiT's
2880 channels in bfloat16 that is 11824 bytes and 17584, the table included; the rests read again,
and the two numbers of a group that wait for them, are up to 1344 more. Gradients to weights
and biases add 4 bytes for each channel of a group and program, written and read once, whatever the
number of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["norm_rotate_backward_kernel", "norm_rotate_kernel"]


@triton.jit
def _block(i: tl.tensor, SIZE: tl.constexpr):
    """Give the groups of a sample that its i-th block holds: `[SIZE]`, or a number if it is one."""
    o_g = i * SIZE
    if SIZE > 1:
        o_g += tl.arange(0, SIZE)
    return o_g


@triton.jit
def _rows(x: tl.tensor):
    """Put what belongs to groups beside their channels: `[BLOCK_G, 1]`, or the number."""
    if len(x.shape) == 1:
        return x[:, None]
    else:
        return x


@triton.jit
def _sum(x: tl.tensor, BLOCK_G: tl.constexpr):
    """Add up the channels of each group: `[BLOCK_G, 1]`, or a number if the group is one."""
    if BLOCK_G == 1:
        return tl.sum(x)
    else:
        return tl.sum(x, 1)[:, None]


@triton.jit
def _load_pair(
    ptr: tl.tensor,
    i_b: tl.tensor,
    o_g: tl.tensor,
    B: tl.tensor,
    groups: tl.tensor,
    BOTH: tl.constexpr,
):
    """Load the two numbers of each group that lie in `[2, B, groups]`; 0 for what is not there."""
    p_x, m = ptr + i_b * groups + _rows(o_g), _rows(o_g) < groups
    first, second = tl.load(p_x, mask=m, other=0.0), 0.0
    if BOTH:
        second = tl.load(p_x + B.to(tl.int64) * groups, mask=m, other=0.0)
    return first, second


@triton.jit
def _store_pair(
    ptr: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    i_b: tl.tensor,
    o_g: tl.tensor,
    B: tl.tensor,
    groups: tl.tensor,
    BOTH: tl.constexpr,
):
    """Store the two numbers of each group, or the first alone."""
    p_x, m = ptr + i_b * groups + _rows(o_g), _rows(o_g) < groups
    tl.store(p_x, first, mask=m)
    if BOTH:
        tl.store(p_x + B.to(tl.int64) * groups, second, mask=m)


@triton.jit
def _beyond(ptr: tl.tensor, B: tl.tensor, T: tl.tensor, BOTH: tl.constexpr, GROUPS: tl.constexpr):
    """Step over the one or two numbers of each group of q, to those of k."""
    return ptr + B.to(tl.int64) * T * (GROUPS * (2 if BOTH else 1))


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
    """Load channels of groups as float32, `[BLOCK_G, BLOCK_C]`, whatever the strides.

    A stride of heads that is None says that the channels of a group are neighbours.
    """
    s_b, s_t, s_h, s_d = strides
    o_c = START + tl.arange(0, BLOCK_C)
    row = tl.multiple_of(i_b * s_b + (o_g // GROUPS).to(tl.int64) * s_t, VECTOR)
    if s_h is None:
        column = o_c
    else:
        o_h = tl.max_constancy(o_c // D, VECTOR)
        o_d = tl.max_contiguous(tl.multiple_of(o_c % D, VECTOR), VECTOR)
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
def _load_weight(
    w_ptr: tl.tensor,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load the weights or biases of these channels as float32, in each of `[ROWS, BLOCK_C]`.

    As many rows as groups let a thread load 16 bytes where one row has too few channels for that.
    """
    o_c = START + tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK_C)[None, :]
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
def _sum_rest(
    x_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    s_x: tl.tuple,
    i_b: tl.tensor,
    o_g: tl.tensor,
    B: tl.tensor,
    T: tl.tensor,
    CENTER: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Leave the mean of the rest of each group, and its squares about it, in the statistics."""
    x = _load(x_ptr, s_x, i_b, o_g, T, D, GROUPS, WIDTH, VECTOR, MAIN, REST)
    mean = 0.0
    if CENTER:
        mean = tl.sum(x, 1)[:, None] / (WIDTH - MAIN)
        x = _center(x, mean, WIDTH, MAIN, REST)
    square = tl.sum(x * x, 1)[:, None]
    _store_pair(stats_ptr, square, mean, i_b, o_g, B, T * GROUPS, CENTER)


@triton.jit
def _forward_rest(
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
    i_b: tl.tensor,
    o_g: tl.tensor,
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
    """Normalise and turn the rest of each group by its statistics."""
    rstd, mean = _load_pair(stats_ptr, i_b, o_g, B, T * GROUPS, CENTER)
    # fmt: off
    x, cos, sin = _load_tile(
        x_ptr, cos_ptr, sin_ptr, s_x, s_cos, s_sin, i_b, o_g, T,
        D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, MAIN, REST,
    )
    # fmt: on
    y = (x - mean) * rstd
    if w_ptr is not None:
        y *= _load_weight(w_ptr, WIDTH, MAIN, BLOCK_G, REST)
    if b_ptr is not None:
        y += _load_weight(b_ptr, WIDTH, MAIN, BLOCK_G, REST)
    y = _turn(y, cos, sin, BLOCK_G, REST)
    _store(y_ptr, y, i_b, o_g, T, GROUPS, WIDTH, MAIN, REST)


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
    BLOCKS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Normalise and turn the groups of one tensor that program i_p of `programs` has to walk."""
    w, b = 1.0, 0.0
    # One row over heads, of which there are many: more would spill.
    if w_ptr is not None:
        w = _load_weight(w_ptr, WIDTH, 0, BLOCK_G if REST else 1, MAIN)
    if b_ptr is not None:
        b = _load_weight(b_ptr, WIDTH, 0, BLOCK_G if REST else 1, MAIN)
    groups = T * GROUPS
    blocks = (groups + BLOCKS * BLOCK_G - 1) // (BLOCKS * BLOCK_G)
    for step in tl.range(i_p, B * blocks, programs, disable_licm=REST > 0):
        i_b = (step // blocks).to(tl.int64)
        o_r = _block(step % blocks, BLOCKS * BLOCK_G)
        # fmt: off
        if REST:
            _sum_rest(
                x_ptr, stats_ptr, s_x, i_b, o_r, B, T, CENTER, D, GROUPS, WIDTH, VECTOR, MAIN, REST
            )
            tl.debug_barrier()  # what some threads have stored, others load
        for i in tl.range(BLOCKS, disable_licm=REST > 0):
            o_g = _block((step % blocks) * BLOCKS + i, BLOCK_G)
            x, cos, sin = _load_tile(
                x_ptr, cos_ptr, sin_ptr, s_x, s_cos, s_sin, i_b, o_g, T,
                D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, 0, MAIN,
            )
            mean, rest_mean, square = 0.0, 0.0, 0.0
            if REST:
                square, rest_mean = _load_pair(stats_ptr, i_b, o_g, B, groups, CENTER)
                tl.debug_barrier()  # all have loaded what is then written over
            if CENTER:
                mean = _sum(x, BLOCK_G) / WIDTH
                if REST:
                    mean += rest_mean * ((WIDTH - MAIN) / WIDTH)
                    square += (rest_mean - mean) * (rest_mean - mean) * (WIDTH - MAIN)
                x = _center(x, mean, WIDTH, 0, MAIN)
            rstd = tl.rsqrt((square + _sum(x * x, BLOCK_G)) / WIDTH + eps)
            _store_pair(stats_ptr, rstd, mean, i_b, o_g, B, groups, CENTER)
            y = x * rstd * w
            if b_ptr is not None:
                y += b
            y = _turn(y, cos, sin, BLOCK_G, MAIN)
            _store(y_ptr, y, i_b, o_g, T, GROUPS, WIDTH, 0, MAIN)
        if REST:
            tl.debug_barrier()
            _forward_rest(
                x_ptr, y_ptr, stats_ptr, w_ptr, b_ptr, cos_ptr, sin_ptr, s_x, s_cos, s_sin,
                i_b, o_r, B, T, CENTER, D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, BLOCKS * BLOCK_G,
                MAIN, REST,
            )
        # fmt: on


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
    stats_ptr: tl.tensor,
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
    Q_BLOCKS: tl.constexpr,
    Q_MAIN: tl.constexpr,
    Q_REST: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
):
    """Normalise and turn q and k into contiguous outputs, and write 1 / deviation and the mean.

    The statistics are `[2 or 1, B, T * Q_GROUPS]`, and after them those of k.

    Of all programs the first P_Q walk over the groups of q, the others over those of k. A tensor
    has Q_GROUPS groups of Q_WIDTH channels in a token: 1 of H * D, or H of D.
    """
    i_p = tl.program_id(0)
    s_cos, s_sin = (cos_sb, cos_st, cos_sp), (sin_sb, sin_st, sin_sp)
    # fmt: off
    if i_p < P_Q:
        _forward_groups(
            q_ptr, q_out_ptr, stats_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr,
            (q_sb, q_st, q_sh, q_sd), s_cos, s_sin, i_p, P_Q, B, T, eps, CENTER,
            D, Q_GROUPS, Q_WIDTH, VECTOR, TABLE_VECTOR, Q_BLOCK, Q_BLOCKS, Q_MAIN, Q_REST,
        )
    else:
        stats_ptr = _beyond(stats_ptr, B, T, CENTER, Q_GROUPS)
        _forward_groups(
            k_ptr, k_out_ptr, stats_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr,
            (k_sb, k_st, k_sh, k_sd), s_cos, s_sin, i_p - P_Q, tl.num_programs(0) - P_Q, B, T, eps,
            CENTER, D, K_GROUPS, K_WIDTH, VECTOR, TABLE_VECTOR, K_BLOCK, K_BLOCKS, K_MAIN, K_REST,
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
def _sum_rest_gradient(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    means_ptr: tl.tensor,
    w_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    s_dy: tl.tuple,
    s_x: tl.tuple,
    s_cos: tl.tuple,
    s_sin: tl.tuple,
    i_b: tl.tensor,
    o_g: tl.tensor,
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
    """Leave what the rest adds to the sums of g n and of g where their means will be."""
    rstd, mean = _load_pair(stats_ptr, i_b, o_g, B, T * GROUPS, CENTER)
    # fmt: off
    x, g = _load_gradient(
        dy_ptr, x_ptr, cos_ptr, sin_ptr, s_dy, s_x, s_cos, s_sin, mean, rstd, i_b, o_g, T,
        D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, MAIN, BLOCK_G, REST,
    )
    # fmt: on
    if w_ptr is not None:
        g *= _load_weight(w_ptr, WIDTH, MAIN, BLOCK_G, REST)
    along, shift = tl.sum(g * x, 1)[:, None], tl.sum(g, 1)[:, None]
    _store_pair(means_ptr, along, shift, i_b, o_g, B, T * GROUPS, CENTER)


@triton.jit
def _backward_rest(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    means_ptr: tl.tensor,
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
    """Finish the channels that the first tile of the groups leaves."""
    dw = tl.zeros((BLOCK_G, REST), tl.float32)
    db = tl.zeros((BLOCK_G, REST), tl.float32)
    groups = T * GROUPS
    blocks = (groups + BLOCK_G - 1) // BLOCK_G
    tl.debug_barrier()
    for step in tl.range(i_p, B * blocks, programs, disable_licm=True):
        i_b, o_g = (step // blocks).to(tl.int64), _block(step % blocks, BLOCK_G)
        rstd, mean = _load_pair(stats_ptr, i_b, o_g, B, groups, CENTER)
        along, shift = _load_pair(means_ptr, i_b, o_g, B, groups, CENTER)
        # fmt: off
        x, g = _load_gradient(
            dy_ptr, x_ptr, cos_ptr, sin_ptr, s_dy, s_x, s_cos, s_sin, mean, rstd, i_b, o_g, T,
            D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, MAIN, BLOCK_G, REST,
        )
        # fmt: on
        if dw_ptr is not None:
            dw += g * x
        if db_ptr is not None:
            db += g
        if w_ptr is not None:
            g *= _load_weight(w_ptr, WIDTH, MAIN, BLOCK_G, REST)
        dx = (g - x * along - shift) * rstd
        _store(dx_ptr, dx, i_b, o_g, T, GROUPS, WIDTH, MAIN, REST)
    if dw_ptr is not None:
        _store_sum(dw_ptr, dw, i_p, WIDTH, MAIN, REST)
    if db_ptr is not None:
        _store_sum(db_ptr, db, i_p, WIDTH, MAIN, REST)


@triton.jit
def _backward_groups(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    means_ptr: tl.tensor,
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
    BLOCKS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """Write dx of the groups of one tensor that program i_p has to walk, and its sums of dw and db.

    With n the normalised x and g = w times dy turned back, each mean over a group:
    dx = (g - n mean(g n) - mean(g)) / deviation, the last mean of LayerNorm alone.
    """
    dw = tl.zeros((BLOCK_G, MAIN), tl.float32)
    db = tl.zeros((BLOCK_G, MAIN), tl.float32)
    groups = T * GROUPS
    blocks = (groups + BLOCKS * BLOCK_G - 1) // (BLOCKS * BLOCK_G)
    for step in tl.range(i_p, B * blocks, programs, disable_licm=REST > 0):
        i_b = (step // blocks).to(tl.int64)
        # fmt: off
        if REST:
            o_r = _block(step % blocks, BLOCKS * BLOCK_G)
            _sum_rest_gradient(
                dy_ptr, x_ptr, stats_ptr, means_ptr, w_ptr, cos_ptr, sin_ptr, s_dy, s_x, s_cos,
                s_sin, i_b, o_r, B, T, CENTER, D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR,
                BLOCKS * BLOCK_G, MAIN, REST,
            )
            tl.debug_barrier()  # what some threads have stored, others load
        for i in tl.range(BLOCKS, disable_licm=REST > 0):
            o_g = _block((step % blocks) * BLOCKS + i, BLOCK_G)
            rstd, mean = _load_pair(stats_ptr, i_b, o_g, B, groups, CENTER)
            x, g = _load_gradient(
                dy_ptr, x_ptr, cos_ptr, sin_ptr, s_dy, s_x, s_cos, s_sin, mean, rstd, i_b, o_g, T,
                D, GROUPS, WIDTH, VECTOR, TABLE_VECTOR, 0, BLOCK_G, MAIN,
            )
            if dw_ptr is not None:
                dw += g * x
            if db_ptr is not None:
                db += g
            if w_ptr is not None:
                g *= _load_weight(w_ptr, WIDTH, 0, BLOCK_G, MAIN)
            along, shift = 0.0, 0.0
            if REST:
                along, shift = _load_pair(means_ptr, i_b, o_g, B, groups, CENTER)
                tl.debug_barrier()  # all have loaded what is then written over
            along = (along + _sum(g * x, BLOCK_G)) / WIDTH
            if CENTER:
                shift = (shift + _sum(g, BLOCK_G)) / WIDTH
            if REST:
                _store_pair(means_ptr, along, shift, i_b, o_g, B, groups, CENTER)
            dx = (g - x * along - shift) * rstd
            _store(dx_ptr, dx, i_b, o_g, T, GROUPS, WIDTH, 0, MAIN)
        # fmt: on
    if REST:
        _backward_rest(
            dy_ptr,
            x_ptr,
            dx_ptr,
            stats_ptr,
            means_ptr,
            w_ptr,
            dw_ptr,
            db_ptr,
            cos_ptr,
            sin_ptr,
            s_dy,
            s_x,
            s_cos,
            s_sin,
            i_p,
            programs,
            B,
            T,
            CENTER,
            D,
            GROUPS,
            WIDTH,
            VECTOR,
            TABLE_VECTOR,
            BLOCKS * BLOCK_G,
            MAIN,
            REST,
        )
    if dw_ptr is not None:
        _store_sum(dw_ptr, dw, i_p, WIDTH, 0, MAIN)
    if db_ptr is not None:
        _store_sum(db_ptr, db, i_p, WIDTH, 0, MAIN)


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
    stats_ptr: tl.tensor,
    means_ptr: tl.tensor,
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
    Q_BLOCKS: tl.constexpr,
    Q_MAIN: tl.constexpr,
    Q_REST: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_BLOCKS: tl.constexpr,
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
            dq_ptr, q_ptr, q_out_ptr, stats_ptr, means_ptr, q_weight_ptr, q_weight_sums_ptr,
            q_bias_sums_ptr, cos_ptr, sin_ptr, (dq_sb, dq_st, dq_sh, dq_sd),
            (q_sb, q_st, q_sh, q_sd), s_cos, s_sin, i_p, P_Q, B, T, CENTER,
            D, Q_GROUPS, Q_WIDTH, VECTOR, TABLE_VECTOR, Q_BLOCK, Q_BLOCKS, Q_MAIN, Q_REST,
        )
    else:
        stats_ptr = _beyond(stats_ptr, B, T, CENTER, Q_GROUPS)
        if means_ptr is not None:
            means_ptr = _beyond(means_ptr, B, T, CENTER, Q_GROUPS)
        _backward_groups(
            dk_ptr, k_ptr, k_out_ptr, stats_ptr, means_ptr, k_weight_ptr, k_weight_sums_ptr,
            k_bias_sums_ptr, cos_ptr, sin_ptr, (dk_sb, dk_st, dk_sh, dk_sd),
            (k_sb, k_st, k_sh, k_sd), s_cos, s_sin, i_p - P_Q, tl.num_programs(0) - P_Q, B, T,
            CENTER, D, K_GROUPS, K_WIDTH, VECTOR, TABLE_VECTOR, K_BLOCK, K_BLOCKS, K_MAIN, K_REST,
        )
    # fmt: on
