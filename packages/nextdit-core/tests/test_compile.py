"""Blocks under torch.compile: whole graphs, and how many of them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nextdit_core import Conditioning, NextDiT, NextDiTConfig, Tokens


def _tokens(random: torch.Generator, *shapes: tuple[int, int]) -> Tokens:
    positions = [
        torch.cartesian_prod(torch.zeros(1), torch.arange(float(r)), torch.arange(float(c)))
        for r, c in shapes
    ]
    lengths = tuple(len(one) for one in positions)
    return Tokens(torch.randn(sum(lengths), 4, generator=random), torch.cat(positions), lengths)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_block_compiles_once_over_timesteps_and_resolutions(
    random: torch.Generator, packed: bool
) -> None:
    torch._dynamo.reset()
    config = NextDiTConfig(token_dim=4, width=32, heads=4, kv_heads=2, layers=3, text_dim=8)
    model = NextDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    text = Conditioning(torch.randn(2, 5, 8, generator=random), torch.tensor([5, 3]))
    rope = model.rope.extrapolate("time-aware", scale=(1.0, 2.0, 2.0))
    shapes = [(5, 7), (4, 6), (6, 6), (8, 6), (8, 8), (10, 8)]
    batches = [_tokens(random, shape, (shape[0], 2) if packed else shape) for shape in shapes]
    times = torch.linspace(0, 1, 5)
    with torch.no_grad():
        expected = [model(one, t.expand(2), text, rope=rope) for one in batches for t in times]
        counter = CompileCounter()
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True, dynamic=True)
        found, counts = [], []
        for one in batches:
            found += [model(one, t.expand(2), text, rope=rope) for t in times]
            counts.append(counter.frame_count)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5
    # One graph for the first block, whose input is a view, and one for all others.
    assert counts[0] <= 2
    assert counts == counts[:1] * len(batches)


@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
@pytest.mark.parametrize("experts", [0, 4])
def test_a_whole_backbone_compiles_to_one_graph(
    random: torch.Generator, form: str, experts: int
) -> None:
    torch._dynamo.reset()
    sizes = {"token_dim": 4, "width": 32, "heads": 4, "kv_heads": 2, "layers": 2, "text_dim": 8}
    config = NextDiTConfig(**sizes, time_experts=experts, space_experts=experts)
    model = NextDiT(config).eval()
    text = Conditioning(torch.randn(2, 5, 8, generator=random), torch.tensor([5, 3]))
    tokens = _tokens(random, (3, 4), (3, 4) if form == "dense" else (2, 5))
    pad_to = 16 if form == "padded" else None
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
        expected = model(tokens, t, text, pad_to=pad_to)
        prepared = model.prepare(text)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for condition in (text, prepared):
            found = compiled(tokens, t, condition, pad_to=pad_to)
            assert (found - expected).abs().max() <= 1e-5
