"""The norms around a layer of Next-DiT: modulate what goes in, gate what comes out and add it.

x <- x + tanh(gate) RMS2( layer( RMS1(x) (1 + scale) ) )

What stands before the layer and what stands after it are one launch each way. One kernel serves
both, since either scales a normed row by its weight and by a factor of the modulation; another
serves both backward passes.

A program owns consecutive tokens of one sample and holds whole rows. A modulation that the sample's
tokens share is therefore read once, and its gradient, a sum over tokens, leaves the program as one
row. PyTorch adds the rows of all programs: nothing is added atomically, so that a gradient is the
same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sandwich_backward_kernel", "sandwich_kernel"]


@triton.jit
def _factor(m: tl.tensor, GATED: tl.constexpr):
    """Give 1 + m or tanh(m), and its slope.

    With e = exp(-2 |m|): tanh |m| = (1 - e) / (1 + e). Near zero, where 1 - e loses digits, the
    series of tanh stands in.
    """
    if GATED:
        size = tl.abs(m)
        e = tl.exp(-2.0 * size)
        square = m * m
        series = 17.0 / 315.0 - square * (62.0 / 2835.0)
        series = 1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * series))
        far = (1.0 - e) / (1.0 + e)
        factor = tl.where(size < 0.25, m * series, tl.where(m < 0, -far, far))
        slope = 1.0 - factor * factor
    else:
        factor = 1.0 + m
        slope = tl.full(m.shape, 1.0, tl.float32)
    return factor, slope


@triton.jit
def _rows(
    x_ptr: tl.tensor,
    i_b: tl.tensor,
    o_t: tl.tensor,
    o_w: tl.tensor,
    mask: tl.tensor,
    s_b: tl.tensor,
    s_t: tl.tensor,
    s_w: tl.tensor,
    VECTOR: tl.constexpr,
):
    """Load the rows o_t of sample i_b as float32, whatever their strides; 0 outside the mask."""
    row = tl.multiple_of(i_b * s_b + o_t.to(tl.int64) * s_t, VECTOR)
    p_x = x_ptr + row[:, None] + (o_w.to(tl.int64) * s_w)[None, :]
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row(
    x_ptr: tl.tensor,
    o_w: tl.tensor,
    s_w: tl.tensor,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Load one row as float32 for every row of a tile, which keeps loads wide in narrow tiles."""
    none = tl.zeros((BLOCK_T, 1), tl.int32)
    p_x = x_ptr + none + (o_w.to(tl.int64) * s_w)[None, :]
    return tl.load(p_x, mask=(o_w[None, :] < W) & (none == 0), other=0.0).to(tl.float32)


@triton.jit
def _weight(
    weight_ptr: tl.tensor,
    o_w: tl.tensor,
    s_w: tl.tensor,
    W: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    if WEIGHTED:
        weight = _row(weight_ptr, o_w, s_w, W, BLOCK_T)
    else:
        weight = tl.full((BLOCK_T, BLOCK_W), 1.0, tl.float32)
    return weight


@triton.jit
def _centred(x: tl.tensor, mask: tl.tensor, W: tl.constexpr, CENTRED: tl.constexpr):
    """Take off the mean of each row where CENTRED."""
    if CENTRED:
        mean = tl.sum(x, axis=1) / W
        x = tl.where(mask, x - mean[:, None], 0.0)
    return x


# Lengths and strides are not specialised, so that another resolution does not compile the kernels
# again; only a channel stride of 1 is.
@triton.jit(do_not_specialize=["T", "steps", "r_sb", "r_st", "x_sb", "x_st", "m_sb", "m_st", "eps"])
def sandwich_kernel(
    residual_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    m_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    T: tl.tensor,
    steps: tl.tensor,
    eps: tl.tensor,
    r_sb: tl.tensor,
    r_st: tl.tensor,
    r_sw: tl.tensor,
    x_sb: tl.tensor,
    x_st: tl.tensor,
    x_sw: tl.tensor,
    weight_sw: tl.tensor,
    m_sb: tl.tensor,
    m_st: tl.tensor,
    m_sw: tl.tensor,
    W: tl.constexpr,
    GATED: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write norm(x) * weight * factor(m), `[B, T, W]`, added to the residual where GATED.

    Program i: `steps` tiles of tokens of one sample. Also writes 1 / rms of each row, `[B, T]`.
    """
    programs = (T + steps * BLOCK_T - 1) // (steps * BLOCK_T)
    i_b = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * steps * BLOCK_T
    o_w = tl.arange(0, BLOCK_W)
    o_row = tl.arange(0, BLOCK_T)
    inside = o_w[None, :] < W
    factor = _weight(weight_ptr, o_w, weight_sw, W, WEIGHTED, BLOCK_T, BLOCK_W)
    if not PER_TOKEN:
        m = _row(m_ptr + tl.multiple_of(i_b * m_sb, VECTOR), o_w, m_sw, W, BLOCK_T)
        factor *= _factor(m, GATED)[0]
    for i in tl.range(steps):
        o_t = first + i * BLOCK_T + o_row
        mask = (o_t[:, None] < T) & inside
        x = _rows(x_ptr, i_b, o_t, o_w, mask, x_sb, x_st, x_sw, VECTOR)
        x = _centred(x, mask, W, CENTRED)
        # Rows past the end are zero, and eps may be.
        square = tl.where(o_t < T, tl.sum(x * x, axis=1) / W + eps, 1.0)
        rstd = tl.rsqrt(square)
        out = x * rstd[:, None] * factor
        if PER_TOKEN:
            m = _rows(m_ptr, i_b, o_t, o_w, mask, m_sb, m_st, m_sw, VECTOR)
            out *= _factor(m, GATED)[0]
        if GATED:
            out += _rows(residual_ptr, i_b, o_t, o_w, mask, r_sb, r_st, r_sw, VECTOR)
        p_out = out_ptr + ((i_b * T + o_t) * W)[:, None] + o_w[None, :]
        tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(rstd_ptr + i_b * T + o_t, rstd, mask=o_t < T)


@triton.jit(do_not_specialize=["T", "steps", "g_sb", "g_st", "x_sb", "x_st", "m_sb", "m_st"])
def sandwich_backward_kernel(
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    m_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    grad_m_ptr: tl.tensor,
    T: tl.tensor,
    steps: tl.tensor,
    g_sb: tl.tensor,
    g_st: tl.tensor,
    g_sw: tl.tensor,
    x_sb: tl.tensor,
    x_st: tl.tensor,
    x_sw: tl.tensor,
    weight_sw: tl.tensor,
    m_sb: tl.tensor,
    m_st: tl.tensor,
    m_sw: tl.tensor,
    W: tl.constexpr,
    GATED: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_M: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the gradients to x and m, and one row of the gradient to the weight per program.

    With n = norm(x), f = factor(m) and d = grad f weight, the gradient to n:
    grad_x = rstd (d - n mean(d n)), less the mean of d where CENTRED; grad_weight sums grad f n;
    grad_m is grad n weight f', where tokens share m also one row per program, summed over tokens.
    """
    programs = (T + steps * BLOCK_T - 1) // (steps * BLOCK_T)
    i_b = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * steps * BLOCK_T
    o_w = tl.arange(0, BLOCK_W)
    o_row = tl.arange(0, BLOCK_T)
    inside = o_w[None, :] < W
    scaled = _weight(weight_ptr, o_w, weight_sw, W, WEIGHTED, BLOCK_T, BLOCK_W)
    if not PER_TOKEN:
        m = _row(m_ptr + tl.multiple_of(i_b * m_sb, VECTOR), o_w, m_sw, W, BLOCK_T)
        scaled *= _factor(m, GATED)[0]
    total = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    for i in tl.range(steps):
        o_t = first + i * BLOCK_T + o_row
        mask = (o_t[:, None] < T) & inside
        x = _rows(x_ptr, i_b, o_t, o_w, mask, x_sb, x_st, x_sw, VECTOR)
        grad = _rows(grad_ptr, i_b, o_t, o_w, mask, g_sb, g_st, g_sw, VECTOR)
        rstd = tl.load(rstd_ptr + i_b * T + o_t, mask=o_t < T, other=0.0)
        n = _centred(x, mask, W, CENTRED) * rstd[:, None]
        o_out = ((i_b * T + o_t) * W)[:, None] + o_w[None, :]
        if PER_TOKEN:
            m = _rows(m_ptr, i_b, o_t, o_w, mask, m_sb, m_st, m_sw, VECTOR)
            factor, slope = _factor(m, GATED)
            if GRAD_M:
                grad_m = grad * n * scaled * slope
                tl.store(grad_m_ptr + o_out, grad_m.to(grad_m_ptr.dtype.element_ty), mask=mask)
            grad *= factor
        if GRAD_WEIGHT or (GRAD_M and not PER_TOKEN):
            total += grad * n
        if GRAD_X:
            d = grad * scaled
            grad_x = d - n * (tl.sum(d * n, axis=1) / W)[:, None]
            if CENTRED:
                grad_x -= (tl.sum(d, axis=1) / W)[:, None]
            grad_x *= rstd[:, None]
            tl.store(grad_x_ptr + o_out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    o_out = tl.program_id(0).to(tl.int64) * W + o_w
    if PER_TOKEN:
        if GRAD_WEIGHT:
            tl.store(grad_weight_ptr + o_out, tl.sum(total, axis=0), mask=o_w < W)
    else:
        # Read again rather than kept in registers during the loop.
        m = _row(m_ptr + tl.multiple_of(i_b * m_sb, VECTOR), o_w, m_sw, W, BLOCK_T)
        factor, slope = _factor(m, GATED)
        if GRAD_WEIGHT:
            tl.store(grad_weight_ptr + o_out, tl.sum(total * factor, axis=0), mask=o_w < W)
        if GRAD_M:
            weight = _weight(weight_ptr, o_w, weight_sw, W, WEIGHTED, BLOCK_T, BLOCK_W)
            tl.store(grad_m_ptr + o_out, tl.sum(total * weight * slope, axis=0), mask=o_w < W)
