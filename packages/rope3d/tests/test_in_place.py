"""Rotation in place against rotation out of place, memory by the allocator's own record."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope3d
from rope3d import backends, reference
from rope3d.overlap import meet, repeats

LAYOUTS = {
    "lumina": rope3d.lumina(24),
    "half": rope3d.axial((12, 12), pairing="half"),
    "partial": rope3d.axial((8, 8)).partial(24),
    "partial-half": rope3d.axial((8, 8), pairing="half").partial(24),
    "per-head": rope3d.LearnedRope.mixed(24, 2, generator=torch.Generator().manual_seed(0)),
}
each_layout = pytest.mark.parametrize("rope", LAYOUTS.values(), ids=LAYOUTS.keys())
POSITIONS = rope3d.grid(height=2, width=3)


@pytest.fixture
def rotation(rope):
    with torch.no_grad():
        return rope.rotation(POSITIONS)


def draw(dtype=torch.float32):
    """Queries and keys in several places in memory."""
    yield torch.randn(2, 6, 4, 24).to(dtype), torch.randn(2, 6, 2, 24).to(dtype)
    fused = torch.randn(2, 6, 8 * 24).to(dtype).unflatten(-1, (8, 24))
    yield fused[:, :, :4], fused[:, :, 4:6]
    heads_first = torch.randn(2, 8, 6, 24).to(dtype).transpose(1, 2)
    yield heads_first[:, :, 2:6], heads_first[:, :, :2]
    odd = torch.randn(2, 6, 1 + 6 * 24).to(dtype)[..., 1:].unflatten(-1, (6, 24))
    yield odd[:, :, :4], odd[:, :, 4:]
    every_other = torch.randn(6, 6, 48).to(dtype)
    yield every_other[:, :4, ::2], every_other[:, :2, 1::2]


@each_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [2**18, 100])
def test_equals_out_of_place_with_any_strides(rotation, dtype, block, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK", block)
    for q, k in draw(dtype):
        expected = rope3d.rotate(q, k, rotation)
        turned = rope3d.rotate(q, k, rotation, inplace=True)
        assert turned[0] is q
        assert turned[1] is k
        for ours, out in zip(turned, expected, strict=True):
            torch.testing.assert_close(ours, out, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_nothing_to_write_is_written() -> None:
    for shapes in (((0, 4, 24), (0, 2, 24)), ((2, 0, 4, 24), (2, 0, 2, 24)), ((5, 0, 24),) * 2):
        q, k = (torch.zeros(shape) for shape in shapes)
        for rope in (rope3d.lumina(24), rope3d.axial((12, 12), pairing="half")):
            positions = torch.zeros(q.shape[-3], 2)
            assert rope3d.apply(q, k, rope, positions, inplace=True)[0] is q


def test_neighbours_in_memory_are_left_alone() -> None:
    fused = torch.randn(2, 6, 8, 24)
    before = fused.clone()
    rope = rope3d.axial((8, 8)).partial(24)
    rope3d.apply(fused[:, :, :4], fused[:, :, 4:6], rope, POSITIONS, inplace=True)
    assert torch.equal(fused[:, :, 6:], before[:, :, 6:])
    assert torch.equal(fused[..., 16:], before[..., 16:])
    assert not torch.equal(fused[:, 1:, :6, :16], before[:, 1:, :6, :16])


@each_layout
@pytest.mark.parametrize("learns", [False, True])
def test_gradients_equal_those_out_of_place(rope, learns) -> None:
    weight_q, weight_k = torch.randn(2, 6, 4, 24), torch.randn(2, 6, 2, 24)
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        x = torch.randn(2, 6, 6, 24, requires_grad=True)
        positions = POSITIONS.clone().requires_grad_(learns)
        fused = 2 * x
        q, k = rope3d.apply(fused[:, :, :4], fused[:, :, 4:], rope, positions, inplace=inplace)
        ((q * weight_q).sum() + (k.square() * weight_k).sum()).backward()
        grads.append((q, k, x.grad, positions.grad))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_a_value_that_autograd_needs_is_not_lost_silently() -> None:
    x = torch.randn(6, 2, 24, requires_grad=True)
    q = x.exp()  # keeps its result for the backward
    rope3d.apply(q, 2 * x, rope3d.lumina(24), POSITIONS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


@pytest.fixture
def peak():
    """Bytes alive at most during a call beyond those before it."""

    def measure(function) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        return max(held, default=0)

    return measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_layout
def test_needs_a_fraction_of_the_memory(rope, dtype, peak) -> None:
    # 1024 tokens of 48 heads: the table is small beside q.
    q, k = torch.randn(1, 1024, 48, 24).to(dtype), torch.randn(1, 1024, 2, 24).to(dtype)
    with torch.no_grad():
        rotation = rope.rotation(rope3d.grid(height=32, width=32))
        out = peak(lambda: rope3d.rotate(q, k, rotation))
        within = peak(lambda: rope3d.rotate(q, k, rotation, inplace=True))
    print(f"{dtype}: {within} within, {out} out of place, for {q.nbytes + k.nbytes} of results")
    results = q.nbytes + k.nbytes
    assert out >= results
    assert within <= out - 0.6 * results


@pytest.mark.parametrize(
    ("dtype", "pairing"),
    [(torch.bfloat16, "interleaved"), (torch.bfloat16, "half"), (torch.float32, "half")],
)
def test_needs_little_beside_the_result_out_of_place(dtype, pairing, peak) -> None:
    q, k = torch.randn(1, 1024, 96, 48).to(dtype), torch.randn(1, 1024, 96, 48).to(dtype)
    rope = rope3d.axial((24, 24), pairing=pairing)
    rotation = rope.rotation(rope3d.grid(height=32, width=32))
    assert peak(lambda: rope3d.rotate(q, k, rotation)) <= 1.3 * (q.nbytes + k.nbytes)
    if dtype == torch.bfloat16:
        q.requires_grad_()  # recorded, for which whole tensors are made
        assert peak(lambda: rope3d.rotate(q, k, rotation)) > 1.3 * (q.nbytes + k.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of PyTorch's own jvp
@each_layout
def test_transforms_and_recorded_gradients_give_the_same(rotation, dtype, monkeypatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK", 100)
    both = torch.randn(3, 2, 6, 4, 24).to(dtype)

    def turned(q, rotation=rotation):
        return rope3d.rotate(q, q[..., :2, :], rotation)[0]

    plain = torch.stack([turned(q) for q in both])
    cosines = torch.stack([rotation.cos, rotation.cos])
    for found, expected in (
        (torch.vmap(turned)(both), plain),
        (turned(both[0].clone().requires_grad_()), plain[0]),
        (torch.func.jvp(turned, (both[0],), (both[1],))[1], plain[1]),
        (torch.vmap(lambda cos: turned(both[0], replace(rotation, cos=cos)))(cosines)[1], plain[0]),
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_a_backend_that_cannot_write_is_copied_from(pairing, monkeypatch) -> None:
    class Doubling:
        name = "doubling"

        def why_not(self, q, k):
            return None

        def rotate(self, q, k, cos, sin):
            return 2 * q, 2 * k

    class Writing(Doubling):
        def rotate_(self, q, k, cos, sin):
            q.mul_(3)
            k.mul_(3)

    monkeypatch.setattr(backends, "load", lambda name: None)
    rotation = rope3d.axial((24,), pairing=pairing).rotation(POSITIONS[:, :1])
    for backend, factor in ((Doubling(), 2), (Writing(), 3 if pairing == "interleaved" else 2)):
        monkeypatch.setitem(backends._LOADED, "doubling", backend)
        q, k = torch.ones(6, 4, 24), torch.ones(6, 2, 24)
        rope3d.rotate(q, k, rotation, inplace=True, backend="doubling")
        assert torch.equal(q, torch.full_like(q, factor))
        assert torch.equal(k, torch.full_like(k, factor))


@each_layout
def test_compiles_whole(rope, rotation) -> None:
    torch._dynamo.reset()

    def turn(q, k, rotation):
        return rope3d.rotate(q, k, rotation, inplace=True)

    compiled = torch.compile(turn, backend="aot_eager", fullgraph=True)
    q, k = torch.randn(2, 6, 4, 24), torch.randn(2, 6, 2, 24)
    expected = rope3d.rotate(q, k, rotation)
    turned = compiled(q, k, rotation)
    for ours, same, out in zip((q, k), turned, expected, strict=True):
        assert same.data_ptr() == ours.data_ptr()
        torch.testing.assert_close(ours, out, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    data=st.data(),
)
def test_overlap_is_what_an_index_of_memory_says(sizes, data) -> None:
    numbers = torch.arange(1000)
    whole = numbers[: torch.Size(sizes).numel()].view(sizes)

    def piece() -> torch.Tensor:
        x = whole
        for axis in range(len(sizes)):
            first = data.draw(st.integers(0, x.shape[axis] - 1))
            last = data.draw(st.integers(first, x.shape[axis]))
            x = x.narrow(axis, first, last - first)
        return x

    x, y = piece(), piece()
    assert not repeats(x)
    assert meet(x, y) == bool(set(x.flatten().tolist()) & set(y.flatten().tolist()))
    order = data.draw(st.permutations(range(len(sizes))))
    assert not repeats(x.permute(order))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: (x, x), "one tensor"),
        (lambda x: (x, x[:]), "share elements"),
        (lambda x: (x[:, :3], x[:, 1:3]), "share elements"),
        (lambda x: (x, x.view(torch.bfloat16)[..., :24]), "share elements"),
        (lambda x: (x[:, :1].expand(6, 4, 24), x[:, 1:]), "q of shape .* share memory"),
        (lambda x: (x, x[:1].clone().expand(6, 4, 24)), "k of shape .* share memory"),
        (lambda x: (x.as_strided((6, 4, 24), (10, 24, 1)), x.clone()), "share memory"),
        (lambda x: (x.requires_grad_(), x.detach().clone()), "q is a leaf"),
        (lambda x: (x.clone(), x.requires_grad_()), "k is a leaf"),
    ],
)
def test_errors_say_what_was_expected(build, message) -> None:
    q, k = build(torch.randn(6, 4, 24))
    before = q.detach().clone()
    with pytest.raises(ValueError, match=message):
        rope3d.apply(q, k, rope3d.lumina(24), POSITIONS, inplace=True)
    assert torch.equal(q, before)


def test_a_leaf_is_written_where_no_gradient_is_recorded() -> None:
    q, k = torch.randn(6, 4, 24, requires_grad=True), torch.randn(6, 2, 24)
    expected, _ = rope3d.apply(q, k, rope3d.lumina(24), POSITIONS)
    with torch.no_grad():
        rope3d.apply(q, k, rope3d.lumina(24), POSITIONS, inplace=True)
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)
