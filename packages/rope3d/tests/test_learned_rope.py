"""Learned frequencies, and gradients of positions, against closed forms, differences and timm."""

import math
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rope3d
from rope3d import angles

LAYOUTS = {
    "lumina": rope3d.lumina(24),
    "half": rope3d.axial((12, 12), pairing="half"),
    "partial": rope3d.axial((8, 8), base=100.0).partial(24),
    "mixed": rope3d.Rope(((1.0, 0.3, -2.5), (0.7, -0.1, 1.5))),
}
each_layout = pytest.mark.parametrize("rope", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def timm_positions(monkeypatch):
    """The module of timm that holds its rotary embeddings, without what `import timm` needs.

    The package imports torchvision, which this module does not use.
    """
    spec = find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    (folder,) = spec.submodule_search_locations
    for name, place in (("timm", folder), ("timm.layers", f"{folder}/layers")):
        package = ModuleType(name)
        package.__path__ = [place]
        monkeypatch.setitem(sys.modules, name, package)
    yield import_module("timm.layers.pos_embed_sincos")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


@each_layout
def test_begins_as_the_layout(rope, generator) -> None:
    positions = torch.rand(2, 9, 2, generator=generator) * 100
    q, k = torch.randn(2, 9, 6, rope.head_dim), torch.randn(2, 9, 3, rope.head_dim)
    expected = rope3d.apply(q, k, rope, positions)
    for heads in (None, 3):
        learned = rope3d.LearnedRope(rope, heads=heads, dtype=torch.float64)
        assert (learned.axes, learned.head_dim, learned.heads) == (2, rope.head_dim, heads)
        assert learned.pairing == rope.pairing
        for ours, plain in zip(rope3d.apply(q, k, learned, positions), expected, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)


@each_layout
@pytest.mark.parametrize("batch", [(), (2,)])
def test_each_key_head_turns_by_its_own_frequencies(rope, batch, generator) -> None:
    learned = rope3d.LearnedRope(rope, heads=3)
    torch.nn.init.normal_(learned.frequencies, generator=generator)
    positions = torch.rand(*batch, 9, 2, generator=generator) * 100
    q, k = torch.randn(*batch, 9, 6, rope.head_dim), torch.randn(*batch, 9, 3, rope.head_dim)
    turned_q, turned_k = rope3d.apply(q, k, learned, positions)
    for head, frequencies in enumerate(learned.frequencies.detach().double().tolist()):
        alone = rope3d.Rope(
            tuple(map(tuple, frequencies)), None, None, rope.pairing, rope.untouched
        )
        own = slice(2 * head, 2 * head + 2)  # the query heads that attend to this key head
        expected = rope3d.apply(q[..., own, :], k[..., head, None, :], alone, positions)
        torch.testing.assert_close(turned_q[..., own, :], expected[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(turned_k[..., head, None, :], expected[1], atol=2e-6, rtol=0)


def test_scores_of_grouped_heads_depend_only_on_differences(generator) -> None:
    learned = rope3d.LearnedRope.mixed(16, 2, generator=generator)
    q, k = torch.randn(5, 4, 16, dtype=torch.float64), torch.randn(5, 2, 16, dtype=torch.float64)
    positions, v = torch.randn(5, 2) * 20, torch.randn(5, 2, 3, dtype=torch.float64)
    here = rope3d.attention(q, k, v, learned, positions)
    there = rope3d.attention(q, k, v, learned, positions + torch.tensor([7.0, -90.0]))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)


def test_gradient_of_the_frequencies_is_the_closed_form(generator) -> None:
    for heads in (None, 3):
        learned = rope3d.LearnedRope(rope3d.lumina(8), heads=heads)
        positions = torch.rand(7, 2, generator=generator) * 100
        rotation = learned.rotation(positions)
        weight = torch.randn(rotation.cos.shape, generator=generator)
        ((rotation.cos + 2 * rotation.sin) * weight).sum().backward()
        rows = learned.frequencies.detach().double()
        place = positions.double()
        angle = torch.einsum("ta,...ap->...tp", place, rows)
        outer = weight.double() if heads is None else weight.double().movedim(1, 0)
        slope = (2 * angle.cos() - angle.sin()) * outer
        expected = torch.einsum("ta,...tp->...ap", place, slope).float()
        assert learned.frequencies.grad.dtype == torch.float32
        torch.testing.assert_close(learned.frequencies.grad, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_gradients_are_those_of_differences(heads, pairing, monkeypatch) -> None:
    # Cosine and sine are float32 by promise; only without that rounding can steps be small.
    monkeypatch.setattr(angles, "TABLE", torch.float64)
    rope = rope3d.Rope(((1.0, 0.3), (0.7, -0.1)), pairing=pairing).partial(6)
    learned = rope3d.LearnedRope(rope, heads=heads, dtype=torch.float64)
    q = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def turn(frequencies, positions, q, k):
        module = SimpleNamespace(
            rotation=lambda p, t: torch.func.functional_call(
                learned, {"frequencies": frequencies}, (p,)
            )
        )
        return rope3d.apply(q, k, module, positions)

    assert torch.autograd.gradcheck(turn, (learned.frequencies, positions, q, k))


@pytest.mark.parametrize("rope", [rope3d.paper(12), rope3d.axial((4, 4, 4), pairing="half")])
def test_positions_of_any_layout_have_the_gradients_of_differences(rope, monkeypatch) -> None:
    monkeypatch.setattr(angles, "TABLE", torch.float64)
    q = torch.randn(2, 5, 4, 12, dtype=torch.float64)
    positions = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    timed = rope.extrapolate("time-aware", scale=2.0)
    t = torch.rand(2, dtype=torch.float64)
    for layout in (rope, timed):
        assert torch.autograd.gradcheck(
            lambda p, layout=layout: rope3d.apply(q, q, layout, p, t=t), (positions,)
        )


def test_gradient_of_float32_positions_is_the_closed_form(generator) -> None:
    rope = rope3d.lumina(72)
    positions = (torch.rand(9, 2, generator=generator) * 1000).requires_grad_()
    rotation = rope.rotation(positions)
    rotation.sin.sum().backward()
    rows = torch.tensor(rope.frequencies, dtype=torch.float64)
    expected = (positions.detach().double() @ rows).cos() @ rows.T
    torch.testing.assert_close(positions.grad, expected.float(), atol=1e-5, rtol=0)


def test_mixed_directions_are_a_right_angle_apart(generator) -> None:
    learned = rope3d.LearnedRope.mixed(16, 500, generator=generator, base=10.0)
    row, column = learned.frequencies.detach().double().unbind(1)
    speeds = torch.tensor([10.0 ** (-4 * k / 16) for k in range(4)], dtype=torch.float64)
    torch.testing.assert_close(
        torch.hypot(row, column), speeds.repeat(2).expand(500, 8), atol=1e-6, rtol=0
    )
    along, across = row[:, :4] * row[:, 4:], column[:, :4] * column[:, 4:]
    torch.testing.assert_close(along, -across, atol=1e-6, rtol=0)
    direction = torch.atan2(row[:, 0], column[:, 0])
    torch.testing.assert_close(
        torch.atan2(row[:, :4], column[:, :4]), direction[:, None].expand(-1, 4), atol=1e-5, rtol=0
    )
    assert direction.histc(4, -math.pi, math.pi).min() > 90  # 125 expected in each quarter
    again = rope3d.LearnedRope.mixed(16, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.frequencies, learned.frequencies)


def test_mixed_equals_timm(timm_positions, apart, generator) -> None:
    torch.manual_seed(0)
    embed = timm_positions.RotaryEmbeddingMixed(4 * 16, 1, 4, temperature=10.0)
    learned = rope3d.LearnedRope.mixed(16, 4, generator=generator)
    with torch.no_grad():  # theirs [2, depth, heads, pairs], the column first
        learned.frequencies.copy_(embed.freqs[:, 0].flip(0).transpose(0, 1))
    q = torch.rand(1, 4, 42, 16, generator=generator) * 2 - 1
    theirs_table = embed.get_embed([6, 7])[0]
    theirs = timm_positions.apply_rot_embed_cat(q, theirs_table)
    ours, _ = rope3d.apply(
        q.transpose(1, 2), q.transpose(1, 2), learned, rope3d.grid(height=6, width=7)
    )
    source = "timm, RotaryEmbeddingMixed"
    apart("LearnedRope.mixed(16, 4), q below 1", source, (ours.transpose(1, 2),), (theirs,), 1e-6)
    theirs.square()[..., 0].sum().backward()
    ours.square()[..., 0].sum().backward()
    expected = embed.freqs.grad[:, 0].flip(0).transpose(0, 1)
    torch.testing.assert_close(learned.frequencies.grad, expected, atol=1e-3, rtol=1e-4)


def test_compiles_whole_with_its_gradients() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    learned = rope3d.LearnedRope.mixed(16, 2, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True)
    for _ in range(3):
        q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
        positions = torch.randn(5, 2)
        grads = []
        for turn in (compiled, rope3d.apply):
            turned = turn(q, k, learned, positions)
            (turned[0].sum() + turned[1].square()[..., 0].sum()).backward()
            grads.append((*turned, learned.frequencies.grad))
            learned.zero_grad()
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_is_saved_moved_and_trained_as_a_module(generator) -> None:
    learned = rope3d.LearnedRope.mixed(16, 2, generator=generator)
    assert list(learned.state_dict()) == ["frequencies"]
    assert repr(learned) == "LearnedRope(head_dim=16, axes=2, heads=2)"
    assert (
        rope3d.LearnedRope(rope3d.lumina(16), dtype=torch.float64).frequencies.dtype.itemsize == 8
    )
    q, positions = torch.randn(9, 2, 16), rope3d.grid(height=3, width=3)
    target, _ = rope3d.apply(q, q, rope3d.lumina(16).extrapolate("ntk", scale=4.0), positions)
    learned = rope3d.LearnedRope(rope3d.lumina(16), heads=2)
    optimiser = torch.optim.Adam(learned.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (rope3d.apply(q, q, learned, positions)[0] - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r, g: rope3d.LearnedRope(r, heads=0), "heads is 0"),
        (lambda r, g: rope3d.LearnedRope.mixed(18, 2, generator=g), "multiple of 4"),
        (lambda r, g: rope3d.LearnedRope.mixed(16, 2, generator=g, base=0.0), "base 0.0"),
        (lambda r, g: rope3d.LearnedRope(r).rotation(torch.zeros(5, 3)), "on_axes"),
        (
            lambda r, g: rope3d.Rotation(torch.ones(5, 8), torch.ones(5, 8), per_head=True),
            r"tokens, heads, pairs\]",
        ),
        (
            lambda r, g: rope3d.apply(
                torch.zeros(5, 4, 16),
                torch.zeros(5, 2, 16),
                rope3d.LearnedRope(r, heads=4),
                torch.zeros(5, 2),
            ),
            "as many in the rotation as in k",
        ),
        (
            lambda r, g: rope3d.apply(
                torch.zeros(2, 5, 4, 16),
                torch.zeros(2, 5, 2, 16),
                rope3d.LearnedRope(r, heads=2),
                torch.zeros(6, 2),
            ),
            "cover the 5 tokens",
        ),
    ],
)
def test_errors_say_what_was_expected(build, message, generator) -> None:
    with pytest.raises(ValueError, match=message):
        build(rope3d.lumina(16), generator)
