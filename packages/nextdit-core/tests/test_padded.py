"""Padded rows: the result of packed samples, in one shape for all batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rope3d
from nextdit_core import Conditioning, ContextDrop, NextDiT, NextDiTConfig, Tokens
from nextdit_core.arrangement import arrange
from nextdit_core.packed_prediction import PackedPrediction


@pytest.fixture
def model(random: torch.Generator) -> NextDiT:
    """A small backbone in which no weight is zero."""
    sizes = {"token_dim": 4, "width": 32, "heads": 4, "kv_heads": 2, "layers": 2, "text_dim": 8}
    made = NextDiT(NextDiTConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return made


def _tokens(random: torch.Generator, *shapes: tuple[int, int]) -> Tokens:
    positions = [rope3d.grid(frames=1, height=r, width=c) for r, c in shapes]
    lengths = tuple(len(one) for one in positions)
    return Tokens(torch.randn(sum(lengths), 4, generator=random), torch.cat(positions), lengths)


def _text(random: torch.Generator, *lengths: int) -> Conditioning:
    text = torch.randn(len(lengths), 6, 8, generator=random)
    return Conditioning(text, torch.tensor(lengths))


TIMED = {"scale": "proportional", "trained_tokens": 6}


@pytest.mark.parametrize("options", [{}, TIMED], ids=["plain", "proportional, timed rope"])
@pytest.mark.parametrize("shapes", [((2, 3), (5, 4), (1, 1)), ((2, 3), (3, 2), (1, 6))])
def test_padded_rows_give_what_packed_samples_give(
    model: NextDiT,
    random: torch.Generator,
    shapes: tuple[tuple[int, int], ...],
    options: dict[str, Any],
) -> None:
    """Outputs and gradients."""
    if options:
        rope = model.rope.extrapolate("time-aware", scale=(1.0, 2.0, 2.0))
        options = options | {"rope": rope}
    tokens, text = _tokens(random, *shapes), _text(random, 6, 2, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    results = []
    for pad_to in (None, 20, 33):
        values = tokens.values.clone().requires_grad_()
        out = model(tokens.with_values(values), t, text, pad_to=pad_to, **options)
        grads = torch.autograd.grad(out.square().sum(), [values, *model.parameters()])
        results.append((out, *grads))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert (one - two).abs().max() <= 1e-5 * max(1.0, one.abs().max())


def test_the_authors_proportional_scale_is_a_number(
    model: NextDiT, random: torch.Generator
) -> None:
    """Theirs counts the padding: one scale for all, by the length of the rows."""
    tokens, text = _tokens(random, (2, 3), (5, 4)), _text(random, 6, 2)
    t = torch.tensor([0.1, 0.5])
    scale = (torch.tensor(20.0).log() / torch.tensor(6.0).log() / model.config.head_dim).sqrt()
    with torch.no_grad():
        padded = model(tokens, t, text, pad_to=20, scale=scale.item())
        packed = model(tokens, t, text, scale=scale.item())
        own = model(tokens, t, text, pad_to=20, **TIMED)  # type: ignore[arg-type]
    assert (padded - packed).abs().max() <= 1e-5
    assert (own[6:] - padded[6:]).abs().max() <= 1e-5  # the sample that fills its row
    assert (own[:6] - padded[:6]).abs().max() > 1e-4


def test_batches_of_all_sizes_share_one_graph(model: NextDiT, random: torch.Generator) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    t = torch.tensor([0.1, 0.5])
    batches = [_tokens(random, *shapes) for shapes in (((2, 3), (5, 4)), ((4, 4), (1, 2)))]
    with torch.no_grad():
        text = model.prepare(_text(random, 6, 2))
        expected = [model(one, t, text) for one in batches]
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True, dynamic=False)
        counts = []
        for one, other in zip(batches, expected, strict=True):
            assert (model(one, t, text, pad_to=24) - other).abs().max() <= 1e-5
            counts.append(counter.frame_count)
    assert counts == [1, 1]


def test_padded_rows_are_sampled(model: NextDiT, random: torch.Generator) -> None:
    tokens, text = _tokens(random, (2, 3), (5, 4)), model.prepare(_text(random, 6, 2))
    t = torch.tensor(0.4)
    with torch.no_grad():
        velocities = [
            PackedPrediction(model, text, tokens, ContextDrop(()), {"pad_to": pad_to})
            for pad_to in (None, 24)
        ]
        packed, padded = (velocity(t, tokens.values) for velocity in velocities)
    assert (packed - padded).abs().max() <= 1e-5


def test_arrangements_give_back_what_they_were_given(random: torch.Generator) -> None:
    tokens = _tokens(random, (2, 3), (1, 1), (2, 2))
    vectors = torch.arange(3.0)[:, None]
    for options in ({}, {"pad_to": 6}, {"pad_to": 9}):
        arrangement = arrange(tokens, **options)  # type: ignore[arg-type]
        x = arrangement.place(tokens.values)
        assert x.shape[:2] == (arrangement.rows, arrangement.tokens)
        assert torch.equal(arrangement.take(x), tokens.values)
        spread = arrangement.take(arrangement.spread(vectors).expand(*x.shape[:2], 1))
        assert spread[:, 0].tolist() == [0.0] * 6 + [1.0] + [2.0] * 4
        if arrangement.key_mask is not None:
            assert arrangement.key_mask.sum(1).tolist() == [6, 1, 4]


def test_rows_that_do_not_fit_are_refused(model: NextDiT, random: torch.Generator) -> None:
    tokens, text = _tokens(random, (2, 3), (5, 4)), _text(random, 6, 2)
    t = torch.tensor([0.1, 0.5])
    with pytest.raises(ValueError, match="pad_to is 19, and a sample has 20 tokens"):
        model(tokens, t, text, pad_to=19)
    pooling = ContextDrop(((1.0, 2),)).poolings(tokens)[1, 2, 2]
    with pytest.raises(ValueError, match="pooling has no padded form"):
        model(tokens, t, text, pad_to=20, pooling=pooling)
