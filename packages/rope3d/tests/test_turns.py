"""Angles without float64, forced on a device that has it, against float64."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rope3d
from rope3d import angles, double_float, learned_rope, timed_rope
from rope3d.turns import split_turns

LAYOUTS = {
    "lumina": rope3d.lumina(72),
    "axial": rope3d.axial((128,)),
    "hunyuan-video": rope3d.hunyuan_video(),
    "mixed": rope3d.Rope(((1.0, 0.3, -2.5), (0.7, -0.1, 6.0))),
    "mrope": rope3d.mrope((16, 24, 24)),
}
each_layout = pytest.mark.parametrize("rope", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture
def no_float64(monkeypatch):
    """Say that no device has float64, and refuse to compute in it."""
    monkeypatch.setattr(angles, "has_float64", lambda device: False)

    def refuse(*_):
        raise AssertionError("float64 was used")

    for module in (angles, learned_rope, timed_rope):
        monkeypatch.setattr(module, "cos_sin", refuse)


class Float32Only(TorchDispatchMode):
    """Refuse results in float64, and reading the device back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        results = func(*args, **(kwargs or {}))
        assert all(
            x.dtype not in (torch.float64, torch.complex128)
            for x in tree_leaves(results)
            if isinstance(x, torch.Tensor)
        )
        return results


def exact(positions, frequencies) -> torch.Tensor:
    """Angles in float64, `[tokens, pairs]`, from `[(tokens,) axes, pairs]`."""
    return (positions.double().unsqueeze(-1) * frequencies.double()).sum(-2)


def check(rotation, angle) -> None:
    assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
    for ours, expected in ((rotation.cos, angle.cos()), (rotation.sin, angle.sin())):
        assert (ours.double() - expected).abs().max() <= 1e-6


@each_layout
@pytest.mark.parametrize("top", [64, 4096, 1_000_000])
def test_within_1e_6_of_float64(rope, top, request) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(-top, top, (5000, rope.axes), generator=generator).float()
    positions[::2] += torch.rand(2500, rope.axes, generator=generator)
    angle = positions.double() @ torch.tensor(rope.frequencies, dtype=torch.float64)
    request.getfixturevalue("no_float64")
    rotation = rope.rotation(positions)
    assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
    for ours, exact in ((rotation.cos, angle.cos()), (rotation.sin, angle.sin())):
        assert (ours.double() - exact).abs().max() <= 1e-6


def test_plain_float32_would_not_do() -> None:
    positions = torch.arange(999_000.0, 1_000_000.0)[:, None]
    plain = (positions * torch.tensor(rope3d.axial((128,)).frequencies[0])).cos()
    exact = rope3d.axial((128,)).rotation(positions).cos
    assert (plain - exact).abs().max() > 1e-3


def test_the_parts_add_up_to_the_frequency() -> None:
    frequencies = torch.tensor(rope3d.lumina(72).frequencies, dtype=torch.float64)
    high, low = split_turns(frequencies).double().chunk(2)
    torch.testing.assert_close(high + low, frequencies / (2 * torch.pi), rtol=2**-46, atol=0)


@pytest.mark.usefixtures("no_float64")
def test_whole_positions_of_other_dtypes_and_tokens_alone() -> None:
    rope, positions = rope3d.lumina(72), torch.randint(0, 1_000_000, (9, 2))
    ours = rope.rotation(positions)
    assert torch.equal(ours.cos, rope.rotation(positions.float()).cos)
    assert torch.equal(ours.cos[3:4], rope.rotation(positions[3:4]).cos)
    assert torch.equal(rope.rotation(torch.zeros(1, 2)).cos, torch.ones(1, 36))


@pytest.mark.usefixtures("no_float64")
def test_positions_can_be_learned() -> None:
    positions = torch.tensor([[3.0, 1000.0]], requires_grad=True)
    rotation = rope3d.lumina(8).rotation(positions)
    rotation.sin[0, 1].backward()
    assert positions.grad is not None
    assert positions.grad[0].tolist() == pytest.approx([0.0, rotation.cos[0, 1].item()], abs=1e-6)


@pytest.mark.usefixtures("no_float64")
def test_compiles_whole() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    rope = rope3d.lumina(8, base=55.0)
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True)
    q, positions = torch.randn(5, 2, 8), torch.randn(5, 2) * 1000
    expected = rope3d.apply(q, q, rope, positions)[0]
    torch.testing.assert_close(compiled(q, q, rope, positions)[0], expected, atol=1e-6, rtol=0)
    assert counter.frame_count == 1


def scattered(top: int, axes: int) -> torch.Tensor:
    """Whole and fractional positions on both sides of the origin."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(-top, top, (3000, axes), generator=generator).float()
    positions[::2] += torch.rand(1500, axes, generator=generator)
    return positions


@pytest.mark.parametrize("rope", [rope3d.lumina(72), rope3d.hunyuan_video(), rope3d.paper(72)])
@pytest.mark.parametrize("method", ["time-aware", "time-aware-watershed"])
@pytest.mark.parametrize("scale", [1.0, 1.5, 1000.0])
@pytest.mark.parametrize("top", [64, 4096, 1_000_000])
def test_timed_within_1e_6_of_float64(rope, method, scale, top, request) -> None:
    timed = rope.extrapolate(method, scale=scale)
    positions = scattered(top, rope.axes)
    t = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    t[:6] = torch.tensor([0.0, 1.0, 0.3, 0.29999998, 1e-8, -1.0])
    angle = exact(positions, timed.frequencies_at(t))
    request.getfixturevalue("no_float64")
    timed.rotation(positions, t)  # copies its table
    with Float32Only():
        rotation = timed.rotation(positions, t)
    check(rotation, angle)


@pytest.mark.parametrize("edge", [0.1, 0.3, 0.7])
def test_the_watershed_divides_float32_times_where_float64_does(edge, monkeypatch) -> None:
    timed = rope3d.axial((16,)).extrapolate("time-aware-watershed", scale=8.0, watershed=edge)
    middle = torch.tensor(edge)
    t = torch.stack((middle.nextafter(-middle), middle, middle.nextafter(2 * middle)))
    positions = torch.full((3, 1), 1000.0)
    exact_cos = timed.rotation(positions, t).cos
    monkeypatch.setattr(angles, "has_float64", lambda device: False)
    torch.testing.assert_close(timed.rotation(positions, t).cos, exact_cos, atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("top", [64, 1_000_000])
def test_learned_within_1e_6_of_float64(heads, top, request) -> None:
    learned = rope3d.LearnedRope(rope3d.lumina(24), heads=heads)
    torch.nn.init.normal_(learned.frequencies, generator=torch.Generator().manual_seed(0))
    positions = scattered(top, 2)
    rows = learned.frequencies.detach()
    place = positions if heads is None else positions.unsqueeze(-2)
    angle = exact(place, rows)
    request.getfixturevalue("no_float64")
    with Float32Only():
        rotation = learned.rotation(positions)
    check(rotation, angle)
    rotation.sin.sum().backward()
    slope = torch.einsum("ta,t...p->...ap", positions.double(), angle.cos())
    error = (learned.frequencies.grad - slope).abs().max() / slope.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("method", ["time-aware", "time-aware-watershed"])
def test_timed_gradients_equal_those_in_float64(method, monkeypatch) -> None:
    timed = rope3d.lumina(24).extrapolate(method, scale=(2.0, 3.0))
    grads = []
    for there in (True, False):
        monkeypatch.setattr(angles, "has_float64", lambda device, there=there: there)
        positions, t = scattered(64, 2).requires_grad_(), torch.full((), 0.6, requires_grad=True)
        timed.rotation(positions, t).sin.sum().backward()
        grads.append((positions.grad, torch.zeros(()) if t.grad is None else t.grad))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize("method", ["time-aware", "time-aware-watershed"])
def test_timed_compiles_whole_and_once(method) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True, dynamic=True)
    first = 0  # PyTorch may trace twice at first, to see which numbers are tensors
    for scale, tokens in ((2.0, 5), (3.5, 9), (1.5, 7)):
        rope = rope3d.lumina(8, base=56.0).extrapolate(method, scale=scale)
        q, positions, t = torch.randn(2, tokens, 3, 8), torch.randn(tokens, 2) * 1e4, torch.rand(2)
        expected = rope3d.apply(q, q, rope, positions, t=t)[0]
        ours = compiled(q, q, rope, positions, t=t)[0]
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)
        first = first or counter.frame_count
    assert counter.frame_count == first


numbers = st.floats(2**-20, 2**20, width=32) | st.floats(-(2**20), -(2**-20), width=32)


@settings(deadline=None, max_examples=200)
@given(a=numbers, b=numbers, c=st.floats(-1.0, 1.0), x=st.floats(-100.0, 100.0))
def test_double_floats_keep_what_float32_loses(a, b, c, x) -> None:
    def exactly(pair) -> Fraction:
        return Fraction(pair[0].item()) + Fraction(pair[1].item())

    left, right = torch.tensor(a), torch.tensor(b)
    assert exactly(double_float.exact_sum(left, right)) == Fraction(a) + Fraction(b)
    assert exactly(double_float.exact_product(left, right)) == Fraction(a) * Fraction(b)
    near = double_float.constant(double_float.split(a + c * abs(a) * 2**-24), left)
    other = double_float.constant(double_float.split(b), right)
    for ours, expected in (
        (double_float.multiply(near, other), exactly(near) * Fraction(b)),
        (double_float.divide(near, other), exactly(near) / Fraction(b)),
    ):
        assert abs(exactly(ours) / expected - 1) < 2**-42
    power = double_float.exp2(double_float.constant(double_float.split(x), left))
    assert float(exactly(power)) == pytest.approx(math.exp2(x), rel=1e-12)
