"""The backward kernels of attention: one for the queries, one for keys and values.

Both compute the probabilities again from the scores and the logarithm of their sum,
p = 2^(s - lse), so that nothing as large as the scores is kept. Each owns the rows that it writes
and adds in a fixed order: no atomic operation, the same bits every time.

With d = rowsum(o do), and c the scale on the scores:

    ds = p (do v^T - d);  dq = c ds k;  dk = c ds^T q;  dv = p^T do

Source: Dao, FlashAttention-2 (arXiv 2307.08691), algorithm 2, with its loops over keys and over
    queries in two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nextdit_kernels.attention_forward import sizes, tanh
from nextdit_kernels.attention_tiles import (
    has_narrow_tail,
    head_of_sample,
    load_rows,
    store_rows,
    where_to_work,
)

__all__ = [
    "gate_gradient_kernel",
    "key_blocks",
    "key_gradient_kernel",
    "query_blocks",
    "query_gradient_kernel",
]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _query_gradient(
    q: tl.tensor,
    q_tail: tl.tensor,
    grad: tl.tensor,
    grad_tail: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    acc: tl.tensor,
    acc_tail: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_mask: tl.tensor,
    n: tl.tensor,
    keys: tl.tensor,
    factor: tl.tensor,
    k_st: tl.tensor,
    k_sd: tl.tensor,
    v_st: tl.tensor,
    v_sd: tl.tensor,
    mask_sn: tl.tensor,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVERY_KEY: tl.constexpr,
):
    """Add what the block of keys from n on gives to the gradient of the queries."""
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    row_k = p_k + tl.multiple_of(o_n.to(tl.int64) * k_st, VECTOR)
    row_v = p_v + tl.multiple_of(o_n.to(tl.int64) * v_st, VECTOR)
    k = load_rows(row_k, m_n, k_sd, D, 0, MAIN, EVERY_KEY)
    v = load_rows(row_v, m_n, v_sd, D, 0, MAIN, EVERY_KEY)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    k_tail = k
    if TAIL:
        k_tail = load_rows(row_k, m_n, k_sd, D, MAIN, TAIL, EVERY_KEY)
        v_tail = load_rows(row_v, m_n, v_sd, D, MAIN, TAIL, EVERY_KEY)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        grad_p = tl.dot(grad_tail, tl.trans(v_tail), grad_p, input_precision=PRECISION)
    p = tl.exp2(scores * factor - lse[:, None])
    if not EVERY_KEY:
        if p_mask is not None:
            m_n = tl.load(p_mask + o_n.to(tl.int64) * mask_sn, mask=m_n, other=0) != 0
        p = tl.where(m_n[None, :], p, 0.0)
    grad_s = (p * (grad_p - delta[:, None])).to(k.dtype)
    acc = tl.dot(grad_s, k, acc, input_precision=PRECISION)
    if TAIL:
        acc_tail = tl.dot(grad_s, k_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


# As in the forward kernel, only a channel stride of 1 is specialised.
@triton.jit(
    do_not_specialize=[
        *("T", "N", "SAMPLES", "TOTAL", "H", "H_KV", "q_sb", "q_st", "q_sh", "k_sb", "k_st"),
        *("k_sh", "v_sb", "v_st", "v_sh", "scales_sb", "scales_sh", "mask_sb", "mask_sn"),
        *("grad_sb", "grad_st", "grad_sh", "gate_sh"),
    ]
)
def query_gradient_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    grad_q_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    cu_keys_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    scale: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    SAMPLES: tl.tensor,
    TOTAL: tl.tensor,
    H: tl.tensor,
    H_KV: tl.tensor,
    q_sb: tl.tensor,
    q_st: tl.tensor,
    q_sh: tl.tensor,
    q_sd: tl.tensor,
    k_sb: tl.tensor,
    k_st: tl.tensor,
    k_sh: tl.tensor,
    k_sd: tl.tensor,
    v_sb: tl.tensor,
    v_st: tl.tensor,
    v_sh: tl.tensor,
    v_sd: tl.tensor,
    grad_sb: tl.tensor,
    grad_st: tl.tensor,
    grad_sh: tl.tensor,
    grad_sd: tl.tensor,
    scales_sb: tl.tensor,
    scales_sh: tl.tensor,
    mask_sb: tl.tensor,
    mask_sn: tl.tensor,
    gate_sh: tl.tensor,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write grad_q, contiguous, and delta `[H, TOTAL]`, which the other kernels read.

    grad is the gradient of the result, `[B, T, H, D]` or packed, and out the contiguous output of
    the softmax. With gate_ptr the result was gated, and the gradient of out is tanh(gate) grad;
    delta is that of grad itself.

    Program (i, j): tile i of the samples' queries; query head j.
    """
    i_b, start, tokens, first = where_to_work(cu_ptr, tl.program_id(0), T, SAMPLES, BLOCK_M)
    if first >= tokens:
        return
    i_h = tl.program_id(1).to(tl.int64)
    i_k = i_h // (H // H_KV)
    start_k = start * 0
    keys = N
    if cu_keys_ptr is not None:
        start_k = tl.load(cu_keys_ptr + i_b)
        keys = tl.load(cu_keys_ptr + i_b + 1) - start_k
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + i_b * scales_sb + i_h * scales_sh)
    factor = scale * _LOG2E

    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens
    row = (i_b * T + start + o_m).to(tl.int64)
    o_out = row * H + i_h
    p_q = q_ptr + head_of_sample(i_b, i_h, start, q_sb, q_st, q_sh, cu_ptr, VECTOR)
    p_g = grad_ptr + head_of_sample(i_b, i_h, start, grad_sb, grad_st, grad_sh, cu_ptr, VECTOR)
    row_q = p_q + tl.multiple_of(o_m.to(tl.int64) * q_st, VECTOR)
    row_g = p_g + tl.multiple_of(o_m.to(tl.int64) * grad_st, VECTOR)
    q = load_rows(row_q, m_m, q_sd, D, 0, MAIN, False)
    grad = load_rows(row_g, m_m, grad_sd, D, 0, MAIN, False)
    out = load_rows(out_ptr + o_out * D, m_m, 1, D, 0, MAIN, False)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    q_tail = q
    grad_tail = grad
    if TAIL:
        q_tail = load_rows(row_q, m_m, q_sd, D, MAIN, TAIL, False)
        grad_tail = load_rows(row_g, m_m, grad_sd, D, MAIN, TAIL, False)
        out = load_rows(out_ptr + o_out * D, m_m, 1, D, MAIN, TAIL, False)
        delta += tl.sum(grad_tail.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + i_h * TOTAL + row, delta, mask=m_m)
    lse = tl.load(lse_ptr + i_h * TOTAL + row, mask=m_m, other=float("inf"))
    p_k = k_ptr + head_of_sample(i_b, i_k, start_k, k_sb, k_st, k_sh, cu_ptr, VECTOR)
    p_v = v_ptr + head_of_sample(i_b, i_k, start_k, v_sb, v_st, v_sh, cu_ptr, VECTOR)

    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    # fmt: off
    if mask_ptr is not None:
        p_mask = mask_ptr + i_b * mask_sb
        for n in tl.range(0, keys, BLOCK_N):
            acc, acc_tail = _query_gradient(
                q, q_tail, grad, grad_tail, lse, delta, acc, acc_tail, p_k, p_v, p_mask, n, keys,
                factor, k_st, k_sd, v_st, v_sd, mask_sn,
                D, MAIN, TAIL, VECTOR, PRECISION, BLOCK_N, False,
            )
    else:
        whole = keys // BLOCK_N * BLOCK_N
        for n in tl.range(0, whole, BLOCK_N):
            acc, acc_tail = _query_gradient(
                q, q_tail, grad, grad_tail, lse, delta, acc, acc_tail, p_k, p_v, None, n, keys,
                factor, k_st, k_sd, v_st, v_sd, mask_sn,
                D, MAIN, TAIL, VECTOR, PRECISION, BLOCK_N, True,
            )
        for n in tl.range(whole, keys, BLOCK_N):
            acc, acc_tail = _query_gradient(
                q, q_tail, grad, grad_tail, lse, delta, acc, acc_tail, p_k, p_v, None, n, keys,
                factor, k_st, k_sd, v_st, v_sd, mask_sn,
                D, MAIN, TAIL, VECTOR, PRECISION, BLOCK_N, False,
            )
    # fmt: on
    if gate_ptr is not None:
        scale *= tanh(tl.load(gate_ptr + i_h * gate_sh).to(tl.float32))
    # Counted anew, as in the forward kernel.
    o_t = tl.arange(0, BLOCK_M)
    m_t = o_t < tokens - first
    o_out = (i_b * T + start + first + o_t) * H + i_h
    store_rows(grad_q_ptr, o_out, acc * scale, m_t, D, 0, MAIN)
    if TAIL:
        store_rows(grad_q_ptr, o_out, acc_tail * scale, m_t, D, MAIN, TAIL)


@triton.jit(
    do_not_specialize=[
        *("T", "N", "SAMPLES", "TOTAL", "H", "H_KV", "q_sb", "q_st", "q_sh", "k_sb", "k_st"),
        *("k_sh", "v_sb", "v_st", "v_sh", "scales_sb", "scales_sh", "mask_sb", "mask_sn"),
        *("grad_sb", "grad_st", "grad_sh", "gate_sh", "TOTAL_N"),
    ]
)
def key_gradient_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    grad_v_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    cu_keys_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    scale: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    SAMPLES: tl.tensor,
    TOTAL: tl.tensor,
    H: tl.tensor,
    H_KV: tl.tensor,
    q_sb: tl.tensor,
    q_st: tl.tensor,
    q_sh: tl.tensor,
    q_sd: tl.tensor,
    k_sb: tl.tensor,
    k_st: tl.tensor,
    k_sh: tl.tensor,
    k_sd: tl.tensor,
    v_sb: tl.tensor,
    v_st: tl.tensor,
    v_sh: tl.tensor,
    v_sd: tl.tensor,
    grad_sb: tl.tensor,
    grad_st: tl.tensor,
    grad_sh: tl.tensor,
    grad_sd: tl.tensor,
    scales_sb: tl.tensor,
    scales_sh: tl.tensor,
    mask_sb: tl.tensor,
    mask_sn: tl.tensor,
    gate_sh: tl.tensor,
    TOTAL_N: tl.tensor,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write grad_k and grad_v `[parts, TOTAL_N, H_KV, D]`, contiguous, to be summed over parts.

    A query row beyond its sample is read as 0 with lse +inf, so that its p is 0; a masked key
    spoils only rows of its own, which are cleared at the end. Nothing is masked in the loop.

    Program (i, j, part): tile i of the samples' keys; key head j; the part of its loop over the
    blocks of queries of each query head of its group.
    """
    i_b, start_k, keys, first = where_to_work(cu_keys_ptr, tl.program_id(0), N, SAMPLES, BLOCK_N)
    if first >= keys:
        return
    i_k = tl.program_id(1).to(tl.int64)
    start = start_k * 0
    tokens = T
    if cu_ptr is not None:
        start = tl.load(cu_ptr + i_b)
        tokens = tl.load(cu_ptr + i_b + 1) - start

    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    p_k = k_ptr + head_of_sample(i_b, i_k, start_k, k_sb, k_st, k_sh, cu_ptr, VECTOR)
    p_v = v_ptr + head_of_sample(i_b, i_k, start_k, v_sb, v_st, v_sh, cu_ptr, VECTOR)
    row_k = p_k + tl.multiple_of(o_n.to(tl.int64) * k_st, VECTOR)
    row_v = p_v + tl.multiple_of(o_n.to(tl.int64) * v_st, VECTOR)
    k = load_rows(row_k, m_n, k_sd, D, 0, MAIN, False)
    v = load_rows(row_v, m_n, v_sd, D, 0, MAIN, False)
    k_tail = k
    v_tail = v
    if TAIL:
        k_tail = load_rows(row_k, m_n, k_sd, D, MAIN, TAIL, False)
        v_tail = load_rows(row_v, m_n, v_sd, D, MAIN, TAIL, False)

    acc_k = tl.zeros((BLOCK_N, MAIN), tl.float32)
    acc_v = tl.zeros((BLOCK_N, MAIN), tl.float32)
    acc_k_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    acc_v_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    tiles = (tokens + BLOCK_M - 1) // BLOCK_M
    steps = tiles * (H // H_KV)
    share = (steps + tl.num_programs(2) - 1) // tl.num_programs(2)
    begin = tl.program_id(2) * share
    for step in tl.range(begin, tl.minimum(begin + share, steps)):
        i_g = step // tl.maximum(tiles, 1)
        i_h = i_k * (H // H_KV) + i_g
        o_m = (step - i_g * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < tokens
        row = i_h * TOTAL + i_b * T + start + o_m
        p_q = q_ptr + head_of_sample(i_b, i_h, start, q_sb, q_st, q_sh, cu_ptr, VECTOR)
        p_g = grad_ptr + head_of_sample(i_b, i_h, start, grad_sb, grad_st, grad_sh, cu_ptr, VECTOR)
        row_q = p_q + tl.multiple_of(o_m.to(tl.int64) * q_st, VECTOR)
        row_g = p_g + tl.multiple_of(o_m.to(tl.int64) * grad_st, VECTOR)
        q = load_rows(row_q, m_m, q_sd, D, 0, MAIN, False)
        grad = load_rows(row_g, m_m, grad_sd, D, 0, MAIN, False)
        lse = tl.load(lse_ptr + row, mask=m_m, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=m_m, other=0.0)
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + i_b * scales_sb + i_h * scales_sh)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        q_tail = q
        grad_tail = grad
        if TAIL:
            q_tail = load_rows(row_q, m_m, q_sd, D, MAIN, TAIL, False)
            grad_tail = load_rows(row_g, m_m, grad_sd, D, MAIN, TAIL, False)
            scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
        p = tl.exp2(scores * (scale * _LOG2E) - lse[None, :])
        if gate_ptr is not None:
            p *= tanh(tl.load(gate_ptr + i_h * gate_sh).to(tl.float32))
        p_low = p.to(q.dtype)
        acc_v = tl.dot(p_low, grad, acc_v, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        if TAIL:
            acc_v_tail = tl.dot(p_low, grad_tail, acc_v_tail, input_precision=PRECISION)
            grad_p = tl.dot(v_tail, tl.trans(grad_tail), grad_p, input_precision=PRECISION)
        # The heads of a group may differ in scale, so it is applied here, for no more work.
        grad_s = (p * (grad_p * scale - (delta * scale)[None, :])).to(q.dtype)
        acc_k = tl.dot(grad_s, q, acc_k, input_precision=PRECISION)
        if TAIL:
            acc_k_tail = tl.dot(grad_s, q_tail, acc_k_tail, input_precision=PRECISION)

    # Counted anew, as in the forward kernel.
    o_t = tl.arange(0, BLOCK_N)
    m_t = o_t < keys - first
    if mask_ptr is not None:
        p_mask = mask_ptr + i_b * mask_sb + first.to(tl.int64) * mask_sn
        p_mask += o_t.to(tl.int64) * mask_sn
        seen = tl.load(p_mask, mask=m_t, other=0) != 0
        acc_k = tl.where(seen[:, None], acc_k, 0.0)
        acc_v = tl.where(seen[:, None], acc_v, 0.0)
        acc_k_tail = tl.where(seen[:, None], acc_k_tail, 0.0)
        acc_v_tail = tl.where(seen[:, None], acc_v_tail, 0.0)
    row_n = i_b * N + start_k + first + o_t
    o_out = (tl.program_id(2).to(tl.int64) * TOTAL_N + row_n) * H_KV + i_k
    store_rows(grad_k_ptr, o_out, acc_k, m_t, D, 0, MAIN)
    store_rows(grad_v_ptr, o_out, acc_v, m_t, D, 0, MAIN)
    if TAIL:
        store_rows(grad_k_ptr, o_out, acc_k_tail, m_t, D, MAIN, TAIL)
        store_rows(grad_v_ptr, o_out, acc_v_tail, m_t, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["TOTAL", "gate_sh"])
def gate_gradient_kernel(
    delta_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    TOTAL: tl.tensor,
    gate_sh: tl.tensor,
    BLOCK: tl.constexpr,
):
    """Write the gradient of one head's gate: (1 - tanh(gate)^2) times the sum of its delta."""
    i_h = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, TOTAL, BLOCK):
        o = first + tl.arange(0, BLOCK)
        acc += tl.load(delta_ptr + i_h * TOTAL + o, mask=o < TOTAL, other=0.0)
    opening = tanh(tl.load(gate_ptr + i_h * gate_sh).to(tl.float32))
    grad = (1 - opening * opening) * tl.sum(acc)
    tl.store(grad_gate_ptr + i_h, grad.to(grad_gate_ptr.dtype.element_ty))


def query_blocks(
    head_dim: int, itemsize: int, capability: tuple[int, int], masked: bool
) -> dict[str, int]:
    """Choose the blocks of `query_gradient_kernel`, as `attention_forward.blocks` does."""
    if itemsize == 4:
        return sizes(32, 32, 4, 2) if head_dim <= 96 else sizes(16, 16, 4, 2)
    few = has_narrow_tail(head_dim)
    if capability[0] not in (9, 10):
        return sizes(64, 64 if few else 32, 4, 2) if head_dim <= 128 else sizes(32, 32, 8, 1)
    if head_dim > 128:
        return sizes(64, 32, 8, 2)
    if few:
        return sizes(128 if capability[0] == 10 else 64, 64, 4, 2)
    return sizes(128, 32 if masked else 64, 8, 2)


def key_blocks(
    head_dim: int, itemsize: int, capability: tuple[int, int], masked: bool
) -> dict[str, int]:
    """Choose the blocks of `key_gradient_kernel`, as `attention_forward.blocks` does."""
    few = has_narrow_tail(head_dim)
    if itemsize == 4:
        if head_dim <= 96:  # in one stage, as two of these blocks do not fit consumer cards
            return sizes(64, 64, 8, 1) if few else sizes(32, 32, 8, 2)
        return sizes(16, 32 if head_dim <= 128 else 16, 8, 2)
    if capability[0] not in (9, 10):
        if head_dim > 128:
            return sizes(32, 32, 8, 1)
        if few and masked:
            return sizes(32, 32, 2, 2)
        return sizes(64 if few else 32, 64, 4, 2)
    if head_dim > 128:
        return sizes(32, 64, 8, 2)
    if few:
        return sizes(64, 128 if capability[0] == 10 else 64, 4, 2)
    return sizes(64, 128, 8, 2)
