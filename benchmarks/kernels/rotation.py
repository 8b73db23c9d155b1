"""Contests of the rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from contest import Contest, Run, backward
from formulations import complex_double, complex_float, real

import rope3d

#: Batch, tokens, query heads, key heads, head_dim.
SHAPES = [(1, 4096, 32, 8, 72), (1, 16384, 32, 8, 72), (1, 4096, 24, 24, 128)]
SMOKE = [(1, 40, 4, 2, 72)]


def contests(*, smoke: bool) -> list[Iterator[Contest]]:
    """Give the contests of each shape, built one after another, so that only one holds memory."""
    return [contest(*shape, smoke=smoke) for shape in (SMOKE if smoke else SHAPES)]


def contest(
    batch: int, tokens: int, heads: int, kv_heads: int, width: int, *, smoke: bool
) -> Iterator[Contest]:
    device = "cpu" if smoke else "cuda"
    torch.compiler.reset()
    torch.manual_seed(0)
    q, k = (
        torch.randn(batch, tokens, count, width, device=device, dtype=torch.bfloat16)
        for count in (heads, kv_heads)
    )
    positions = torch.rand(tokens, 2, device=device) * 64
    rotation = rope3d.lumina(width).rotation(positions)
    cos, sin = rotation.cos, rotation.sin
    turns = torch.complex(cos, sin)
    twice = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    label = f"{batch}, {tokens}, {heads}/{kv_heads} × {width}"
    moved = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    exact = rope3d.rotate(q.double(), k.double(), rotation, backend="reference")

    def both(function: Callable[..., Any], *tables: Any) -> Callable[[Any, Any], Any]:
        return lambda q, k: (function(q, *tables), function(k, *tables))

    ways = {
        "nextdit-kernels": lambda q, k: rope3d.rotate(q, k, rotation, backend="triton"),
        "rope3d reference": lambda q, k: rope3d.rotate(q, k, rotation, backend="reference"),
        "complex64 (Lumina)": both(complex_float, turns),
        "real (diffusers)": both(real, *twice),
        "complex128 (Wan)": both(complex_double, turns.to(torch.complex128)),
        "real, torch.compile": torch.compile(
            both(real, *twice), dynamic=False, backend="aot_eager" if smoke else "inductor"
        ),
    }
    forward = Contest("rotation, forward", label, exact, 2.0**-6, moved)
    for name, way in ways.items():
        forward.enter(name, lambda way=way: lambda: way(q, k))
    half = cos.to(q.dtype), sin.to(q.dtype)  # their kernels take tables in the dtype of x
    forward.enter("flash-attn rotary", lambda: flash(q, k, *half))
    forward.enter("fla rotary", lambda: fla(q, k, *half))
    halves = [x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (*exact, q, k)]
    forward.enter("liger, half-split, in place", lambda: liger(*halves[2:], *half), halves[:2])
    yield forward

    leaves = [x.clone().requires_grad_() for x in (q, k)]
    grads = [torch.randn_like(x) for x in leaves]
    opposite = rope3d.Rotation(cos, -sin)
    exact = rope3d.rotate(*(x.double() for x in grads), opposite, backend="reference")
    back = Contest("rotation, backward", label, exact, 2.0**-5, moved)
    for name in ("nextdit-kernels", "rope3d reference", "real (diffusers)", "real, torch.compile"):
        back.enter(name, lambda name=name: backward(ways[name](*leaves), leaves, grads))
    yield back


def flash(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Run:
    from flash_attn.layers.rotary import apply_rotary_emb

    return lambda: tuple(apply_rotary_emb(x, cos, sin, interleaved=True) for x in (q, k))


def liger(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Run:
    from liger_kernel.ops.rope import LigerRopeFunction

    tables = [torch.cat((table, table), dim=-1)[None] for table in (cos, sin)]
    heads = [x.transpose(1, 2) for x in (q, k)]

    def run() -> tuple[torch.Tensor, ...]:
        return tuple(x.transpose(1, 2) for x in LigerRopeFunction.apply(*heads, *tables))

    return run


def fla(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Run:
    from fla.modules.rotary import rotary_embedding

    return lambda: tuple(rotary_embedding(x, cos, sin, interleaved=True) for x in (q, k))
