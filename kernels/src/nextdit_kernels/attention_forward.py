"""The forward kernel of attention: online softmax over blocks of keys.

A program owns a block of queries of one head and walks over the keys of their sample, so that the
scores never reach memory. It keeps the largest score and the sum of exponentials of every query;
their logarithm, base 2 like all exponentials here, is what the backward pass needs.

Source: Dao et al., FlashAttention (arXiv 2205.14135), algorithm 1, in the loop order of
    FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nextdit_kernels.attention_tiles import (
    has_narrow_tail,
    head_of_sample,
    load_rows,
    store_rows,
    where_to_work,
)

__all__ = ["attention_kernel", "blocks", "sizes", "tanh"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x: tl.tensor):
    """Compute tanh, by its series near 0, where a quotient of exponentials would lose digits."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    small = tl.exp(-2 * tl.abs(x))
    quotient = (1 - small) / (1 + small)
    return tl.where(square < 0.01, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _attend(
    q: tl.tensor,
    q_tail: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
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
    """Attend to the block of keys from n on."""
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    row_k = p_k + tl.multiple_of(o_n.to(tl.int64) * k_st, VECTOR)
    row_v = p_v + tl.multiple_of(o_n.to(tl.int64) * v_st, VECTOR)
    k = load_rows(row_k, m_n, k_sd, D, 0, MAIN, EVERY_KEY)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL:
        k_tail = load_rows(row_k, m_n, k_sd, D, MAIN, TAIL, EVERY_KEY)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    if not EVERY_KEY:
        if p_mask is not None:
            m_n = tl.load(p_mask + o_n.to(tl.int64) * mask_sn, mask=m_n, other=0) != 0
        scores = tl.where(m_n[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * factor)
    base = higher
    if p_mask is not None:  # so far every key may have been masked
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores * factor - base[:, None])
    fade = tl.exp2(highest - base)
    total = total * fade + tl.sum(p, 1)
    p = p.to(k.dtype)
    v = load_rows(row_v, m_n, v_sd, D, 0, MAIN, EVERY_KEY)
    acc = tl.dot(p, v, acc * fade[:, None], input_precision=PRECISION)
    if TAIL:
        v_tail = load_rows(row_v, m_n, v_sd, D, MAIN, TAIL, EVERY_KEY)
        acc_tail = tl.dot(p, v_tail, acc_tail * fade[:, None], input_precision=PRECISION)
    return higher, total, acc, acc_tail


# Lengths, head counts and strides are not specialised, so that another resolution does not compile
# the kernel again; only a channel stride of 1 is.
@triton.jit(
    do_not_specialize=[
        *("T", "N", "SAMPLES", "TOTAL", "H", "H_KV", "q_sb", "q_st", "q_sh", "k_sb", "k_st"),
        *("k_sh", "v_sb", "v_st", "v_sh", "scales_sb", "scales_sh", "mask_sb", "mask_sn"),
        *("residual_sb", "residual_st", "residual_sh", "gate_sh"),
    ]
)
def attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    lse_ptr: tl.tensor,
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
    residual_sb: tl.tensor,
    residual_st: tl.tensor,
    residual_sh: tl.tensor,
    residual_sd: tl.tensor,
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
    """Attend from q `[B, T, H, D]` to k and v `[B, N, H_KV, D]`, or packed without B.

    Writes out, contiguous like q, and lse `[H, TOTAL]`, +inf where a query has no key. With
    gate_ptr also gated, residual + tanh(gate) * out, and out only if out_ptr is not None.

    Program (i, j): tile i of the samples' queries; query head j. Pointers that are None switch
    their part off; packed tensors come with cu_ptr and cu_keys_ptr, and T and N of 0.
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
    # The largest score is scaled after it is found, which needs a factor that is not negative; and
    # one of 0 would make NaN of the -inf of keys that are not there.
    factor = tl.abs(scale) * _LOG2E
    factor = tl.where(factor == 0, 1e-30, factor)

    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens
    p_q = q_ptr + head_of_sample(i_b, i_h, start, q_sb, q_st, q_sh, cu_ptr, VECTOR)
    row_q = p_q + tl.multiple_of(o_m.to(tl.int64) * q_st, VECTOR)
    q = load_rows(row_q, m_m, q_sd, D, 0, MAIN, False)
    q = tl.where(scale < 0, -q, q)
    q_tail = q
    if TAIL:
        q_tail = load_rows(row_q, m_m, q_sd, D, MAIN, TAIL, False)
        q_tail = tl.where(scale < 0, -q_tail, q_tail)
    p_k = k_ptr + head_of_sample(i_b, i_k, start_k, k_sb, k_st, k_sh, cu_ptr, VECTOR)
    p_v = v_ptr + head_of_sample(i_b, i_k, start_k, v_sb, v_st, v_sh, cu_ptr, VECTOR)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    # fmt: off
    if mask_ptr is not None:
        p_mask = mask_ptr + i_b * mask_sb
        for n in tl.range(0, keys, BLOCK_N):
            highest, total, acc, acc_tail = _attend(
                q, q_tail, highest, total, acc, acc_tail, p_k, p_v, p_mask, n, keys, factor,
                k_st, k_sd, v_st, v_sd, mask_sn,
                D, MAIN, TAIL, VECTOR, PRECISION, BLOCK_N, False,
            )
    else:
        whole = keys // BLOCK_N * BLOCK_N
        for n in tl.range(0, whole, BLOCK_N):
            highest, total, acc, acc_tail = _attend(
                q, q_tail, highest, total, acc, acc_tail, p_k, p_v, None, n, keys, factor,
                k_st, k_sd, v_st, v_sd, mask_sn,
                D, MAIN, TAIL, VECTOR, PRECISION, BLOCK_N, True,
            )
        for n in tl.range(whole, keys, BLOCK_N):
            highest, total, acc, acc_tail = _attend(
                q, q_tail, highest, total, acc, acc_tail, p_k, p_v, None, n, keys, factor,
                k_st, k_sd, v_st, v_sd, mask_sn,
                D, MAIN, TAIL, VECTOR, PRECISION, BLOCK_N, False,
            )
    # fmt: on
    alone = total == 0
    total = tl.where(alone, 1.0, total)
    share = 1 / total
    # Counted anew from the tile's first row: the numbers above would be kept through the loop.
    o_t = tl.arange(0, BLOCK_M)
    m_t = o_t < tokens - first
    row = i_b * T + start + first + o_t
    lse = tl.where(alone, float("inf"), highest + tl.log2(total))
    tl.store(lse_ptr + i_h * TOTAL + row, lse, mask=m_t)
    acc *= share[:, None]
    acc_tail *= share[:, None]
    o_out = row * H + i_h
    if out_ptr is not None:
        store_rows(out_ptr, o_out, acc, m_t, D, 0, MAIN)
        if TAIL:
            store_rows(out_ptr, o_out, acc_tail, m_t, D, MAIN, TAIL)
    if gate_ptr is not None:
        opening = tanh(tl.load(gate_ptr + i_h * gate_sh).to(tl.float32))
        o_r = head_of_sample(i_b, i_h, start, residual_sb, residual_st, residual_sh, cu_ptr, VECTOR)
        row_r = residual_ptr + o_r + tl.multiple_of(first.to(tl.int64) * residual_st, VECTOR)
        row_r += tl.multiple_of(o_t.to(tl.int64) * residual_st, VECTOR)
        residual = load_rows(row_r, m_t, residual_sd, D, 0, MAIN, False).to(tl.float32)
        store_rows(gated_ptr, o_out, residual + opening * acc, m_t, D, 0, MAIN)
        if TAIL:
            residual = load_rows(row_r, m_t, residual_sd, D, MAIN, TAIL, False).to(tl.float32)
            store_rows(gated_ptr, o_out, residual + opening * acc_tail, m_t, D, MAIN, TAIL)


def blocks(
    head_dim: int, itemsize: int, capability: tuple[int, int], masked: bool
) -> dict[str, int]:
    """Choose the blocks of queries and keys, the warps and the depth of the pipeline.

    Read off the compiled code: the largest blocks whose registers do not spill and whose shared
    memory the GPU has, 99 KiB on consumer cards and 227 KiB on those of data centres. A mask takes
    registers, and masked keys are texts, which are short.
    """
    if itemsize == 4:  # multiplied by the ordinary units, out of registers
        if head_dim <= 96:
            return sizes(32, 32, 4, 2)
        return sizes(64 if head_dim <= 128 else 32, 16, 8, 2)
    few = has_narrow_tail(head_dim)
    if capability[0] not in (9, 10):
        return sizes(128, 64, 4 if few else 8, 3) if head_dim <= 128 else sizes(64, 16, 4, 2)
    if head_dim > 128:
        return sizes(128, 32, 8, 2)
    if masked and few:
        return sizes(128 if capability[0] == 10 else 64, 64, 4, 3)
    return sizes(128, 64 if masked else 128, 8, 3 if head_dim <= 96 else 2)


def sizes(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    """Name the sizes as the kernels and Triton's launcher do."""
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
