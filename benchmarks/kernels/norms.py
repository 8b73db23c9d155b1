"""Contests of what surrounds the matrix products: norms, modulation, gates and SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from contest import Contest, backward
from formulations import complex_float
from torch import Tensor
from torch.nn import functional

import rope3d

#: Tokens, query heads, key heads, head_dim, norm, over.
NORM_ROTATE = [
    (4096, 32, 8, 72, "layer", "hidden"),
    (16384, 32, 8, 72, "layer", "hidden"),
    (4096, 24, 24, 128, "rms", "head"),
]
NORM_ROTATE_SMOKE = [(16, 4, 2, 24, "layer", "hidden")]
#: Batch, tokens, width of the stream, width of the feed-forward layer.
BLOCK = [(1, 4096, 2304, 6144), (4, 1024, 2304, 6144)]
BLOCK_SMOKE = [(2, 9, 48, 64)]
EPS = 1e-5


def contests(*, smoke: bool) -> list[Iterator[Contest]]:
    """Give the contests of each shape, built one after another, so that only one holds memory."""
    shapes, sizes = (NORM_ROTATE_SMOKE, BLOCK_SMOKE) if smoke else (NORM_ROTATE, BLOCK)
    return [
        *(norm_rotate(*shape, smoke=smoke) for shape in shapes),
        *(block(*size, smoke=smoke) for size in sizes),
    ]


def both_ways(
    what: str,
    label: str,
    moved: tuple[int, int],
    inputs: list[Tensor],
    differentiated: int,
    ways: dict[str, Callable[..., Any]],
    reference: Callable[..., Any],
) -> Iterator[Contest]:
    """Compare forward, and backward to the first `differentiated` inputs."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = reference(*wide)
    forward = Contest(f"{what}, forward", label, exact, 2.0**-5, moved[0])
    for name, way in ways.items():
        forward.enter(name, lambda way=way: lambda: way(*inputs))
    yield forward
    outputs = (exact,) if isinstance(exact, Tensor) else exact
    grads = [torch.randn_like(x).to(inputs[0].dtype) for x in outputs]

    def differentiable(tensors: list[Tensor]) -> list[Tensor]:
        return [
            x.detach().clone().requires_grad_(i < differentiated) for i, x in enumerate(tensors)
        ]

    def run(way: Callable[..., Any], tensors: list[Tensor], grads: list[Tensor]) -> Any:
        leaves = differentiable(tensors)
        found = way(*leaves)
        found = (found,) if isinstance(found, Tensor) else found
        return backward(found, leaves[:differentiated], grads)

    exact = run(reference, wide, [x.double() for x in grads])()
    back = Contest(f"{what}, backward", label, exact, 2.0**-4, moved[1])
    for name, way in ways.items():
        back.enter(name, lambda way=way: run(way, inputs, grads))
    yield back


def norm_rotate(
    tokens: int, heads: int, kv_heads: int, width: int, norm: str, over: str, *, smoke: bool
) -> Iterator[Contest]:
    device = "cpu" if smoke else "cuda"
    torch.compiler.reset()
    torch.manual_seed(0)
    q, k = (
        torch.randn(1, tokens, count, width, device=device, dtype=torch.bfloat16)
        for count in (heads, kv_heads)
    )
    sizes = [count * width if over == "hidden" else width for count in (heads, kv_heads)]
    weights = [torch.rand(size, device=device, dtype=torch.bfloat16) + 0.5 for size in sizes]
    biases = [torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes]
    positions = torch.rand(tokens, 2, device=device) * 64
    rotation = rope3d.lumina(width).rotation(positions)
    turns = torch.complex(rotation.cos, rotation.sin)

    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.flatten(-2) if over == "hidden" else x
        if norm == "layer":
            rows = functional.layer_norm(rows, rows.shape[-1:], weight, bias, EPS)
        else:
            rows = functional.rms_norm(rows, rows.shape[-1:], weight, EPS)
        return rows.view_as(x)

    def eager(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, bq: Tensor, bk: Tensor) -> Any:
        return (
            complex_float(normed(q, wq, bq), turns),
            complex_float(normed(k, wk, bk), turns),
        )

    def real(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, bq: Tensor, bk: Tensor) -> Any:
        return rope3d.rotate(normed(q, wq, bq), normed(k, wk, bk), rotation, backend="reference")

    def two(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, bq: Tensor, bk: Tensor) -> Any:
        return rope3d.rotate(normed(q, wq, bq), normed(k, wk, bk), rotation, backend="triton")

    def fused(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, bq: Tensor, bk: Tensor) -> Any:
        from nextdit_kernels import norm_rotate

        affine: dict[str, Any] = {"q_weight": wq, "k_weight": wk}
        if norm == "layer":
            affine |= {"q_bias": bq, "k_bias": bk}
        tables = rotation.cos, rotation.sin
        return norm_rotate(q, k, *tables, **affine, norm=norm, over=over, eps=EPS)

    ways = {
        "nextdit-kernels": fused,
        "norm, then our rotation": two,
        "norm, then complex64 (Lumina)": eager,
        "real, torch.compile": torch.compile(
            real, dynamic=False, backend="aot_eager" if smoke else "inductor"
        ),
    }
    tables = rotation.cos.nbytes + rotation.sin.nbytes
    once = q.nbytes + k.nbytes
    label = f"{tokens}, {heads}/{kv_heads} × {width}, {norm} over {over}"
    inputs = [q, k, *weights, *biases]
    moved = (2 * once + tables, 3 * once + tables)
    differentiated = 6 if norm == "layer" else 4
    yield from both_ways("QK-norm and rotation", label, moved, inputs, differentiated, ways, real)


def block(batch: int, tokens: int, width: int, hidden: int, *, smoke: bool) -> Iterator[Contest]:
    device = "cpu" if smoke else "cuda"
    torch.compiler.reset()
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, y, weight = draw(batch, tokens, width), draw(batch, tokens, width), draw(width)
    vector = draw(batch, width)

    def norm_modulate(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, EPS) * (1 + scale[:, None])

    def gate_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return x + gate[:, None].tanh() * functional.rms_norm(y, y.shape[-1:], weight, EPS)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    def ours(name: str, **options: Any) -> Callable[..., Any]:
        def call(*inputs: Tensor) -> Any:
            import nextdit_kernels

            return getattr(nextdit_kernels, name)(*inputs, **options)

        return call

    label, wide = f"{batch}, {tokens} × {width}", draw(batch, tokens, 2 * hidden)
    size, half = x.nbytes, wide.nbytes // 2
    for what, reference, inputs, moved, options in (
        ("norm and scale", norm_modulate, [x, weight, vector], (2, 3), {"eps": EPS}),
        ("norm, gate and add", gate_residual, [x, y, weight, vector], (3, 4), {"eps": EPS}),
        ("SwiGLU", swiglu, list(wide.chunk(2, dim=-1)), (3, 5), {}),
    ):
        name = reference.__name__
        compiled = torch.compile(
            reference, dynamic=False, backend="aot_eager" if smoke else "inductor"
        )
        ways = {
            "nextdit-kernels": ours(name, **options),
            "eager": reference,
            "torch.compile": compiled,
        }
        unit = half if what == "SwiGLU" else size
        shape = f"{batch}, {tokens} × {hidden}" if what == "SwiGLU" else label
        yield from both_ways(
            what, shape, (moved[0] * unit, moved[1] * unit), inputs, len(inputs), ways, reference
        )
