"""SwiGLU: the gated product of a feed-forward layer, in one launch each way.

Without fusion silu writes a tensor as wide as the hidden layer, and autograd keeps it. Here only
gate and up are kept, and the backward pass computes silu again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nextdit_kernels import operators, served

__all__ = ["swiglu", "swiglu_backward_kernel", "swiglu_kernel", "why_not"]

# Elements of a tile, tokens times channels; channels of a tile, at most.
_TILE, _WIDE = 2048, 1024


@triton.jit
def _tile(T: tl.tensor, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    """Give this program's sample, tokens and channels, and the mask of those that exist."""
    blocks = (T + BLOCK_T - 1) // BLOCK_T
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    return i_b, o_t, o_w, (o_t[:, None] < T) & (o_w[None, :] < W)


@triton.jit
def _sigmoid(x: tl.tensor):
    """Compute 1 / (1 + exp(-x)) without an exponential that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _load(
    x_ptr: tl.tensor,
    i_b: tl.tensor,
    o_t: tl.tensor,
    o_w: tl.tensor,
    m: tl.tensor,
    s_b: tl.tensor,
    s_t: tl.tensor,
    s_w: tl.tensor,
    VECTOR: tl.constexpr,
):
    """Load a tile as float32, whatever its strides."""
    row = tl.multiple_of(i_b * s_b + o_t.to(tl.int64) * s_t, VECTOR)
    p_x = x_ptr + row[:, None] + (o_w.to(tl.int64) * s_w)[None, :]
    return tl.load(p_x, mask=m, other=0.0).to(tl.float32)


# Lengths and strides are not specialised, so that another resolution does not compile the kernels
# again; only a channel stride of 1 is.
@triton.jit(do_not_specialize=["T", "gate_sb", "gate_st", "up_sb", "up_st"])
def swiglu_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    T: tl.tensor,
    gate_sb: tl.tensor,
    gate_st: tl.tensor,
    gate_sw: tl.tensor,
    up_sb: tl.tensor,
    up_st: tl.tensor,
    up_sw: tl.tensor,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write silu(gate) * up, `[B, T, W]`, into a contiguous output."""
    i_b, o_t, o_w, m = _tile(T, W, BLOCK_T, BLOCK_W)
    gate = _load(gate_ptr, i_b, o_t, o_w, m, gate_sb, gate_st, gate_sw, VECTOR)
    up = _load(up_ptr, i_b, o_t, o_w, m, up_sb, up_st, up_sw, VECTOR)
    out = gate * _sigmoid(gate) * up
    p_out = out_ptr + ((i_b * T + o_t) * W)[:, None] + o_w[None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T", "grad_sb", "grad_st", "gate_sb", "gate_st", "up_sb", "up_st"])
def swiglu_backward_kernel(
    grad_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    grad_up_ptr: tl.tensor,
    T: tl.tensor,
    grad_sb: tl.tensor,
    grad_st: tl.tensor,
    grad_sw: tl.tensor,
    gate_sb: tl.tensor,
    gate_st: tl.tensor,
    gate_sw: tl.tensor,
    up_sb: tl.tensor,
    up_st: tl.tensor,
    up_sw: tl.tensor,
    W: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the gradients to gate and up, each `[B, T, W]` and contiguous.

    With s = sigmoid(gate): silu = gate s and silu' = s (1 + gate (1 - s)) = s + silu (1 - s).
    """
    i_b, o_t, o_w, m = _tile(T, W, BLOCK_T, BLOCK_W)
    grad = _load(grad_ptr, i_b, o_t, o_w, m, grad_sb, grad_st, grad_sw, VECTOR)
    gate = _load(gate_ptr, i_b, o_t, o_w, m, gate_sb, gate_st, gate_sw, VECTOR)
    up = _load(up_ptr, i_b, o_t, o_w, m, up_sb, up_st, up_sw, VECTOR)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    o_out = ((i_b * T + o_t) * W)[:, None] + o_w[None, :]
    tl.store(grad_gate_ptr + o_out, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=m)
    tl.store(grad_up_ptr + o_out, (grad * silu).to(grad_up_ptr.dtype.element_ty), mask=m)


def why_not(gate: Tensor, up: Tensor) -> str | None:
    """Say why the kernel cannot serve these tensors, or None if it can.

    Args:
        gate: `[..., width]`.
        up: As `gate`.

    Returns:
        A reason that names what is served, or None.

    >>> why_not(torch.zeros(8, dtype=torch.float64), torch.zeros(8))
    'gate is torch.float64 and up torch.float32; the kernel takes one of bfloat16, float16, float32'
    """
    return served.why_not(swiglu_kernel, gate=gate, up=up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply `up` by silu of `gate`, in one launch.

    y = silu(gate) up;  silu(x) = x / (1 + exp(-x))

    The arithmetic is float32 and the result is rounded once. Out of place; differentiable once, in
    both, keeping nothing but the inputs; compiles without graph breaks.

    Args:
        gate: `[..., width]`; bfloat16, float16 or float32, any strides, also the two halves of one
            projection's output. More than three dimensions are copied where their strides do not
            let the leading ones merge.
        up: As `gate`, same shape and dtype.

    Returns:
        `[..., width]`, contiguous, same dtype.

    Raises:
        ValueError: The shapes differ, or the kernel does not serve such tensors (see `why_not`).

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), eq. 5 between its linear
        layers.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> swiglu(torch.tensor([0.0, 90.0], device=device), torch.tensor([5.0, 2.0], device=device))
    tensor([  0., 180.]...)
    """
    return _swiglu(gate, up)


def _check(gate: Tensor, up: Tensor) -> None:
    """Refuse whatever would make the kernel read outside its tensors."""
    if gate.shape != up.shape or gate.ndim == 0:
        raise ValueError(
            f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit; expected the same "
            "shape [..., width] twice"
        )


def _as_samples(x: Tensor) -> Tensor:
    """View as `[batch, tokens, width]`; a copy only where more dimensions do not merge."""
    if x.ndim == 3:
        return x
    return x.flatten(0, -3) if x.ndim > 3 else x[(None,) * (3 - x.ndim)]


class _Plan(NamedTuple):
    grid: tuple[int, int]
    numbers: tuple[int, ...]
    constants: dict[str, Any]


@served.remembered
def _plan(*inputs: Tensor) -> _Plan:
    """Check gate and up, or the gradient before them, and give what the kernel is told besides."""
    *grads, gate, up = inputs
    for x in (gate, *grads):
        _check(x, up)
    reason = why_not(gate, up)
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot take these tensors: {reason}")
    samples = [_as_samples(x) for x in inputs]
    batch, tokens, width = samples[0].shape
    block_w = min(_WIDE, max(16, served.power_of_2(width)))
    block_t = _TILE // block_w
    # A dimension of one sample or token is never stepped over, so that its stride says nothing.
    strides = [
        (
            x.stride(0) if batch > 1 else 0,
            x.stride(1) if tokens > 1 else 0,
            x.stride(2) if width > 1 else 1,
        )
        for x in samples
    ]
    constants = {
        "W": width,
        "VECTOR": served.aligned(width, gate.itemsize, *strides),
        "BLOCK_T": block_t,
        "BLOCK_W": block_w,
    }
    grid = (batch * served.blocks(tokens, block_t), served.blocks(width, block_w))
    return _Plan(grid, (tokens, *(number for stride in strides for number in stride)), constants)


def _run(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], plan: _Plan) -> None:
    """Launch a kernel over inputs of any strides, and outputs as `_outputs` makes them."""
    if 0 in plan.grid:
        return
    samples = (_as_samples(x) for x in inputs)
    served.launch(kernel, plan.grid, (*samples, *outputs, *plan.numbers), plan.constants)


def _outputs(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count))


def _launch(gate: Tensor, up: Tensor) -> Tensor:
    """Run the kernel; the operator's implementation on CUDA and in the interpreter."""
    plan = _plan(gate, up)
    (out,) = _outputs(gate, 1)
    _run(swiglu_kernel, (gate, up), (out,), plan)
    return out


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    """Check as the launch does, and give the output without numbers."""
    _check(gate, up)
    return _outputs(gate, 1)[0]


def _launch_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    plan = _plan(grad, gate, up)
    outputs = _outputs(gate, 2)
    _run(swiglu_backward_kernel, (grad, gate, up), outputs, plan)
    return outputs


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    _check(gate, up)
    _check(grad, up)
    return _outputs(gate, 2)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]


def _setup_context(ctx: _Context, inputs: tuple[Tensor, Tensor], output: object) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu = operators.define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    _launch,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_swiglu_backward = operators.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
