"""Angles without float64, forced on a device that has it, against float64."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rope3d
from rope3d import angles
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

    monkeypatch.setattr(angles, "cos_sin", refuse)


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


def test_a_timed_layout_works_without_float64(monkeypatch) -> None:
    rope = rope3d.lumina(24).extrapolate("time-aware", scale=2.0)
    positions, t = rope3d.grid(height=16, width=16)[None], torch.tensor([0.0, 0.5])
    exact = rope.rotation(positions, t)
    monkeypatch.setattr(angles, "has_float64", lambda device: False)
    torch.testing.assert_close(rope.rotation(positions, t).cos, exact.cos, atol=1e-5, rtol=0)
