"""Rotation against complex multiplication, and the properties that define it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import rope3d
from rope3d import angles, reference
from rope3d import rotation as rotation_module

LAYOUTS = {
    "lumina": rope3d.lumina(24),
    "axial-1": rope3d.axial((24,)),
    "axial-3": rope3d.axial((8, 6, 10)),
    "paper": rope3d.paper(24),
    "on-axes": rope3d.lumina(24).on_axes(3, (1, 2)),
}
each_layout = pytest.mark.parametrize("rope", LAYOUTS.values(), ids=LAYOUTS.keys())


def complex_rotation(x: torch.Tensor, rope: rope3d.Rope, positions: torch.Tensor) -> torch.Tensor:
    angle = positions.double() @ torch.tensor(rope.frequencies, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(-2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


@each_layout
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-6),  # cosine and sine are float32
        (torch.float32, 2e-6),
        (torch.bfloat16, 2.0**-8 + 2e-6),  # half a unit in the last place of values below 2
        (torch.float16, 2.0**-11 + 2e-6),
    ],
)
def test_equals_complex_multiplication(rope, dtype, tolerance) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2, 7, 6, 24, generator=generator).mul(2).sub(1).to(dtype)
    k = torch.rand(2, 7, 2, 24, generator=generator).mul(2).sub(1).to(dtype)
    positions = torch.rand(2, 7, rope.axes, generator=generator) * 50
    for ours, x in zip(rope3d.apply(q, k, rope, positions), (q, k), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == x.shape
        expected = complex_rotation(x, rope, positions)
        torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=0)


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    here=st.lists(st.integers(-500, 500), min_size=3, max_size=3),
    there=st.lists(st.integers(-500, 500), min_size=3, max_size=3),
    shift=st.lists(st.floats(-500, 500, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_scores_depend_only_on_differences(name, here, there, shift, seed) -> None:
    rope = LAYOUTS[name]
    q, k = torch.randn(2, 1, 1, 24, generator=torch.Generator().manual_seed(seed)).double()

    def score(move: float) -> torch.Tensor:
        def at(place):
            return torch.tensor([place], dtype=torch.float64)[:, : rope.axes] + move * offset

        offset = torch.tensor([shift], dtype=torch.float64)[:, : rope.axes]
        turned_q, _ = rope3d.apply(q, q, rope, at(here))
        turned_k, _ = rope3d.apply(k, k, rope, at(there))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(1.0), score(0.0), atol=2e-5, rtol=0)


@each_layout
def test_norms_are_preserved(rope) -> None:
    q, k = torch.randn(5, 3, 24), torch.randn(5, 1, 24)
    turned = rope3d.apply(q, k, rope, torch.randn(5, rope.axes) * 100)
    for ours, x in zip(turned, (q, k), strict=True):
        torch.testing.assert_close(ours.norm(dim=-1), x.norm(dim=-1))


def test_origin_turns_nothing() -> None:
    q = torch.randn(2, 5, 3, 24)
    turned, _ = rope3d.apply(q, q, rope3d.lumina(24), torch.zeros(5, 2))
    assert torch.equal(turned, q)


def test_pairs_of_frequency_zero_are_left_alone() -> None:
    q = torch.randn(5, 3, 6)
    partial = rope3d.Rope(((1.0, 0.0, 0.0),))
    turned, _ = rope3d.apply(q, q, partial, torch.ones(5, 1))
    assert torch.equal(turned[..., 2:], q[..., 2:])
    assert not torch.equal(turned[..., :2], q[..., :2])


def test_strides_do_not_matter_and_inputs_are_unchanged() -> None:
    rope, positions = rope3d.lumina(24), rope3d.grid(height=2, width=3)
    heads_first = torch.randn(2, 4, 6, 24).transpose(1, 2)
    every_other = torch.randn(2, 6, 3, 48)[..., ::2]
    expanded = torch.randn(2, 6, 1, 24).expand(2, 6, 5, 24)
    for x in (heads_first, every_other, expanded):
        before = x.clone()
        turned = rope3d.apply(x, x, rope, positions)
        dense = rope3d.apply(x.contiguous(), x.contiguous(), rope, positions)
        torch.testing.assert_close(turned[0], dense[0], atol=1e-6, rtol=0)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 4, 24), (6, 4, 24), (1, 6, 1, 2), (2, 6, 0, 24)])
def test_complex_and_real_arithmetic_agree(dtype, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).mul(2).sub(1).to(dtype)
    angle = torch.rand(6, 1, shape[-1] // 2, generator=generator) * 7
    real = reference._turn(x, angle.cos(), angle.sin())
    ours = reference._multiply(x, reference.as_complex(angle.cos(), angle.sin(), dtype))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, real, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_the_complex_table_is_made_once_and_serves_gradients(monkeypatch) -> None:
    rotation = rope3d.lumina(24).rotation(rope3d.grid(height=2, width=3))
    made = []
    monkeypatch.setattr(
        rotation_module, "as_complex", lambda *given: made.append(1) or reference.as_complex(*given)
    )
    q = torch.randn(1, 6, 2, 24)
    with torch.inference_mode():
        first, _ = rope3d.rotate(q, q.bfloat16(), rotation)
    leaf = q.clone().requires_grad_()
    again, _ = rope3d.rotate(leaf, leaf, rotation)
    again.sum().backward()
    own = q.clone()
    rope3d.rotate(own, q.clone(), rotation, inplace=True)
    assert len(made) == 1
    assert torch.equal(first, again)
    assert torch.equal(first, own)
    wide, _ = rope3d.rotate(q.double(), q.double(), rotation)
    exact = reference._turn(
        q.double(), rotation.cos.double()[:, None], rotation.sin.double()[:, None]
    )
    torch.testing.assert_close(wide, exact, atol=1e-14, rtol=0)


def test_what_torch_func_computes_is_not_kept() -> None:
    rotation = rope3d.lumina(24).rotation(rope3d.grid(height=2, width=3))
    q, k = torch.randn(1, 6, 2, 24), torch.randn(1, 6, 2, 24)
    gradient = torch.func.grad(lambda q: rope3d.rotate(q, k, rotation)[0].square().sum())(q)
    torch.testing.assert_close(gradient, 2 * q)  # a rotation keeps lengths
    assert "_kept_turns" not in vars(rotation)
    later, _ = rope3d.rotate(q, k, rotation)
    expected = reference._turn(q, rotation.cos[:, None], rotation.sin[:, None])
    torch.testing.assert_close(later, expected, atol=1e-6, rtol=0)


def test_slices_of_one_projection_and_odd_places() -> None:
    rope, positions = rope3d.lumina(24), rope3d.grid(height=2, width=3)
    q, k, _ = torch.randn(2, 6, 8 * 24).unflatten(-1, (8, 24)).split((4, 2, 2), dim=2)
    odd = torch.randn(2, 6, 1 + 4 * 24)[..., 1:].unflatten(-1, (4, 24))  # starts at an odd place
    for x in (q, k, odd):
        ours = rope3d.apply(x, x, rope, positions)[0]
        dense = rope3d.apply(x.clone(), x.clone(), rope, positions)[0]
        torch.testing.assert_close(ours, dense, atol=1e-6, rtol=0)


def test_packed_equals_samples_alone() -> None:
    rope = rope3d.lumina(24)
    samples = [rope3d.grid(height=2, width=3), rope3d.grid(height=1, width=4)]
    positions, _ = rope3d.pack(samples)
    q = torch.randn(10, 2, 24)
    packed, _ = rope3d.apply(q, q, rope, positions)
    alone = [rope3d.apply(x, x, rope, p)[0] for x, p in zip(q.split((6, 4)), samples, strict=True)]
    assert torch.equal(packed, torch.cat(alone))


def test_gradients_in_float64() -> None:
    rotation = rope3d.paper(6).rotation(torch.randn(2, 3, 3))
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: rope3d.rotate(q, k, rotation), (q, k))


def test_positions_can_be_learned() -> None:
    positions = torch.randn(5, 2, requires_grad=True)
    q = torch.randn(5, 1, 8)
    turned, _ = rope3d.apply(q, q, rope3d.lumina(8), positions)
    turned[..., ::2].sum().backward()
    assert positions.grad is not None
    assert positions.grad.abs().sum() > 0


@pytest.mark.parametrize("float64", [True, False], ids=["float64", "turns"])
@pytest.mark.parametrize(
    "rope",
    [
        rope3d.lumina(8),
        rope3d.lumina(8).extrapolate("time-aware", scale=2.0),
        rope3d.lumina(8).extrapolate("time-aware-watershed", scale=2.0),
        rope3d.LearnedRope(rope3d.lumina(8)),
        rope3d.LearnedRope.mixed(8, 1, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["plain", "time-aware", "watershed", "learned", "mixed"],
)
def test_autocast_does_not_lower_the_precision(rope, float64, monkeypatch) -> None:
    q, positions, t = torch.randn(5, 1, 8), torch.randn(5, 2) * 10000, torch.tensor(0.6)
    exact = rope.rotation(positions, t)
    monkeypatch.setattr(angles, "has_float64", lambda device: float64)
    plain, _ = rope3d.apply(q, q, rope, positions, t=t)
    with torch.autocast("cpu", torch.bfloat16):
        rotation = rope.rotation(positions, t)
        cast, _ = rope3d.apply(q, q, rope, positions, t=t)
    assert torch.equal(plain, cast)
    torch.testing.assert_close(rotation.cos, exact.cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation.sin, exact.sin, atol=1e-6, rtol=0)


def test_autocast_lowers_an_einsum_which_is_why_angles_are_none() -> None:
    rope, positions = rope3d.lumina(8), torch.arange(1000.0, 1010.0).view(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        angle = torch.einsum("ta,ap->tp", positions, torch.tensor(rope.frequencies))
    assert (angle.float().cos() - rope.rotation(positions).cos).abs().max() > 0.1


def test_compiles_whole_and_once_for_all_positions() -> None:
    torch._dynamo.reset()
    rope, counter = rope3d.lumina(8, base=99.0), CompileCounter()
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True)
    for _ in range(4):
        q, k, positions = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(5, 2)
        ours = compiled(q, k, rope, positions)
        for left, right in zip(ours, rope3d.apply(q, k, rope, positions), strict=True):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
    assert counter.frame_count == 1


def test_an_equal_layout_recompiles_nothing_and_another_is_not_confused_with_it() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True)
    q, positions = torch.randn(5, 1, 8), torch.randn(5, 2)
    for base, graphs in ((10.0, 1), (10.0, 1), (20.0, 2), (10.0, 2)):
        rope = rope3d.lumina(8, base=base)
        ours, eager = compiled(q, q, rope, positions)[0], rope3d.apply(q, q, rope, positions)[0]
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=0)
        assert counter.frame_count == graphs


def test_compiles_for_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True, dynamic=True)
    rope = rope3d.lumina(8)
    for tokens in (5, 9, 6, 17):
        q, positions = torch.randn(2, tokens, 3, 8), torch.randn(tokens, 2)
        ours, eager = compiled(q, q, rope, positions)[0], rope3d.apply(q, q, rope, positions)[0]
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=0)
    assert counter.frame_count == 1


def test_several_new_layouts_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    ropes = [rope3d.lumina(8, base=base) for base in (31.0, 32.0, 33.0)]
    ropes.append(ropes[0].extrapolate("time-aware", scale=2.0))

    def turn(q, positions, t):
        for rope in ropes:
            q, _ = rope3d.apply(q, q, rope, positions, t=t)
        return q

    q, positions, t = torch.randn(5, 1, 8), torch.randn(5, 2), torch.tensor(0.5)
    ours = torch.compile(turn, backend="eager", fullgraph=True)(q, positions, t)
    torch.testing.assert_close(ours, turn(q, positions, t), atol=4e-6, rtol=0)


def test_compiles_with_the_eager_backend_and_a_named_one() -> None:
    torch._dynamo.reset()
    q, rotation = torch.randn(5, 4, 8), rope3d.lumina(8).rotation(torch.randn(5, 2))
    for name in (None, "reference"):
        compiled = torch.compile(rope3d.rotate, backend="eager", fullgraph=True)
        ours = compiled(q, q, rotation, backend=name)
        eager = rope3d.rotate(q, q, rotation)
        torch.testing.assert_close(ours[0], eager[0], atol=1e-6, rtol=0)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, q, positions):
            return rope3d.apply(q, q, rope3d.lumina(8), positions)[0]

    for strict in (True, False):
        q, positions = torch.randn(5, 4, 8), torch.randn(5, 2)
        program = torch.export.export(Module(), (q, positions), strict=strict)
        torch.testing.assert_close(program.module()(q, positions), Module()(q, positions))


@pytest.mark.parametrize(
    ("q", "k", "cos", "message"),
    [
        ((5, 8), (5, 8), (5, 4), "transpose"),
        ((2, 5, 4, 8), (5, 4, 8), (5, 4), "expected q and k both"),
        ((2, 5, 4, 8), (2, 6, 4, 8), (5, 4), "differ only in the number of heads"),
        ((2, 5, 4, 8), (2, 5, 4, 6), (5, 4), "differ only in the number of heads"),
        ((2, 5, 4, 8), (2, 5, 2, 8), (5, 3), "build the layout with head_dim=8"),
        ((2, 5, 4, 8), (2, 5, 2, 8), (6, 4), "cover the 5 tokens"),
        ((2, 5, 4, 8), (2, 5, 2, 8), (3, 5, 4), "cover the 5 tokens"),
        ((5, 4, 8), (5, 2, 8), (1, 5, 4), "cover the 5 tokens"),
    ],
)
def test_errors_say_what_was_expected(q, k, cos, message) -> None:
    rotation = rope3d.Rotation(torch.ones(cos), torch.zeros(cos))
    with pytest.raises(ValueError, match=message):
        rope3d.rotate(torch.zeros(q), torch.zeros(k), rotation)


def test_cosine_and_sine_must_agree() -> None:
    with pytest.raises(ValueError, match="expected both"):
        rope3d.Rotation(torch.ones(2, 3), torch.ones(2, 4))


def test_integers_are_refused_with_the_reason() -> None:
    rotation = rope3d.lumina(8).rotation(torch.zeros(5, 2))
    whole = torch.zeros(5, 1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs floating point"):
        rope3d.rotate(whole, whole, rotation)
