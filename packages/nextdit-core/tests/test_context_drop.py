"""Context drop: what a cell's score is, exactness without it, any layout, the schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import rope3d
from nextdit_core import Conditioning, ContextDrop, NextDiT, NextDiTConfig, Tokens, UserError


def _grid(views: int, rows: int, columns: int) -> Tensor:
    ranges = (torch.arange(float(n)) for n in (views, rows, columns))
    return torch.cartesian_prod(*ranges)


def _tokens(random: torch.Generator, *shapes: tuple[int, int, int], dim: int = 4) -> Tokens:
    positions = [_grid(*shape) for shape in shapes]
    lengths = tuple(len(one) for one in positions)
    return Tokens(torch.randn(sum(lengths), dim, generator=random), torch.cat(positions), lengths)


def _model(random: torch.Generator, **sizes: int) -> NextDiT:
    config = NextDiTConfig(**({"token_dim": 4, "width": 32, "heads": 4, "layers": 2} | sizes))
    model = NextDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("shapes", "factor"),
    [
        ([(1, 4, 6)], (1, 2, 2)),
        ([(1, 5, 3)], (1, 2, 2)),  # cells at the border are smaller
        ([(2, 4, 4), (2, 2, 2)], (2, 2, 1)),
        ([(1, 7, 7), (1, 3, 1)], (1, 3, 3)),
    ],
)
def test_cells_are_the_boxes_of_the_grid(random, shapes, factor) -> None:
    """Every mean, against loops over the grid."""
    tokens = _tokens(random, *shapes)
    pooling = ContextDrop(((1.0, factor),)).poolings(tokens)[factor]
    x = torch.randn(len(tokens.values), 3, 5, generator=random)
    expected, lengths = [], []
    for shape, part in zip(shapes, x.split(tokens.lengths), strict=True):
        grid = part.unflatten(0, shape)
        starts = [range(0, n, f) for n, f in zip(shape, factor, strict=True)]
        boxes = [
            grid[a : a + factor[0], b : b + factor[1], c : c + factor[2]].flatten(0, 2).mean(0)
            for a, b, c in itertools.product(*starts)
        ]
        expected += boxes
        lengths.append(len(boxes))
    assert pooling.lengths == tuple(lengths)
    torch.testing.assert_close(pooling(x), torch.stack(expected))


def test_a_cells_score_is_the_mean_of_its_members_scores(random) -> None:
    """The choice: keys are averaged after their rotation, so that attention sees mean scores."""
    tokens = _tokens(random, (1, 4, 4))
    rope = rope3d.lumina(8).on_axes(3, (1, 2))
    rotation = rope.rotation(tokens.positions)
    q, k = (torch.randn(16, 2, 8, generator=random, dtype=torch.float64) for _ in range(2))
    q, k = rope3d.rotate(q[None], k[None], rotation)
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0])
    pooling = ContextDrop().poolings(tokens)[1, 2, 2]
    pooled = torch.einsum("qhd,khd->hqk", q[0], pooling(k[0]))
    means = scores.unflatten(-1, (2, 2, 2, 2)).mean((-3, -1)).flatten(-2)
    torch.testing.assert_close(pooled, means)


def test_pooling_what_is_equal_changes_nothing(random) -> None:
    """Where a cell's tokens are one token many times over, attention to the cell is exact."""
    model = _model(random, kv_heads=2, text_dim=8)
    tokens = _tokens(random, (1, 4, 4), (1, 2, 6))
    pooling = ContextDrop().poolings(tokens)[1, 2, 2]
    assert pooling.lengths == (4, 3)
    values = tokens.values.clone()
    values[pooling.members] = values[pooling.members[:, :1]]
    same = Tokens(values, torch.zeros_like(tokens.positions), tokens.lengths)
    text = Conditioning(torch.randn(2, 5, 8, generator=random), torch.tensor([5, 2]))
    t = torch.tensor([0.2, 0.4])
    with torch.no_grad():
        full, pooled = model(same, t, text), model(same, t, text, pooling=pooling)
        assert (full - pooled).abs().max() <= 1e-5
        apart = model(tokens, t, text) - model(tokens, t, text, pooling=pooling)
    assert apart.abs().max() > 1e-3  # and where they are not, it is an approximation


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_packed_equals_alone(random, axes, kv_heads) -> None:
    model = _model(random, axes=axes, kv_heads=kv_heads, text_dim=8, width=48 if axes == 3 else 32)
    shapes = {1: [(5, 1, 1), (8, 1, 1)], 2: [(1, 4, 4), (1, 2, 8), (1, 3, 3)], 3: [(2, 3, 3)] * 2}
    tokens = _tokens(random, *shapes[axes])
    text = Conditioning(
        torch.randn(tokens.batch, 4, 8, generator=random), torch.full((tokens.batch,), 3)
    )
    t = torch.rand(tokens.batch, generator=random)
    drop = ContextDrop(((1.0, 2),))
    factor = drop.factor(0.0, axes)
    with torch.no_grad():
        packed = model(tokens, t, text, pooling=drop.poolings(tokens, axes)[factor])
        parts = zip(
            tokens.values.split(tokens.lengths),
            tokens.positions.split(tokens.lengths),
            strict=True,
        )
        alone = []
        for i, (values, positions) in enumerate(parts):
            one = Tokens(values, positions, (len(values),))
            words = Conditioning(text.text[i : i + 1], text.lengths[i : i + 1])
            pooling = drop.poolings(one, axes)[factor]
            alone.append(model(one, t[i : i + 1], words, pooling=pooling))
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5


def test_a_factor_of_one_is_exact_and_costs_nothing(random) -> None:
    tokens = _tokens(random, (1, 4, 4))
    drop = ContextDrop(((0.3, 1), (0.6, (1, 1, 1))))
    assert set(drop.poolings(tokens).values()) == {None}
    assert ContextDrop(()).factor(0.0) == (1, 1, 1)
    # A lattice so fine that every token is a cell is no pooling either.
    sparse = Tokens(tokens.values, tokens.positions * 5, tokens.lengths)
    assert ContextDrop().poolings(sparse)[1, 2, 2] is None


def test_it_is_strongest_at_noise_and_gone_at_data() -> None:
    drop = ContextDrop.parse("0.1:4,0.5:2,0.7:1x2x1")
    assert [drop.factor(t) for t in (0.0, 0.0999, 0.1, 0.5, 0.6999, 0.7, 1.0)] == [
        (1, 4, 4),
        (1, 4, 4),
        (1, 2, 2),
        (1, 2, 1),
        (1, 2, 1),
        (1, 1, 1),
        (1, 1, 1),
    ]
    assert drop.factor(0.2, axes=1) == (2, 1, 1)
    assert ContextDrop.parse(str(drop)) == drop
    assert ContextDrop.parse("none") == ContextDrop(())
    assert str(ContextDrop(())) == "none"


@pytest.mark.parametrize(
    "text", ["", "2", "0.5", "0.5:", "0.5:0", "0.5:2x2", "1.5:2", "0:2", "a:2"]
)
def test_schedules_that_mean_nothing_are_refused(text) -> None:
    with pytest.raises(UserError, match="context drop"):
        ContextDrop.parse(text)
    with pytest.raises(UserError, match="must rise"):
        ContextDrop(((0.5, 2), (0.4, 3)))
