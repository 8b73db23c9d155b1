"""Softmax attention of dense or packed samples, and the gated one to a text.

The kernels are in `attention_forward` and `attention_backward`; here are the functions to call,
their operators and launches. Packed samples are found by the kernels in the sums of their lengths,
which stay on the device: the lengths of a batch cost one small copy, the first time that they are
seen, and those that are on the device already are never read back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton.runtime.jit import JITFunction

from nextdit_kernels import attention_backward, attention_forward, operators, served
from nextdit_kernels.attention_backward import (
    gate_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from nextdit_kernels.attention_forward import attention_kernel
from nextdit_kernels.attention_tiles import split_head

__all__ = ["MAX_HEAD_DIM", "attention", "gated_cross_attention", "why_not"]

#: The widest head that the kernels hold.
MAX_HEAD_DIM = 256

# Products of float32 numbers keep all their digits, which tensor cores do not: "tf32x3" would come
# close with three products for each, but at head_dim 128 its code spills: for 8.0 at all sizes of
# blocks that were tried, for 9.0 and 10.0 at those large enough for the newer tensor cores.
_PRECISION = "ieee"

# The key gradient's loop is split into parts of at least so many steps, and into at most so many.
_LEAST_STEPS, _MOST_PARTS = 8, 16

# Numbers that the gate's gradient adds at a time.
_GATE_BLOCK = 1024


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why the kernels cannot serve these tensors, or None if they can.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[total_tokens, heads, head_dim]`.
        k: As `q`, with its own numbers of keys and heads.
        v: As `k`.

    Returns:
        A reason that names what is served, or None.

    >>> why_not(*(torch.zeros(5, 2, 8, dtype=torch.float64),) * 3)
    'q is torch.float64, k torch.float64 and v torch.float64; the kernel takes one of bfloat16, ...'
    """
    reason = served.why_not(attention_kernel, q=q, k=k, v=v)
    if reason is not None:
        return reason
    if q.dtype == torch.bfloat16 and not isinstance(attention_kernel, JITFunction):
        return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 in it"
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= MAX_HEAD_DIM:
        return f"head_dim is {q.shape[-1]}; the kernel takes multiples of 8 up to {MAX_HEAD_DIM}"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_key_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Attend from every query to all keys of its own sample.

    out = softmax(scale * q k^T) v

    Tensors are dense, one row per sample, or packed, one sample after another without padding.
    Keys and values serve heads / kv_heads neighbouring query heads each, and are not repeated. A
    query that has no key to attend to gets 0. Scores, softmax and sums are float32, and float32
    inputs are multiplied as such. Two launches give the gradients, the same bits
    every time; a third adds up their parts where keys are few.

    Differentiable once, in q, k and v; compiles without graph breaks.

    Args:
        q: Dense `[batch, tokens, heads, head_dim]`, or packed `[total_tokens, heads, head_dim]`;
            bfloat16, float16 or float32, any strides, head_dim a multiple of 8 up to 256.
        k: `[batch, keys, kv_heads, head_dim]`, or packed `[total_keys, kv_heads, head_dim]`.
        v: As `k`.
        lengths: Packed only: tokens of each sample, numbers on the host, 0 allowed; None is one
            sample.
        key_lengths: Packed only: keys of each sample, where they are not `lengths`.
        cu_seqlens: Packed only, instead of `lengths`: `[samples + 1]` int32 on the device of q,
            from 0 up to total_tokens. They stay there, so what they hold is not checked.
        cu_key_seqlens: As `cu_seqlens` for the keys, where they are not the same.
        key_mask: Dense only: `[batch, keys]` bool, True = attend.
        scale: Factor on the scores; None is 1 / sqrt(head_dim). A number, or float32 on the device
            of q: one number, `[samples]` or `[samples, heads]`. No number compiles anything again.

    Returns:
        As `q`, contiguous.

    Raises:
        ValueError: Shapes, lengths or arguments do not fit one another, the kernels do not serve
            such tensors (see `why_not`), or scale requires a gradient.

    Convention:
        Query head h reads key and value head h // (heads / kv_heads).

    Source: Dao et al., FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691).

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> q, k, v = (torch.ones(7, heads, 8, device=device) for heads in (4, 2, 2))
    >>> attention(q, k, v, lengths=(4, 3)).shape
    torch.Size([7, 4, 8])
    """
    samples = _samples(q, k, lengths, key_lengths, cu_seqlens, cu_key_seqlens)
    return _attention(q, k, v, *_scale(q, scale), key_mask, *samples)[0]


def gated_cross_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    out: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    cu_key_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Attend to a text, and add the result to `out` through the gate of each head, in one launch.

    y = out + tanh(gate) * softmax(scale * q keys^T) values

    The sum is float32 and rounded once. Differentiable once, in q, keys, values, gate and out;
    compiles without graph breaks. Where one of the first four requires a gradient, the softmax's
    own result is kept for it.

    Args:
        q: As in `attention`: the queries that `out` is the self-attention of.
        keys: As k in `attention`.
        values: As v in `attention`.
        gate: `[heads]`; bfloat16, float16 or float32.
        out: As `q`, any strides.
        lengths: As in `attention`.
        key_lengths: As in `attention`: packed only, keys of each sample's text.
        cu_seqlens: As in `attention`.
        cu_key_seqlens: As in `attention`.
        key_mask: As in `attention`: dense only, `[batch, keys]` bool, True = attend.
        scale: As in `attention`.

    Returns:
        As `q`, contiguous.

    Raises:
        ValueError: As `attention`, and where gate or out do not fit.

    Source: Zhang et al., LLaMA-Adapter (arXiv 2303.16199): attention behind a gate that starts at
        0; in Next-DiT, Lumina-Next (arXiv 2406.18583), over the keys of the text.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> q, text = torch.ones(2, 5, 4, 8, device=device), torch.ones(2, 3, 2, 8, device=device)
    >>> y = gated_cross_attention(q, text, text, torch.zeros(4, device=device), q)
    >>> torch.equal(y, q)  # a closed gate
    True
    """
    samples = _samples(q, keys, lengths, key_lengths, cu_seqlens, cu_key_seqlens)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values, gate))
    options = (*_scale(q, scale), key_mask, *samples)
    return _gated_attention(q, keys, values, gate, out, keep, *options)[0]


def _scale(q: Tensor, scale: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """Give the scale as a tensor or as a number, None being the default."""
    if isinstance(scale, Tensor):
        if scale.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "scale requires a gradient, which the kernels do not compute; detach it, or scale "
                "the queries"
            )
        return scale, None
    if scale is not None and torch.compiler.is_compiling():
        # As an argument of the operator a number would be a constant of the compiled code.
        return torch.full((1,), scale, device=q.device, dtype=torch.float32), None
    return None, scale


def _samples(
    q: Tensor,
    k: Tensor,
    lengths: Sequence[int] | None,
    key_lengths: Sequence[int] | None,
    cu_seqlens: Tensor | None,
    cu_key_seqlens: Tensor | None,
) -> tuple[Sequence[int] | None, Sequence[int] | None, Tensor | None, Tensor | None]:
    """Give lengths and their sums for queries and keys: one of both where packed, none if dense."""
    if q.ndim == 4:
        if any(x is not None for x in (lengths, key_lengths, cu_seqlens, cu_key_seqlens)):
            raise ValueError(
                f"q has shape {tuple(q.shape)}, which is dense, so lengths and cu_seqlens do not "
                "apply; pack to [total_tokens, heads, head_dim] or use key_mask"
            )
        return None, None, None, None
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("lengths and cu_seqlens say the same; give one of them")
    if key_lengths is not None and cu_key_seqlens is not None:
        raise ValueError("key_lengths and cu_key_seqlens say the same; give one of them")
    unknown = key_lengths is None and cu_key_seqlens is None
    if lengths is None and cu_seqlens is None:
        lengths = (q.shape[0],)
        key_lengths = (k.shape[0],) if unknown else key_lengths
    elif unknown:
        key_lengths, cu_key_seqlens = lengths, cu_seqlens
    return lengths, key_lengths, cu_seqlens, cu_key_seqlens


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    key_mask: Tensor | None,
    lengths: Sequence[int] | None,
    key_lengths: Sequence[int] | None,
    cu_seqlens: Tensor | None,
    cu_key_seqlens: Tensor | None,
) -> None:
    """Refuse whatever would make the kernels read outside their tensors or misread them."""
    if q.ndim not in (3, 4) or k.ndim != q.ndim or v.ndim != q.ndim:
        raise ValueError(
            f"{_shapes(q, k, v)} do not fit; expected all [batch, tokens, heads, head_dim] or all "
            "packed [total_tokens, heads, head_dim]"
        )
    if k.shape != v.shape or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{_shapes(q, k, v)} do not fit; expected k and v of one shape, and q of their batch "
            "and head_dim"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{_shapes(q, k, v)}: {q.shape[-2]} query heads cannot share {k.shape[-2]} key heads "
            "evenly; expected heads to be a multiple of kv_heads"
        )
    samples = q.shape[0]
    if q.ndim == 3:
        samples = _check_samples("lengths", lengths, "cu_seqlens", cu_seqlens, q)
        others = _check_samples("key_lengths", key_lengths, "cu_key_seqlens", cu_key_seqlens, k)
        if samples != others:
            raise ValueError(
                f"the queries are of {samples} samples and the keys of {others}; expected one "
                "length per sample in both"
            )
    if key_mask is not None:
        if q.ndim == 3:
            raise ValueError(
                "key_mask is for dense tensors; packed ones have no padding to mask, leave the "
                "keys out and give key_lengths"
            )
        fits = key_mask.shape == k.shape[:2] and key_mask.dtype == torch.bool
        if not (fits and key_mask.device == q.device):
            raise ValueError(
                f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)} on {key_mask.device}; "
                f"expected bool {tuple(k.shape[:2])} on {q.device}, True = attend"
            )
    if scales is not None:
        fits = scales.ndim == 0 or scales.shape in ((1,), (samples,), (samples, q.shape[-2]))
        if not (fits and scales.dtype == torch.float32 and scales.device == q.device):
            raise ValueError(
                f"scale is {scales.dtype} {tuple(scales.shape)} on {scales.device}; expected a "
                f"number, or float32 [1], [{samples}] or [{samples}, {q.shape[-2]}] on {q.device}"
            )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_gate(q: Tensor, gate: Tensor, residual: Tensor) -> None:
    """Refuse a gate or a residual that do not fit the queries."""
    fits = gate.shape == q.shape[-2:-1] and gate.device == q.device
    if not (fits and gate.dtype in served.DTYPES):
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}; expected one number per "
            f"query head, [{q.shape[-2]}], bfloat16, float16 or float32, on {q.device}"
        )
    if (residual.shape, residual.dtype, residual.device) != (q.shape, q.dtype, q.device):
        raise ValueError(
            f"out is {residual.dtype} {tuple(residual.shape)} on {residual.device}; expected it "
            f"like q, {q.dtype} {tuple(q.shape)} on {q.device}"
        )


def _check_backward(grad: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    """Refuse what the forward pass did not give."""
    fits = grad.shape == out.shape == q.shape and grad.dtype == out.dtype == q.dtype
    fits = fits and lse.shape == (q.shape[-2], math.prod(q.shape[:-2]))
    if not (fits and out.is_contiguous() and lse.is_contiguous()):
        raise ValueError(
            f"grad {tuple(grad.shape)}, out {tuple(out.shape)} and lse {tuple(lse.shape)} do not "
            f"fit; expected grad and a contiguous out like q {tuple(q.shape)}, {q.dtype}, and lse "
            "[heads, all tokens]"
        )


def _check_samples(
    name: str, lengths: Sequence[int] | None, cu_name: str, cu_seqlens: Tensor | None, x: Tensor
) -> int:
    """Check the lengths of the packed samples of x, and count them."""
    if lengths is not None:
        if any(length < 0 for length in lengths) or sum(lengths) != x.shape[0]:
            raise ValueError(
                f"{name} are {tuple(lengths)}, which sum to {sum(lengths)}; expected numbers of at "
                f"least 0 that sum to the {x.shape[0]} packed tokens"
            )
        return len(lengths)
    if cu_seqlens is None:
        raise ValueError(f"packed tensors need {name} or {cu_name}")
    fits = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] > 0 and cu_seqlens.dtype == torch.int32
    if not (fits and cu_seqlens.device == x.device and cu_seqlens.is_contiguous()):
        raise ValueError(
            f"{cu_name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}; "
            f"expected int32 [samples + 1], contiguous, on {x.device}"
        )
    return cu_seqlens.shape[0] - 1


@lru_cache(maxsize=256)
def _sums(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Put `[0, lengths[0], lengths[0] + lengths[1], ...]` on the device, once."""
    with torch.inference_mode(False):
        return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)


class _Shape(NamedTuple):
    """Where the samples of a call lie, as every kernel is told."""

    T: int
    N: int
    SAMPLES: int
    TOTAL: int
    H: int
    H_KV: int


class _Plan(NamedTuple):
    """What follows from the layout of a call's tensors."""

    shape: _Shape
    strides: tuple[int, ...]
    constants: dict[str, Any]
    case: tuple[int, int, tuple[int, int], bool]  # what the sizes of blocks depend on


class _Forward(NamedTuple):
    """What the forward kernel is told besides tensors and the scale."""

    grid: tuple[int, int]
    numbers: tuple[Any, ...]
    options: dict[str, int | None]
    lse: tuple[int, int]  # the shape
    scale: float  # the default


class _Call(NamedTuple):
    """What the backward kernels are told of a call."""

    plan: _Plan
    pointers: tuple[Tensor | None, ...]
    scale: float

    def arguments(self) -> tuple[Any, ...]:
        """Give the arguments that follow the tensors of the kernel's own."""
        return (*self.pointers, self.scale, *self.plan.shape, *self.plan.strides)


@served.remembered
def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: Tensor | None,
    gate: Tensor | None,
    scales: Tensor | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> _Plan:
    """Check the tensors, and plan a launch; arguments as those of `_call`."""
    _check(q, k, v, scales, key_mask, *samples)
    if gate is not None and other is not None:
        _check_gate(q, gate, other)
    _refuse_unserved(q, k, v)
    heads, kv_heads, width = q.shape[-2], k.shape[-2], q.shape[-1]
    if q.ndim == 4:
        batch, tokens = q.shape[:2]
        shape = _Shape(tokens, k.shape[1], batch, batch * tokens, heads, kv_heads)
    else:
        lengths, _, cu, _ = samples
        count = cu.shape[0] - 1 if lengths is None else len(lengths)
        shape = _Shape(0, 0, count, q.shape[0], heads, kv_heads)
    strides = [_strides(x) for x in (q, k, v, other) if x is not None]
    main, tail = split_head(width)
    constants = {
        "D": width,
        "MAIN": main,
        "TAIL": tail,
        "VECTOR": served.aligned(width, q.itemsize, *strides),
        "PRECISION": _PRECISION,
    }
    if other is None:
        strides.append((0, 0, 0, 1))
    s_scales, s_mask, s_gate = (0, 0), (0, 0), 0
    if scales is not None and scales.numel() > 1:
        s_scales = (scales.stride(0), scales.stride(1) if scales.ndim == 2 else 0)
    if key_mask is not None:
        s_mask = key_mask.stride()
    if gate is not None:
        s_gate = gate.stride(0)
    return _Plan(
        shape,
        (*(number for stride in strides for number in stride), *s_scales, *s_mask, s_gate),
        constants,
        (width, q.itemsize, _capability(q), key_mask is not None),
    )


@served.remembered
def _plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scales: Tensor | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> _Forward:
    """Check the tensors, and plan a launch of the forward kernel."""
    plan = _plan(q, k, v, residual, gate, scales, key_mask, *samples)
    shape = plan.shape
    constants = plan.constants | attention_forward.blocks(*plan.case)
    tiles = _tiles(shape.SAMPLES, shape.T, shape.TOTAL, constants["BLOCK_M"], q.ndim == 3)
    last, options = served.in_order(attention_kernel, constants)
    return _Forward(
        (tiles, shape.H if q.numel() else 0),
        (*shape, *plan.strides, *last),
        options,
        (shape.H, shape.TOTAL),
        1 / math.sqrt(q.shape[-1]),
    )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: Tensor | None,
    gate: Tensor | None,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    samples: tuple[Any, ...],
) -> _Call:
    """Gather what the backward kernels are told; other is the gradient of the result."""
    plan = _plan(q, k, v, other, gate, scales, key_mask, *samples)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return _Call(plan, _pointers(q, gate, scales, key_mask, *samples), scale)


def _pointers(
    q: Tensor,
    gate: Tensor | None,
    scales: Tensor | None,
    key_mask: Tensor | None,
    lengths: Sequence[int] | None,
    key_lengths: Sequence[int] | None,
    cu: Tensor | None,
    cu_keys: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Give the tensors that every kernel is told besides its own."""
    if lengths is not None:
        cu = _sums(tuple(lengths), q.device)
    if key_lengths is not None:
        cu_keys = _sums(tuple(key_lengths), q.device)
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8)
    return scales, key_mask, cu, cu_keys, gate


def _strides(x: Tensor) -> tuple[int, ...]:
    """Give the strides of batch, token, head and channel, 0 where one is never stepped over."""
    strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return tuple(strides) if x.ndim == 4 else (0, *strides)


def _tiles(samples: int, rows: int, total: int, block: int, packed: bool) -> int:
    """Count the tiles of the samples' rows, as `where_to_work` numbers them."""
    return total // block + samples if packed else samples * -(-rows // block)


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument."""
    served.launch(kernel, grid, arguments, constants)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _refuse_unserved(q: Tensor, k: Tensor, v: Tensor) -> None:
    reason = why_not(q, k, v)
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot attend with these tensors: {reason}")


def _run(
    plan: _Forward,
    tensors: tuple[Tensor | None, ...],
    pointers: tuple[Tensor | None, ...],
    scale: float | None,
) -> None:
    """Run the forward kernel on q, k, v, the residual, what it writes, and the pointers."""
    if 0 not in plan.grid:
        number = plan.scale if scale is None else float(scale)
        arguments = (*tensors, *pointers, number, *plan.numbers)
        served.launch(attention_kernel, plan.grid, arguments, plan.options)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Make room for the result and the logarithms of the sums, `[heads, all tokens]`."""
    tokens = q.shape[0] if q.ndim == 3 else q.shape[0] * q.shape[1]
    return _like(q), _float32(q, q.shape[-2], tokens)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _float32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; the operator's implementation on CUDA and in the interpreter."""
    plan = _plan_forward(q, k, v, None, None, scales, key_mask, *samples)
    out, lse = _like(q), _float32(q, *plan.lse)
    pointers = _pointers(q, None, scales, key_mask, *samples)
    _run(plan, (q, k, v, None, out, None, lse), pointers, scale)
    return out, lse


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> tuple[Tensor, Tensor]:
    """Check as the launch does, and give the outputs without numbers."""
    _check(q, k, v, scales, key_mask, *samples)
    return _outputs(q)


def _launch_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    residual: Tensor,
    keep: bool,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel with its epilogue; keep asks for the softmax's own result too."""
    plan = _plan_forward(q, k, v, residual, gate, scales, key_mask, *samples)
    gated, lse = _like(q), _float32(q, *plan.lse)
    out = _like(q) if keep else q.new_empty(0)
    pointers = _pointers(q, gate, scales, key_mask, *samples)
    _run(plan, (q, k, v, residual, out if keep else None, gated, lse), pointers, scale)
    return gated, out, lse


def _gated_outputs(q: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    gated, lse = _outputs(q)
    return gated, _like(q) if keep else q.new_empty(0), lse


def _fake_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    residual: Tensor,
    keep: bool,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, scales, key_mask, *samples)
    _check_gate(q, gate, residual)
    return _gated_outputs(q, keep)


def _launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gate: Tensor | None,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> tuple[Tensor, ...]:
    """Run the backward kernels, that of the queries first: it computes what the other one reads."""
    _check_backward(grad, q, out, lse)
    call = _call(q, k, v, grad, gate, scales, scale, key_mask, samples)
    shape, packed = call.plan.shape, q.ndim == 3
    grad_q, grad_k, grad_v, grad_gate = _gradients(q, k, v, gate)
    delta = _like(lse)
    if q.numel() > 0:
        constants = call.plan.constants | attention_backward.query_blocks(*call.plan.case)
        tiles = _tiles(shape.SAMPLES, shape.T, shape.TOTAL, constants["BLOCK_M"], packed)
        tensors = (q, k, v, grad, out, lse, delta, grad_q)
        _start(query_gradient_kernel, (tiles, shape.H), *tensors, *call.arguments(), **constants)
    if k.numel() > 0:
        constants = call.plan.constants | attention_backward.key_blocks(*call.plan.case)
        total = k.shape[0] if packed else shape.SAMPLES * shape.N
        tiles = _tiles(shape.SAMPLES, shape.N, total, constants["BLOCK_N"], packed)
        parts = _parts(shape, tiles, constants["BLOCK_M"], _processors(q))
        sums = (grad_k, grad_v) if parts == 1 else _float32(k, 2, parts, *k.shape).unbind()
        arguments = (q, k, v, grad, lse, delta, *sums, *call.arguments(), total)
        _start(key_gradient_kernel, (tiles, shape.H_KV, parts), *arguments, **constants)
        if parts > 1:
            grad_k, grad_v = (x.sum(0).to(k.dtype) for x in sums)
    if gate is not None:
        arguments = (delta, gate, grad_gate, shape.TOTAL, gate.stride(0))
        _start(gate_gradient_kernel, (shape.H,), *arguments, BLOCK=_GATE_BLOCK)
    return grad_q, grad_k, grad_v, grad_gate


def _parts(shape: _Shape, tiles: int, block: int, processors: int) -> int:
    """Count the parts of the key gradient's loop that fill the GPU where there are few keys."""
    steps = shape.TOTAL // max(1, shape.SAMPLES) // block * (shape.H // shape.H_KV)
    wanted = processors // max(1, tiles * shape.H_KV)
    return max(1, min(wanted, steps // _LEAST_STEPS, _MOST_PARTS))


def _gradients(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    """Make room for the gradients; that of a gate which is not there is empty."""
    grad_gate = q.new_empty(0) if gate is None else _like(gate)
    return _like(q), _like(k), _like(v), grad_gate


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gate: Tensor | None,
    scales: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    *samples: Any,
) -> tuple[Tensor, ...]:
    _check(q, k, v, scales, key_mask, *samples)
    _check_backward(grad, q, out, lse)
    return _gradients(q, k, v, gate)


class _Context(FunctionCtx):
    saved_tensors: tuple[Any, ...]
    scale: float | None
    lengths: list[Any]
    kept: bool


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scales, ctx.scale, key_mask, *ctx.lengths, cu_seqlens, cu_key_seqlens = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, scales, key_mask, cu_seqlens, cu_key_seqlens)


def _backward(ctx: _Context, grad: Tensor, grad_lse: object) -> tuple[Any, ...]:
    q, k, v, out, lse, scales, key_mask, *cu_seqlens = ctx.saved_tensors
    options = (None, scales, ctx.scale, key_mask, *ctx.lengths, *cu_seqlens)
    grads = _attention_backward(grad, q, k, v, out, lse, *options)
    return (*grads[:3], *(None,) * 7)


def _setup_gated_context(
    ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, v, gate, _, ctx.kept, scales, ctx.scale, key_mask, *ctx.lengths, cu, cu_keys = inputs
    _, out, lse = output
    ctx.mark_non_differentiable(out, lse)
    ctx.save_for_backward(q, k, v, out, lse, gate, scales, key_mask, cu, cu_keys)


def _gated_backward(ctx: _Context, grad: Tensor, *others: object) -> tuple[Any, ...]:
    if not ctx.kept:  # nothing but the residual requires a gradient
        return (*(None,) * 4, grad, *(None,) * 8)
    *tensors, gate, scales, key_mask, cu, cu_keys = ctx.saved_tensors
    options = (scales, ctx.scale, key_mask, *ctx.lengths, cu, cu_keys)
    grads = _attention_backward(grad, *tensors, gate, *options)
    return (*grads, grad, *(None,) * 8)


_SAMPLES = "SymInt[]? lengths, SymInt[]? key_lengths, Tensor? cu_seqlens, Tensor? cu_key_seqlens"
_OPTIONS = f"Tensor? scales, float? scale, Tensor? key_mask, {_SAMPLES}"

_attention = operators.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_gated_attention = operators.define(
    "gated_attention(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor residual, bool keep, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _launch_gated,
    _fake_gated,
    setup_context=_setup_gated_context,
    backward=_gated_backward,
)
_attention_backward = operators.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? gate, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
