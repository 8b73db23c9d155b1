"""Contests of attention: within samples, packed, and gated to text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contest import Contest, Run, backward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import rope3d

#: Batch, tokens, query heads, key heads, head_dim.
SHAPES = [(1, 4096, 32, 8, 72), (1, 16384, 32, 8, 72), (1, 4096, 24, 24, 128), (1, 4096, 32, 8, 96)]
SMOKE = [(1, 33, 4, 2, 72)]
PACKED, PACKED_SMOKE = ((4096, 1024, 2560, 512), (32, 8, 72)), ((20, 7), (4, 2, 72))
TEXT, TEXT_SMOKE = (4096, 256), (33, 9)
KERNELS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def contests(*, smoke: bool) -> list[Iterator[Contest]]:
    """Give the contests of each shape, built one after another, so that only one holds memory."""
    return [
        *(dense(*shape, smoke=smoke) for shape in (SMOKE if smoke else SHAPES)),
        packed(*(PACKED_SMOKE if smoke else PACKED), smoke=smoke),
        gated(*(TEXT_SMOKE if smoke else TEXT), smoke=smoke),
    ]


def draw(*shape: int, smoke: bool) -> Tensor:
    # Triton's interpreter multiplies matrices of bfloat16 wrongly.
    dtype = torch.float16 if smoke else torch.bfloat16
    return torch.randn(*shape, device="cpu" if smoke else "cuda", dtype=dtype)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)


def by_head(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give the queries of each key head, with it: the scores of all, in float32, are 34 GB."""
    return zip(q.chunk(k.shape[2], 2), k.split(1, 2), v.split(1, 2), strict=True)


def attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in float32."""
    return torch.cat([plain(*(x.float() for x in group)) for group in by_head(q, k, v)], 2)


def differentiate_exactly(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Give the gradients in float32."""
    found = []
    grads = grad.float().chunk(k.shape[2], 2)
    for group, part in zip(by_head(q, k, v), grads, strict=True):
        leaves = [x.detach().float().requires_grad_() for x in group]
        found.append(torch.autograd.grad(plain(*leaves), leaves, part))
    return [torch.cat(parts, 2) for parts in zip(*found, strict=True)]


def dense(
    batch: int, tokens: int, heads: int, kv_heads: int, width: int, *, smoke: bool
) -> Iterator[Contest]:
    torch.compiler.reset()
    torch.manual_seed(0)
    q, k, v = (draw(batch, tokens, n, width, smoke=smoke) for n in (heads, kv_heads, kv_heads))
    label = f"{batch}, {tokens}, {heads}/{kv_heads} × {width}"
    exact = attend_exactly(q, k, v)
    operations = 4 * batch * tokens**2 * heads * width
    forward = Contest("attention, forward", label, exact, 2e-2, 0, operations)
    ways = {
        name: lambda q, k, v, name=name: rope3d.attention(q, k, v, backend=name)
        for name in ("triton", "flash-3", "flash-4", "cudnn")
    }
    ways["rope3d's choice"] = rope3d.attention
    ways["SDPA's choice"] = plain
    for name, kernel in KERNELS.items():

        def only(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                return plain(q, k, v)

        ways[name] = only
    ways["flash-attn 2"] = flash
    for name, way in ways.items():
        forward.enter(name, lambda way=way: lambda: way(q, k, v))
    forward.enter("FlexAttention", lambda: flex(q, k, v, smoke=smoke))
    yield forward

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = draw(*exact.shape, smoke=smoke)
    exact = differentiate_exactly(q, k, v, grad)
    back = Contest("attention, backward", label, exact, 5e-2, 0, operations * 5 // 2)
    for name, way in ways.items():
        if isinstance(forward.runs[name], str):
            back.runs[name] = forward.runs[name]
        else:
            back.enter(name, lambda way=way: backward(way(*leaves), leaves, grad))
    yield back


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def flex(q: Tensor, k: Tensor, v: Tensor, *, smoke: bool) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    if smoke:
        raise RuntimeError("FlexAttention is compiled for a GPU only")
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: compiled(*heads, enable_gqa=True).transpose(1, 2)


def packed(
    lengths: tuple[int, ...], sizes: tuple[int, int, int], *, smoke: bool
) -> Iterator[Contest]:
    torch.manual_seed(0)
    heads, kv_heads, width = sizes
    q, k, v = (draw(sum(lengths), n, width, smoke=smoke) for n in (heads, kv_heads, kv_heads))
    label = f"{' + '.join(map(str, lengths))}, {heads}/{kv_heads} × {width}"
    floats = (x.float() for x in (q, k, v))
    exact = rope3d.attention(*floats, lengths=lengths, backend="sdpa")
    operations = 4 * sum(n**2 for n in lengths) * heads * width
    contest = Contest("attention, packed, forward", label, exact, 2e-2, 0, operations)
    for name in ("triton", "flash-varlen", "flash-3", "flash-4", "sdpa"):
        contest.enter(
            name,
            lambda name=name: lambda: rope3d.attention(q, k, v, lengths=lengths, backend=name),
        )
    yield contest


def gated(tokens: int, words: int, *, smoke: bool) -> Iterator[Contest]:
    torch.compiler.reset()
    torch.manual_seed(0)
    heads, kv_heads, width = (4, 2, 72) if smoke else (32, 8, 72)
    q, out = (draw(1, tokens, heads, width, smoke=smoke) for _ in range(2))
    keys, values = (draw(1, words, kv_heads, width, smoke=smoke) for _ in range(2))
    gate = draw(heads, smoke=smoke)
    label = f"1, {tokens} × {words}, {heads}/{kv_heads} × {width}"

    def unfused(q: Tensor, keys: Tensor, values: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        return out + gate.tanh()[:, None] * plain(q, keys, values)

    inputs = (q, keys, values, gate, out)
    exact = unfused(*(x.float() for x in inputs))
    moved = q.nbytes + 2 * out.nbytes + keys.nbytes + values.nbytes
    operations = 4 * tokens * words * heads * width
    contest = Contest("gated attention to text, forward", label, exact, 2e-2, moved, operations)

    def fused(q: Tensor, keys: Tensor, values: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        from nextdit_kernels import gated_cross_attention

        return gated_cross_attention(q, keys, values, gate, out)

    compiled = torch.compile(unfused, dynamic=False, backend="aot_eager" if smoke else "inductor")
    ways = {"nextdit-kernels": fused, "SDPA + gate": unfused, "SDPA + gate, compiled": compiled}
    for name, way in ways.items():
        contest.enter(name, lambda way=way: lambda: way(*inputs))
    yield contest
    leaves = [x.clone().requires_grad_() for x in inputs]
    floats = [x.detach().float().requires_grad_() for x in leaves]
    grad = draw(*exact.shape, smoke=smoke)
    exact = torch.autograd.grad(unfused(*floats), floats, grad.float())
    back = Contest("gated attention to text, backward", label, exact, 5e-2, 0, operations * 5 // 2)
    for name, way in ways.items():
        back.enter(name, lambda way=way: backward(way(*leaves), leaves, grad))
    yield back
