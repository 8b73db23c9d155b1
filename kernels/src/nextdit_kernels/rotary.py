"""Rotary embedding: turn the channel pairs of queries and keys, both in one launch.

One kernel serves forward and backward, which turns the gradients back by the opposite angle. A
program owns a block of tokens, reads their cosines and sines once, and walks over a few heads:
a two-dimensional tile, since a tile with a head dimension would hold the table once per head.

Head sizes such as 72 leave strides that 16 does not divide, for which Triton would fall back to
loads of 2 bytes. The launch therefore works out how many neighbouring elements every stride keeps
aligned and tells the compiler, so that runtime strides still give loads of 16 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nextdit_kernels import operators, served

__all__ = [
    "MAX_HEAD_DIM",
    "check",
    "rotate",
    "rotate_",
    "rotate_qk_kernel",
    "strides",
    "why_not",
]

#: The widest head that one tile holds.
MAX_HEAD_DIM = 256

# Elements of a tile, tokens times channels; heads that one program walks over.
_TILE, _HEADS = 2048, 8


@triton.jit
def _turn_heads(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    i_b: tl.tensor,
    o_t: tl.tensor,
    i_h: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    s_b: tl.tensor,
    s_t: tl.tensor,
    s_h: tl.tensor,
    s_d: tl.tensor,
    D: tl.constexpr,
    IN_PLACE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn BLOCK_H heads, from i_h * BLOCK_H on, of the tokens o_t of sample i_b."""
    o_d = tl.arange(0, BLOCK_D)
    m = (o_t[:, None] < T) & (o_d[None, :] < D)
    row_x = tl.multiple_of(i_b * s_b + o_t.to(tl.int64) * s_t, VECTOR)
    row_y = (i_b * T + o_t) * H * D
    p_x = x_ptr + row_x[:, None] + (o_d.to(tl.int64) * s_d)[None, :]
    p_y = y_ptr + row_y[:, None] + o_d[None, :]
    for i in range(BLOCK_H):
        h = i_h.to(tl.int64) * BLOCK_H + i
        # A block, not a scalar: the interpreter of Triton 3.9 refuses a scalar in a mask.
        m_h = m & (tl.zeros_like(o_t)[:, None] + h < H)
        x = tl.load(p_x + tl.multiple_of(h * s_h, VECTOR), mask=m_h, other=0.0)
        pairs = tl.reshape(x.to(tl.float32), (BLOCK_T, BLOCK_D // 2, 2))
        even, odd = tl.split(pairs)
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        y = tl.reshape(turned, (BLOCK_T, BLOCK_D)).to(x.dtype)
        if IN_PLACE:
            tl.store(p_x + tl.multiple_of(h * s_h, VECTOR), y, mask=m_h)
        else:
            tl.store(p_y + h * D, y, mask=m_h)


# Lengths, head counts and strides are not specialised, so that another resolution does not compile
# the kernel again; only a channel stride of 1 is.
@triton.jit(
    do_not_specialize=[
        *("T", "H_Q", "H_K", "q_sb", "q_st", "q_sh", "k_sb", "k_st", "k_sh"),
        *("cos_sb", "cos_st", "sin_sb", "sin_st"),
    ]
)
def rotate_qk_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    T: tl.tensor,
    H_Q: tl.tensor,
    H_K: tl.tensor,
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
    D: tl.constexpr,
    CONJUGATE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    VECTOR: tl.constexpr,
    TABLE_VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn q `[B, T, H_Q, D]` and k `[B, T, H_K, D]`, into contiguous outputs or where they are.

    Program (i, j): sample and token block i; the j-th block of heads, those of q before those of k.
    """
    blocks = (T + BLOCK_T - 1) // BLOCK_T
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_p = tl.arange(0, BLOCK_D // 2)
    m = (o_t[:, None] < T) & (o_p[None, :] < D // 2)
    row_cos = tl.multiple_of(i_b * cos_sb + o_t.to(tl.int64) * cos_st, TABLE_VECTOR)
    row_sin = tl.multiple_of(i_b * sin_sb + o_t.to(tl.int64) * sin_st, TABLE_VECTOR)
    p_cos = cos_ptr + row_cos[:, None] + (o_p.to(tl.int64) * cos_sp)[None, :]
    p_sin = sin_ptr + row_sin[:, None] + (o_p.to(tl.int64) * sin_sp)[None, :]
    cos = tl.load(p_cos, mask=m, other=0.0)
    sin = tl.load(p_sin, mask=m, other=0.0)
    if CONJUGATE:
        sin = -sin
    i_h = tl.program_id(1)
    q_blocks = (H_Q + BLOCK_H - 1) // BLOCK_H
    # fmt: off
    if i_h < q_blocks:
        _turn_heads(
            q_ptr, q_out_ptr, cos, sin, i_b, o_t, i_h, T, H_Q, q_sb, q_st, q_sh, q_sd,
            D, IN_PLACE, VECTOR, BLOCK_H, BLOCK_T, BLOCK_D,
        )
    else:
        _turn_heads(
            k_ptr, k_out_ptr, cos, sin, i_b, o_t, i_h - q_blocks, T, H_K, k_sb, k_st, k_sh, k_sd,
            D, IN_PLACE, VECTOR, BLOCK_H, BLOCK_T, BLOCK_D,
        )
    # fmt: on


def why_not(q: Tensor, k: Tensor) -> str | None:
    """Say why the kernel cannot serve these tensors, or None if it can.

    Args:
        q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.

    Returns:
        A reason that names what is served, or None.

    >>> why_not(torch.zeros(5, 2, 8, dtype=torch.float64), torch.zeros(5, 2, 8))
    'q is torch.float64 and k torch.float32; the kernel takes one of bfloat16, float16, float32'
    """
    reason = served.why_not(rotate_qk_kernel, q=q, k=k)
    if reason is not None:
        return reason
    if q.shape[-1] % 2 or q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim is {q.shape[-1]}; the kernel takes even ones up to {MAX_HEAD_DIM}"
    return None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, pair of channels by pair, in one launch.

    y[2m] = x[2m] cos - x[2m+1] sin;  y[2m+1] = x[2m] sin + x[2m+1] cos

    The arithmetic is float32 and the result is rounded once. Out of place; differentiable, to any
    order, in q and k but not in cos and sin; compiles without graph breaks.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[tokens, heads, head_dim]`; bfloat16,
            float16 or float32, any strides, head_dim even and at most 256.
        k: As `q`, with its own number of heads.
        cos: `[tokens, pairs]`, or for dense q `[batch or 1, tokens, pairs]`, any strides; float32.
        sin: As `cos`.

    Returns:
        The rotated `(q, k)`, contiguous, same shapes and dtypes.

    Raises:
        ValueError: The shapes do not fit one another, the kernel does not serve such tensors (see
            `why_not`), or cos or sin requires a gradient.

    Convention:
        Adjacent channels form a pair; positive angles turn channel 2m towards channel 2m + 1:
        (1, 0) at angle pi/2 becomes (0, 1).

    Source: Su et al., RoFormer (arXiv 2104.09864), eq. 34, with the pairs of adjacent channels.
        One kernel for both directions by the sign of sine, after flash-attention's `rotary.py`.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> x = torch.tensor([[[1.0, 0.0]]], device=device)  # one token, one head, one pair
    >>> rotate(x, x, torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device))[0].tolist()
    [[[0.0, 1.0]]]
    """
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(
            "cos or sin requires a gradient, which the kernel does not compute; detach them, or "
            "use the backend 'reference' of rope3d to learn frequencies or positions"
        )
    return _rotate_qk(q, k, cos, sin, False)


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys where they are, in one launch and without further memory.

    Eagerly, and not recorded by autograd; `rope3d.rotate(..., inplace=True)` takes care of both.

    Args:
        q: As in `rotate`, written to; no two elements of q and k may share memory.
        k: As `q`, with its own number of heads.
        cos: As in `rotate`.
        sin: As `cos`.

    Raises:
        ValueError: As in `rotate`.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> q, k = (torch.tensor([[[1.0, 0.0]]], device=device) for _ in range(2))
    >>> rotate_(q, k, torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device))
    >>> q.tolist()
    [[[0.0, 1.0]]]
    """
    _run(q, k, q, k, cos, sin, _plan(q, k, cos, sin, False, True))


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse whatever would make the kernel read outside its tensors or misread them."""
    tables = (cos, sin)
    if any(table.dtype != torch.float32 or table.device != q.device for table in tables):
        raise ValueError(
            f"cos is {cos.dtype} on {cos.device} and sin {sin.dtype} on {sin.device}; expected "
            f"float32 on {q.device}"
        )
    fits = q.ndim in (3, 4) and k.ndim == q.ndim and cos.ndim in (2, q.ndim - 1)
    fits = fits and (*q.shape[:-2], q.shape[-1]) == (*k.shape[:-2], k.shape[-1])
    fits = fits and cos.shape == sin.shape and cos.shape[-1] * 2 == q.shape[-1]
    fits = fits and cos.shape[-2] == q.shape[-3]
    if not (fits and (cos.ndim == 2 or cos.shape[0] in (1, q.shape[0]))):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and sin "
            f"{tuple(sin.shape)} do not fit; expected q and k [batch, tokens, heads, 2 * pairs] "
            "with cos and sin [tokens, pairs] or [batch or 1, tokens, pairs], or q and k "
            "[tokens, heads, 2 * pairs] with cos and sin [tokens, pairs]"
        )


def strides(x: Tensor, ndim: int) -> tuple[int, ...]:
    """Give the strides with a batch dimension in front, 0 where one sample serves them all."""
    if x.ndim < ndim or x.shape[0] == 1:
        return (0, *x.stride()[x.ndim - ndim + 1 :])
    return x.stride()


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, conjugate: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel; the operator's implementation on CUDA and in the interpreter."""
    plan = _plan(q, k, cos, sin, conjugate, False)
    q_out, k_out = _outputs(q, k)
    _run(q, k, q_out, k_out, cos, sin, plan)
    return q_out, k_out


class _Plan(NamedTuple):
    grid: tuple[int, int]
    numbers: tuple[Any, ...]  # all that follows the tensors


@served.remembered
def _plan(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, conjugate: bool, in_place: bool) -> _Plan:
    """Check the tensors, and give what the kernel is told besides them."""
    check(q, k, cos, sin)
    reason = why_not(q, k)
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot rotate these tensors: {reason}")
    batch = q.shape[0] if q.ndim == 4 else 1
    tokens, heads, width = q.shape[-3:]
    kv_heads = k.shape[-2]
    block_d = max(16, served.power_of_2(width))
    block_t = _TILE // block_d
    grid = (
        batch * served.blocks(tokens, block_t) if width else 0,
        served.blocks(heads, _HEADS) + served.blocks(kv_heads, _HEADS),
    )
    s_q, s_k = strides(q, 4), strides(k, 4)
    s_cos, s_sin = strides(cos, 3), strides(sin, 3)
    constants = {
        "D": width,
        "CONJUGATE": conjugate,
        "IN_PLACE": in_place,
        "VECTOR": served.aligned(width, q.itemsize, s_q, s_k),
        "TABLE_VECTOR": served.aligned(width // 2, cos.itemsize, s_cos, s_sin),
        "BLOCK_H": _HEADS,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
    }
    numbers = (tokens, heads, kv_heads, *s_q, *s_k, *s_cos, *s_sin)
    return _Plan(grid, (*numbers, *served.in_order(rotate_qk_kernel, constants)[0]))


def _run(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, plan: _Plan
) -> None:
    if 0 in plan.grid:
        return
    arguments = (q, k, q_out, k_out, cos, sin, *plan.numbers)
    served.launch(rotate_qk_kernel, plan.grid, arguments, {})


def _outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> tuple[Tensor, Tensor]:
    """Check as the launch does, and give the outputs without numbers."""
    check(q, k, cos, sin)
    return _outputs(q, k)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]
    conjugate: bool


def _setup_context(
    ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: object
) -> None:
    _, _, cos, sin, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin)


def _backward(
    ctx: _Context, grad_q: Tensor, grad_k: Tensor
) -> tuple[Tensor, Tensor, None, None, None]:
    """Turn the gradients back: the transpose of a rotation is its inverse."""
    grads = _rotate_qk(grad_q, grad_k, *ctx.saved_tensors, not ctx.conjugate)
    return (*grads, None, None, None)


_rotate_qk = operators.define(
    "rotate_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, bool conjugate) -> (Tensor, Tensor)",
    _launch,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
