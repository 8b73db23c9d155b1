"""QK-norm with rotary embedding: what is served, how it is launched, and its operators."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nextdit_kernels import operators, rotary, served
from nextdit_kernels.qk_norm_kernels import norm_rotate_backward_kernel, norm_rotate_kernel

__all__ = ["norm_rotate", "norm_rotate_backward_kernel", "norm_rotate_kernel", "why_not"]

# Elements of a tile, groups times channels, at least; channels of a group, at most, rounded up to a
# power of two; elements of a thread, in the first tile of a group and in that of the rest.
_TILE, _WIDE = 2048, 8192
_THREAD, _REST_THREAD = 16, 8

# Registers of a thread, forward and backward, for 16-bit tensors, and more where that costs no
# program. Left to itself the compiler aims at fewer on some architectures, and spills. A
# multiprocessor has 2048 for each of the 32 threads of a warp: 2048 / registers warps run at once.
# Where groups have channels beyond a tile and the heads of a token are not neighbours, the backward
# pass needs more, for the offsets.
_REGISTERS = {
    ("layer", "hidden"): (128, 168),
    ("rms", "hidden"): (128, 168),
    ("layer", "head"): (80, 128),
    ("rms", "head"): (64, 128),
}
_FOR_OFFSETS = 32
_FORWARD, _BACKWARD = 0, 1


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


def _tiles(width: int) -> tuple[int, int]:
    """Cut the channels of a group into a tile and the rest, 0 where one tile is little larger."""
    whole = max(16, served.power_of_2(width))
    rest = served.power_of_2(width - whole // 2)
    if width <= rotary.MAX_HEAD_DIM or width == whole or rest > whole // 8:
        return whole, 0
    return whole // 2, rest


@cache
def _processors(device: torch.device) -> int:
    """Count the multiprocessors; on the CPU two, so that programs and their steps are several."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _share(
    q: Tensor, k: Tensor, norm: str, over: str, direction: int, *, spread: bool
) -> tuple[int, int, tuple[int, int], dict[str, Any]]:
    """Share the groups out among as many programs as the device runs at once.

    `spread` says that the heads of a token are not neighbours, where a group is all of them.

    Returns:
        The programs of q and those of k; batch and tokens; the kernel's constants and options.
    """
    batch = q.shape[0] if q.ndim == 4 else 1
    tokens, width = q.shape[-3], q.shape[-1]
    tiles = {"Q": _tiles(_width(q, over)), "K": _tiles(_width(k, over))}
    block = max(_TILE, tiles["Q"][0], tiles["K"][0])
    warps = block // (32 * _THREAD)
    registers = _REGISTERS[norm, over][direction]
    if spread and direction == _BACKWARD and tiles["Q"][1] + tiles["K"][1]:
        registers += _FOR_OFFSETS
    registers = registers * q.itemsize // 2
    together = max(1, 2048 // registers // warps)
    registers = min(2048 // (together * warps) // 8 * 8, 255)
    constants: dict[str, Any] = {"CENTER": norm == "layer", "D": width}
    steps = []
    for name, x in {"Q": q, "K": k}.items():
        main, rest = tiles[name]
        groups = 1 if over == "hidden" else max(1, x.shape[-2])
        constants[f"{name}_GROUPS"] = groups
        constants[f"{name}_WIDTH"] = _width(x, over)
        constants[f"{name}_BLOCK"] = block // main
        # So many blocks of groups in a step that the rests of all give a thread whole loads.
        several = main * _REST_THREAD // (rest * _THREAD) if rest else 1
        constants[f"{name}_BLOCKS"] = several
        constants[f"{name}_MAIN"] = main
        constants[f"{name}_REST"] = rest
        blocks = served.blocks(tokens * groups, block // main * several)
        steps.append(batch * blocks if x.shape[-2] and width else 0)
    programs = min(sum(steps), _processors(q.device) * together)
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


def _without_heads(x: Tensor, strides: tuple[int, ...]) -> tuple[int | None, ...]:
    """Leave out the stride of heads where the channels of a token are neighbours."""
    s_b, s_t, s_h, s_d = strides
    together = s_d == 1 and (x.shape[-2] == 1 or s_h == x.shape[-1])
    return (s_b, s_t, None if together else s_h, s_d)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


class _Plan(NamedTuple):
    grid: tuple[int]
    q_programs: int
    k_programs: int
    numbers: tuple[Any, ...]  # all that follows the tensors
    options: dict[str, int | None]
    statistics: int  # how many numbers
    rest: bool  # whether groups of q or of k have channels beyond a tile
    contiguous: bool  # whether all parameters are


@served.remembered
def _plan_forward(
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
) -> _Plan:
    """Check the tensors, and give what the forward kernel is told besides them."""
    q_parameters = {"q_weight": q_weight, "q_bias": q_bias}
    k_parameters = {"k_weight": k_weight, "k_bias": k_bias}
    _check(q, k, cos, sin, norm, over, q_parameters, k_parameters)
    parameters = (q_weight, q_bias, k_weight, k_bias)
    return _plan_kernel(q, k, cos, sin, (q, k), parameters, norm, over, _FORWARD)


@served.remembered
def _plan_backward(
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
) -> _Plan:
    _check_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, norm, over)
    _refuse_unserved(grad_q, grad_k, over)
    strided, parameters = (grad_q, grad_k, q, k), (q_weight, k_weight)
    return _plan_kernel(q, k, cos, sin, strided, parameters, norm, over, _BACKWARD)


def _plan_kernel(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    strided: tuple[Tensor, ...],
    parameters: tuple[Tensor | None, ...],
    norm: str,
    over: str,
    direction: int,
) -> _Plan:
    _refuse_unserved(q, k, over)
    s_x = tuple(rotary.strides(x, 4) for x in strided)
    s_tables = rotary.strides(cos, 3), rotary.strides(sin, 3)
    hints = _hints(s_x, s_tables, q.shape[-1], q.itemsize)
    spread = False
    if over == "hidden":
        s_x = tuple(_without_heads(x, s) for x, s in zip(strided, s_x, strict=True))
        spread = any(stride[2] is not None for stride in s_x)
    shares = _share(q, k, norm, over, direction, spread=spread)
    q_programs, k_programs, sizes, constants = shares
    constants |= hints
    kernel = (norm_rotate_kernel, norm_rotate_backward_kernel)[direction]
    last, options = served.in_order(kernel, constants)
    return _Plan(
        (q_programs + k_programs,),
        q_programs,
        k_programs,
        (q_programs, *sizes, *(n for stride in (*s_x, *s_tables) for n in stride), *last),
        options,
        _count_statistics(q, k, norm, over),
        constants["Q_REST"] + constants["K_REST"] > 0,
        all(x is None or x.is_contiguous() for x in parameters),
    )


def _refuse_unserved(q: Tensor, k: Tensor, over: str) -> None:
    reason = why_not(q, k, over=over)
    if reason is not None:
        raise ValueError(f"the Triton kernel cannot take these tensors: {reason}")


def _start(kernel: Any, plan: _Plan, *arguments: Any) -> None:
    if 0 not in plan.grid:
        served.launch(kernel, plan.grid, (*arguments, *plan.numbers), plan.options)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel; the operator's implementation on CUDA and in the interpreter."""
    given = (q_weight, q_bias, k_weight, k_bias)
    plan = _plan_forward(q, k, cos, sin, *given, norm, over)
    parameters = given if plan.contiguous else [_contiguous(x) for x in given]
    q_out, k_out = _outputs(q, k)
    outputs = q_out, k_out, _statistics(q, plan.statistics)
    _start(norm_rotate_kernel, plan, q, k, *outputs, *parameters, cos, sin, eps)
    return outputs


def _outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple([torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors])


def _statistics(x: Tensor, count: int) -> Tensor:
    """Make room for what is known of each group of q, and after that of each of k."""
    return x.new_empty((count,), dtype=torch.float32)


def _count_statistics(q: Tensor, k: Tensor, norm: str, over: str) -> int:
    """Count the numbers that are kept: 1 / deviation of each group, and for "layer" its mean."""
    groups = sum(1 if over == "hidden" else max(1, x.shape[-2]) for x in (q, k))
    return math.prod(q.shape[:-2]) * groups * (2 if norm == "layer" else 1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Check as the launch does, and give the outputs without numbers."""
    q_parameters = {"q_weight": q_weight, "q_bias": q_bias}
    k_parameters = {"k_weight": k_weight, "k_bias": k_bias}
    _check(q, k, cos, sin, norm, over, q_parameters, k_parameters)
    q_out, k_out = _outputs(q, k)
    return q_out, k_out, _statistics(q, _count_statistics(q, k, norm, over))


def _launch_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    stats: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm: str,
    over: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    plan = _plan_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, norm, over)
    outputs = _outputs(q, k)
    programs = plan.q_programs, plan.q_programs, plan.k_programs, plan.k_programs
    sums = [
        _sums(x, count, _width(x, over)) if asked else None
        for x, count, asked in zip((q, q, k, k), programs, wanted, strict=True)
    ]
    means = _statistics(q, plan.statistics) if plan.rest else None
    inputs = (grad_q, grad_k, q, k, *outputs, stats, means)
    weights = (_contiguous(q_weight), _contiguous(k_weight))
    _start(norm_rotate_backward_kernel, plan, *inputs, *weights, *sums, cos, sin)
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
    stats: Tensor,
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
    "-> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_norm_rotate_backward = operators.define(
    "norm_rotate_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor stats, "
    "Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, str norm, "
    "str over, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
