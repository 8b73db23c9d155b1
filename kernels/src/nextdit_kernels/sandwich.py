"""The norms around a layer: what is served, how it is launched, and the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nextdit_kernels import operators, served
from nextdit_kernels.sandwich_kernels import sandwich_backward_kernel, sandwich_kernel

__all__ = [
    "MAX_WIDTH",
    "gate_residual",
    "norm_modulate",
    "sandwich_backward_kernel",
    "sandwich_kernel",
    "why_not_gate_residual",
    "why_not_norm_modulate",
]

#: The widest row that one program holds.
MAX_WIDTH = 8192

# Elements of a tile, tokens times channels, at least, and those of one warp: 16 per thread.
_TILE = _PER_WARP = 512

# Registers of a thread of the forward kernel in one row per tile. Left alone, the compiler for some
# GPUs stops at 48 and spills one; in several rows per tile it needs a few more than these.
_REGISTERS = 64

# Bytes of the narrowest element, which needs the most neighbours for the widest load.
_NARROWEST = 2

# Tokens of a program, at most and at least. Many amortise the modulation and the partial rows of
# the gradients; few leave programs for the whole GPU, which _PROGRAMS of them should fill.
_MOST, _FEWEST, _PROGRAMS = 32, 8, 512


def why_not_norm_modulate(x: Tensor, weight: Tensor | None, scale: Tensor) -> str | None:
    """Say why the kernel cannot serve these tensors, or None if it can.

    Args:
        x: `[batch, tokens, width]`.
        weight: `[width]`, or None.
        scale: `[batch, width]`, `[batch, 1, width]` or `[batch, tokens, width]`.

    Returns:
        A reason that names what is served, or None.

    >>> why_not_norm_modulate(torch.zeros(1, dtype=torch.float64), None, torch.zeros(1))
    'x is torch.float64; the kernel takes one of bfloat16, float16, float32'
    """
    return _why_not(x=x, weight=weight, scale=scale)


def why_not_gate_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor) -> str | None:
    """Say why the kernel cannot serve these tensors, or None if it can.

    Args:
        x: `[batch, tokens, width]`.
        y: As `x`.
        weight: `[width]`.
        gate: `[batch, width]`, `[batch, 1, width]` or `[batch, tokens, width]`.

    Returns:
        A reason that names what is served, or None.
    """
    return _why_not(x=x, y=y, weight=weight, gate=gate)


def _why_not(x: Tensor, **others: Tensor | None) -> str | None:
    reason = served.why_not(sandwich_kernel, x=x)
    if reason is not None:
        return reason
    for name, other in others.items():
        if other is not None and other.dtype not in served.DTYPES:
            return f"{name} is {other.dtype}; the kernel takes one of bfloat16, float16, float32"
        if other is not None and other.device != x.device:
            return f"x is on {x.device} and {name} on {other.device}; the kernel needs one device"
    if x.shape[-1] > MAX_WIDTH:
        return f"rows are {x.shape[-1]} wide; the kernel takes at most {MAX_WIDTH}"
    return None


def norm_modulate(
    x: Tensor, weight: Tensor | None, scale: Tensor, *, eps: float, centred: bool = False
) -> Tensor:
    """Normalise rows and scale them by the modulation, in one launch.

    y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale)

    The arithmetic is float32 and the result is rounded once. Differentiable once, in x, weight and
    scale, keeping 4 bytes per row besides its inputs; compiles without graph breaks.

    Args:
        x: `[batch, tokens, width]`, any strides, width up to 8192. Each of the three is bfloat16,
            float16 or float32.
        weight: `[width]`; None for ones.
        scale: `[batch, width]` or `[batch, 1, width]`, one row for a sample, or
            `[batch, tokens, width]`, any strides.
        eps: Added to the mean square.
        centred: Take off the mean of a row first: a LayerNorm rather than an RMSNorm.

    Returns:
        `[batch, tokens, width]`, contiguous, of the dtype that x and scale promote to.

    Raises:
        ValueError: The shapes do not fit one another, or the kernel does not serve such tensors
            (see `why_not_norm_modulate`).

    Source: Lumina-Next (arXiv 2406.18583) §2; Zhang and Sennrich, Root Mean Square Layer
        Normalization (arXiv 1910.07467), eq. 4.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> x, weight = torch.tensor([[[3.0, -3.0]]], device=device), torch.ones(2, device=device)
    >>> norm_modulate(x, weight, torch.ones(1, 2, device=device), eps=0.0).tolist()
    [[[2.0, -2.0]]]
    """
    return _norm_modulate(x, weight, scale, eps, centred)[0]


def gate_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, *, eps: float) -> Tensor:
    """Normalise rows of y, gate them and add them to x, in one launch.

    z = x + tanh(gate) * y / sqrt(mean(y^2) + eps) * weight

    The arithmetic is float32 and the result is rounded once. Out of place; differentiable once, in
    all four, keeping 4 bytes per row besides y, weight and gate; compiles without graph breaks.

    Args:
        x: `[batch, tokens, width]`, any strides, width up to 8192. Each of the four is bfloat16,
            float16 or float32.
        y: As `x`, with strides of its own.
        weight: `[width]`.
        gate: `[batch, width]` or `[batch, 1, width]`, one row for a sample, or
            `[batch, tokens, width]`, any strides.
        eps: Added to the mean square.

    Returns:
        `[batch, tokens, width]`, contiguous, of the dtype that x, y and gate promote to.

    Raises:
        ValueError: The shapes do not fit one another, or the kernel does not serve such tensors
            (see `why_not_gate_residual`).

    Source: Lumina-Next (arXiv 2406.18583) §2.

    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU: TRITON_INTERPRET=1
    >>> x, weight = torch.tensor([[[3.0, -3.0]]], device=device), torch.ones(2, device=device)
    >>> gate_residual(x, x, weight, torch.full((1, 2), 9.0, device=device), eps=0.0).tolist()
    [[[4.0, -4.0]]]
    """
    return _gate_residual(x, y, weight, gate, eps)[0]


def _check(m: Tensor, weight: Tensor | None, x: Tensor, *others: Tensor) -> None:
    """Refuse whatever would make the kernels read outside their tensors."""
    fits = x.ndim == 3 and all(other.shape == x.shape for other in others)
    fits = fits and (weight is None or weight.shape == x.shape[-1:])
    fits = fits and m.ndim in (2, 3) and (m.shape[0], m.shape[-1]) == (x.shape[0], x.shape[-1])
    if not (fits and (m.ndim == 2 or m.shape[1] in (1, x.shape[1]))):
        rows = " and ".join(str(tuple(other.shape)) for other in (x, *others))
        size = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"rows {rows}, weight {size} and modulation {tuple(m.shape)} do not fit; expected rows "
            "of one shape [batch, tokens, width], weight [width], and scale or gate "
            "[batch, width], [batch, 1, width] or [batch, tokens, width]"
        )


def _tile(width: int) -> tuple[int, int]:
    """Give the rows and the channels of a tile, both powers of two."""
    block_w = max(16, served.power_of_2(width))
    return max(1, _TILE // block_w), block_w


def _options(kernel: object, block_t: int, block_w: int) -> dict[str, int | None]:
    """Give the compiler's options for a tile."""
    bounded = kernel is sandwich_kernel and block_t == 1
    return {
        "num_warps": block_t * block_w // _PER_WARP,
        "maxnreg": _REGISTERS if bounded else None,
    }


def _tokens_per_program(tokens: int, block_t: int) -> int:
    """Choose a multiple of the rows of a tile."""
    enough = served.power_of_2(tokens // _PROGRAMS)
    return max(block_t, min(_MOST, max(_FEWEST, enough)))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Give strides of samples, tokens and channels; a size of 1 is never stepped over."""
    batch, tokens, width = x.shape
    return (
        x.stride(0) if batch > 1 else 0,
        x.stride(1) if tokens > 1 else 0,
        x.stride(2) if width > 1 else 1,
    )


class _Plan(NamedTuple):
    grid: tuple[int]
    sizes: tuple[int, int]  # tokens, and steps of a program
    numbers: tuple[Any, ...]  # all that follows the last number of the call
    options: dict[str, int | None]
    per_token: bool


def _plan(
    kernel: object,
    rows: tuple[Tensor, Tensor],
    weight: Tensor | None,
    m: Tensor,
    **flags: bool,
) -> _Plan:
    """Give what either kernel is told besides its tensors.

    Args:
        kernel: One of the two.
        rows: Its two inputs `[batch, tokens, width]`; the second is what is normed.
        weight: `[width]` or None.
        m: The modulation.
        **flags: Constants of the kernel that are asked for.

    Returns:
        The plan.
    """
    batch, tokens, width = rows[-1].shape
    block_t, block_w = _tile(width)
    count = _tokens_per_program(batch * tokens, block_t)
    m = m if m.ndim == 3 else m[:, None]
    first, second, third = (_strides(tensor) for tensor in (*rows, m))
    (weight_stride,) = weight.stride() if weight is not None and width > 1 else (1,)
    constants = {
        "W": width,
        "WEIGHTED": weight is not None,
        "PER_TOKEN": m.shape[1] > 1,
        "VECTOR": served.aligned(width, _NARROWEST, first, second, third),
        "BLOCK_T": block_t,
        "BLOCK_W": block_w,
        **_options(kernel, block_t, block_w),
        **flags,
    }
    last, options = served.in_order(kernel, constants)
    grid = (batch * served.blocks(tokens, count) if width else 0,)
    strides = (*first, *second, weight_stride, *third)
    return _Plan(grid, (tokens, count // block_t), (*strides, *last), options, m.shape[1] > 1)


@served.remembered
def _plan_norm_modulate(x: Tensor, weight: Tensor | None, scale: Tensor, centred: bool) -> _Plan:
    _check(scale, weight, x)
    _refuse(why_not_norm_modulate(x, weight, scale))
    return _plan(sandwich_kernel, (x, x), weight, scale, GATED=False, CENTRED=centred)


@served.remembered
def _plan_gate_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor) -> _Plan:
    _check(gate, weight, x, y)
    _refuse(why_not_gate_residual(x, y, weight, gate))
    return _plan(sandwich_kernel, (x, y), weight, gate, GATED=True, CENTRED=False)


@served.remembered
def _plan_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    m: Tensor,
    gated: bool,
    centred: bool,
    asked: Sequence[bool],
) -> _Plan:
    _check(m, weight, x, grad)
    _refuse(_why_not(x, grad=grad, weight=weight, modulation=m))
    flags = dict(zip(("GRAD_X", "GRAD_WEIGHT", "GRAD_M"), asked, strict=True))
    flags |= {"GATED": gated, "CENTRED": centred}
    return _plan(sandwich_backward_kernel, (grad, x), weight, m, **flags)


def _start(kernel: Any, plan: _Plan, pointers: tuple[Tensor, ...], *numbers: float) -> None:
    """Launch either kernel.

    Args:
        kernel: One of the two.
        plan: What it is told besides tensors.
        pointers: Rows, weight, modulation, and what else it has.
        numbers: Those between the number of steps and the strides.
    """
    arguments = (*pointers, *plan.sizes, *numbers, *plan.numbers)
    served.launch(kernel, plan.grid, arguments, plan.options)


def _outputs(rows: tuple[Tensor, ...], m: Tensor) -> tuple[Tensor, Tensor]:
    """Make the output, in the dtype that PyTorch's operators would give, and 1 / rms."""
    x = rows[-1]
    dtype = m.dtype
    for tensor in rows:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot take these tensors: {reason}")


def _launch_norm_modulate(
    x: Tensor, weight: Tensor | None, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel; the operator's implementation on CUDA and in the interpreter."""
    plan = _plan_norm_modulate(x, weight, scale, centred)
    outputs = _outputs((x,), scale)
    if 0 not in plan.grid:
        pointers = (x, x, x if weight is None else weight, scale, *outputs)
        _start(sandwich_kernel, plan, pointers, eps)
    return outputs


def _fake_norm_modulate(
    x: Tensor, weight: Tensor | None, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """Check as the launch does, and give the outputs without numbers."""
    _check(scale, weight, x)
    return _outputs((x,), scale)


def _launch_gate_residual(
    x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    plan = _plan_gate_residual(x, y, weight, gate)
    outputs = _outputs((x, y), gate)
    if 0 not in plan.grid:
        pointers = (x, y, weight, gate, *outputs)
        _start(sandwich_kernel, plan, pointers, eps)
    return outputs


def _fake_gate_residual(
    x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check(gate, weight, x, y)
    return _outputs((x, y), gate)


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rstd: Tensor,
    gated: bool,
    centred: bool,
    asked: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel and add up its partial rows; see `_gradients` for what is not asked for."""
    plan = _plan_backward(grad, x, weight, m, gated, centred, asked)
    gradients = _gradients(x, weight, m, asked)
    grad_x, grad_weight, grad_m = gradients
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_m.zero_()
    per_token = plan.per_token
    programs = plan.grid[0] // x.shape[0]
    weight_rows = _partial(x, programs) if asked[1] else grad_weight
    m_rows = _partial(x, programs) if asked[2] and not per_token else grad_m
    others = (rstd, grad_x, weight_rows, m_rows)
    pointers = (grad, x, x if weight is None else weight, m, *others)
    _start(sandwich_backward_kernel, plan, pointers)
    if asked[1]:
        grad_weight = weight_rows.sum((0, 1)).to(grad_weight.dtype)
    if asked[2] and not per_token:
        grad_m = m_rows.sum(1).view(m.shape).to(m.dtype)
    return grad_x, grad_weight, grad_m


def _partial(x: Tensor, programs: int) -> Tensor:
    """Make the rows of a sum over tokens, one per program: `[batch, programs, width]`."""
    return x.new_empty((x.shape[0], programs, x.shape[2]), dtype=torch.float32)


def _gradients(
    x: Tensor, weight: Tensor | None, m: Tensor, asked: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the gradients to x, weight and m; one without elements for what is not asked for."""
    x, weight, m = (
        torch.empty(like.shape, dtype=like.dtype, device=x.device)
        if wanted and like is not None
        else x.new_empty(0)
        for wanted, like in zip(asked, (x, weight, m), strict=True)
    )
    return x, weight, m


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    m: Tensor,
    rstd: Tensor,
    gated: bool,
    centred: bool,
    asked: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check(m, weight, x, grad)
    return _gradients(x, weight, m, asked)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor | None, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    centred: bool
    residual_dtype: torch.dtype

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _setup_norm_modulate(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor | None, Tensor, float, bool],
    output: tuple[Tensor, Tensor],
) -> None:
    x, weight, scale, _, ctx.centred = inputs
    ctx.save_for_backward(x, weight, scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_norm_modulate(
    ctx: _Context, grad: Tensor, _: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    asked = list(ctx.needs_input_grad[:3])
    grads = _sandwich_backward(grad, *ctx.saved_tensors, False, ctx.centred, asked)
    x, weight, scale = (part if wanted else None for part, wanted in zip(grads, asked, strict=True))
    return x, weight, scale, None, None


def _setup_gate_residual(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor],
) -> None:
    x, y, weight, gate, _ = inputs
    ctx.residual_dtype = x.dtype
    ctx.save_for_backward(y, weight, gate, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_gate_residual(
    ctx: _Context, grad: Tensor, _: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    x = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[0] else None
    asked = list(ctx.needs_input_grad[1:4])
    if not any(asked):
        return x, None, None, None, None
    grads = _sandwich_backward(grad, *ctx.saved_tensors, True, False, asked)
    y, weight, gate = (part if wanted else None for part, wanted in zip(grads, asked, strict=True))
    return x, y, weight, gate, None


_norm_modulate = operators.define(
    "norm_modulate(Tensor x, Tensor? weight, Tensor scale, float eps, bool centred) "
    "-> (Tensor, Tensor)",
    _launch_norm_modulate,
    _fake_norm_modulate,
    setup_context=_setup_norm_modulate,
    backward=_backward_norm_modulate,
)
_gate_residual = operators.define(
    "gate_residual(Tensor x, Tensor y, Tensor weight, Tensor gate, float eps) -> (Tensor, Tensor)",
    _launch_gate_residual,
    _fake_gate_residual,
    setup_context=_setup_gate_residual,
    backward=_backward_gate_residual,
)
_sandwich_backward = operators.define(
    "sandwich_backward(Tensor grad, Tensor x, Tensor? weight, Tensor m, Tensor rstd, bool gated, "
    "bool centred, bool[] asked) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
