"""Extrapolation against the printed formulas, the released tables, and the limits between them."""

import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rope3d
from rope3d.extrapolation import METHODS, TIMED

LENGTH = 64.0
LAYOUTS = {
    "lumina": rope3d.lumina(72),
    "axial": rope3d.axial((44, 42, 42)),
    "paper": rope3d.paper(72),
    "half": rope3d.axial((24, 24), base=256.0, pairing="half"),
}
SCALES = (2.0, 1.5, 1.0)
each_layout = pytest.mark.parametrize("rope", LAYOUTS.values(), ids=LAYOUTS.keys())
each_method = pytest.mark.parametrize("method", METHODS)


def printed(method: str, base: float, e: float, s: float, d: int, t: float) -> float:
    """The formulas as the papers print them, for one pair, in float64."""
    theta = base**-e
    if method == "interpolation" or (method == "time-aware-watershed" and t < 0.3):
        return theta / s
    if method in ("ntk", "time-aware-watershed"):
        return (base * s) ** -e
    if method == "frequency-aware":
        d_target = d * math.log(LENGTH / (2 * math.pi), base)
        return max((base * s ** (d / d_target)) ** -e, theta / s)
    if method == "time-aware":
        d_t = (d - 1) * t + 1
        return max((base * s ** (d / d_t)) ** -e, theta / s)
    if method == "yarn":
        turns = LENGTH / (2 * math.pi / theta)
        gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        return (1 - gamma) * theta / s + gamma * theta
    return theta


@each_layout
@pytest.mark.parametrize("method", [method for method in METHODS if method != "riflex"])
@pytest.mark.parametrize("t", [0.0, 0.1, 0.29, 0.3, 0.7, 1.0])
def test_frequencies_are_those_of_the_papers(rope, method, t) -> None:
    scales = SCALES[: rope.axes]
    ours = rope.extrapolate(method, scale=scales, trained=LENGTH).frequencies_at(
        torch.tensor(t, dtype=torch.float64)
    )
    for axis, s in enumerate(scales):
        for pair, theta in enumerate(rope.frequencies[axis]):
            expected = theta and printed(
                method, rope.base[axis], rope.exponents[axis][pair], s, rope.head_dim, t
            )
            assert ours[axis, pair].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("key", "method"), [("linear1.5", "interpolation"), ("ntk1.5", "ntk")])
def test_equals_the_released_tables(golden: Path, apart, key: str, method: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    table = safetensors.load_file(golden / "rope_tables_hd32.safetensors")[key]
    rope = rope3d.lumina(32)
    height, width = table.shape[:2]
    positions = rope3d.grid(height=height, width=width)
    released = rope.extrapolate("time-aware-watershed", scale=1.5)
    t = torch.tensor(0.1 if method == "interpolation" else 0.3)
    for rotation in (
        rope.extrapolate(method, scale=1.5).rotation(positions),
        released.rotation(positions, t),
    ):
        ours = torch.stack((rotation.cos, rotation.sin), -1).view(height, width, 16, 2)
        apart(f"lumina(32), {method}", f"Lumina-T2X, table {key}", (ours,), (table,), 1e-5)


@each_layout
@each_method
def test_scale_one_changes_nothing(rope, method) -> None:
    same = rope.extrapolate(method, scale=1.0, trained=LENGTH)
    positions = torch.randn(5, rope.axes) * 50
    ours, plain = same.rotation(positions, torch.tensor(0.4)), rope.rotation(positions)
    assert torch.equal(ours.cos, plain.cos)
    assert torch.equal(ours.sin, plain.sin)


def test_time_aware_goes_from_interpolation_to_ntk() -> None:
    rope = rope3d.paper(72)
    timed = rope.extrapolate("time-aware", scale=SCALES)
    for t, method in ((0.0, "interpolation"), (1.0, "ntk")):
        end = rope.extrapolate(method, scale=SCALES)
        torch.testing.assert_close(timed.frequencies_at(t), end.frequencies_at())


def test_the_pair_of_exponent_zero_is_never_interpolated() -> None:
    at_noise = rope3d.lumina(72).extrapolate("time-aware", scale=2.0).frequencies_at(0.0)
    interpolated = rope3d.lumina(72).extrapolate("interpolation", scale=2.0).frequencies_at()
    assert at_noise[0, 0] == at_noise[1, 1] == 1.0
    torch.testing.assert_close(at_noise[:, 2:], interpolated[:, 2:])


def test_frequencies_fall_with_noise_and_never_leave_the_two_limits() -> None:
    rope = rope3d.lumina(72)
    frequencies = rope.extrapolate("time-aware", scale=8.0).frequencies_at(torch.linspace(0, 1, 50))
    trained = rope.frequencies_at()
    assert (frequencies.diff(dim=0) >= 0).all()
    assert (frequencies >= trained / 8 - 1e-12).all()
    assert (frequencies <= trained).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_overflows_at_noise(dtype) -> None:
    rope = rope3d.lumina(128).extrapolate("time-aware", scale=1000.0)
    t = torch.tensor([0.0, 1e-8, -1e-6, 1.0 + 1e-6]).to(dtype)
    assert rope.frequencies_at(t).isfinite().all()
    rotation = rope.rotation(rope3d.grid(height=3, width=3)[None], t)
    assert rotation.cos.shape == (4, 9, 64)
    assert rotation.cos.isfinite().all()


def test_riflex_lowers_only_the_intrinsic_pair() -> None:
    rope = rope3d.axial((16, 24, 24))
    theta = rope.frequencies[0]
    periods = [2 * math.pi / w for w in theta[:8]]
    for k in (None, 2, (2, 1, 1)):
        changed = rope.extrapolate("riflex", scale=(4.0, 1.0, 1.0), trained=13, k=k)
        intrinsic = min(range(8), key=lambda j: abs(periods[j] - 13)) if k is None else 1
        assert changed.frequencies[1:] == rope.frequencies[1:]
        for pair in range(len(theta)):
            expected = 0.9 * 2 * math.pi / (13 * 4) if pair == intrinsic else theta[pair]
            assert changed.frequencies[0][pair] == pytest.approx(expected)
    slow = rope.extrapolate("riflex", scale=(1.1, 1.0, 1.0), trained=13, k=8)
    assert slow == rope3d.Rope(rope.frequencies)  # its period is long enough already


@pytest.mark.parametrize("method", TIMED)
def test_each_sample_and_each_token_has_its_own_time(method) -> None:
    rope = rope3d.lumina(24).extrapolate(method, scale=(2.0, 3.0))
    positions, times = rope3d.grid(height=2, width=3), torch.tensor([0.0, 0.25, 0.8])
    alone = [rope.rotation(positions, t).cos for t in times]
    dense = rope.rotation(positions[None], times).cos
    packed = rope.rotation(positions.repeat(3, 1), times.repeat_interleave(6)).cos
    each = rope.rotation(positions.expand(3, 6, 2), times[:, None].expand(3, 6)).cos
    assert torch.equal(dense, torch.stack(alone))
    assert torch.equal(packed, torch.cat(alone))
    assert torch.equal(each, dense)


def test_apply_and_attention_take_the_times_of_a_batch() -> None:
    rope = rope3d.lumina(24).extrapolate("time-aware", scale=2.0)
    positions, times = rope3d.grid(height=2, width=3), torch.tensor([0.1, 0.9])
    q, k = torch.randn(2, 6, 4, 24), torch.randn(2, 6, 2, 24)
    ours = rope3d.apply(q, k, rope, positions, t=times)
    out = rope3d.attention(q, k, k, rope, positions, t=times)
    packed = rope3d.attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        k.flatten(0, 1),
        rope,
        positions.repeat(2, 1),
        t=times.repeat_interleave(6),
        lengths=(6, 6),
    )
    torch.testing.assert_close(packed.view_as(out), out)
    for i, t in enumerate(times):
        alone = rope3d.apply(q[i], k[i], rope, positions, t=t)
        torch.testing.assert_close(ours[0][i], alone[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(ours[1][i], alone[1], atol=1e-6, rtol=0)


@each_method
def test_axes_can_be_moved_before_or_after(method) -> None:
    rope, times = rope3d.lumina(24), torch.tensor(0.6)
    wide = torch.randn(7, 3)
    after = rope.extrapolate(method, scale=(2.0, 3.0), trained=LENGTH).on_axes(3, (2, 0))
    before = rope.on_axes(3, (2, 0)).extrapolate(method, scale=(3.0, 1.0, 2.0), trained=LENGTH)
    assert torch.equal(after.rotation(wide, times).cos, before.rotation(wide, times).cos)
    assert (after.axes, after.head_dim, after.pairing) == (3, 24, "interleaved")


@pytest.mark.parametrize("method", TIMED)
def test_one_compilation_serves_all_times_resolutions_and_scales(method) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True, dynamic=True)
    for step in range(50):
        height, width = 2 + step % 8, 11 - step % 8
        rope = rope3d.lumina(8).extrapolate(method, scale=(1 + height / 8, 1 + width / 8))
        t, positions = torch.rand(2), rope3d.grid(height=height, width=width)
        q, k = torch.randn(2, height * width, 4, 8), torch.randn(2, height * width, 2, 8)
        ours, eager = compiled(q, k, rope, positions, t=t), rope3d.apply(q, k, rope, positions, t=t)
        torch.testing.assert_close(ours[0], eager[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(ours[1], eager[1], atol=1e-6, rtol=0)
    assert counter.frame_count == 1


def test_one_compilation_serves_8_resolutions_at_50_timesteps_each() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True, dynamic=True)
    rope = rope3d.lumina(8).extrapolate("time-aware", scale=2.0)
    sizes = ((4, 4), (4, 8), (8, 4), (6, 6), (8, 8), (3, 10), (5, 7), (10, 3))  # 4 and 8: heads too
    for height, width in sizes:
        q, k = torch.randn(1, height * width, 8, 8), torch.randn(1, height * width, 4, 8)
        positions = rope3d.grid(height=height, width=width)
        for step in range(50):
            t = torch.full((1,), step / 49)
            ours, eager = (f(q, k, rope, positions, t=t) for f in (compiled, rope3d.apply))
            torch.testing.assert_close(ours, eager, atol=1e-6, rtol=0)
    assert counter.frame_count == 1


def test_no_resolution_is_mistaken_for_the_size_of_a_table() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(rope3d.apply, backend=counter, fullgraph=True, dynamic=True)
    rope = rope3d.lumina(72).extrapolate("time-aware", scale=2.0)  # its table is [4, 36]
    for height, width in ((4, 9), (2, 18), (36, 2), (6, 6), (5, 7)):
        q, t = torch.randn(2, height * width, 3, 72), torch.rand(2)
        compiled(q, q, rope, rope3d.grid(height=height, width=width), t=t)
    assert counter.frame_count == 1


def test_values_stay_values() -> None:
    rope = rope3d.lumina(24)
    timed = rope.extrapolate("time-aware", scale=2)
    assert timed == rope.extrapolate("time-aware", scale=(2.0, 2.0))
    assert len({timed, rope.extrapolate("time-aware", scale=2.0), rope}) == 2
    before = repr(timed)
    timed.rotation(rope3d.grid(height=2, width=2), torch.tensor(0.5))
    assert repr(timed) == before
    assert rope.extrapolate("extrapolation", scale=3.0) is rope
    twice = rope.extrapolate("ntk", scale=2.0).extrapolate("ntk", scale=3.0)
    torch.testing.assert_close(
        twice.frequencies_at(), rope.extrapolate("ntk", scale=6.0).frequencies_at()
    )


def test_a_custom_layout_supports_what_needs_no_base() -> None:
    custom = rope3d.Rope(((1.0, 0.1), (0.0, 0.3)))
    for method in ("extrapolation", "interpolation", "yarn", "riflex"):
        custom.extrapolate(method, scale=2.0, trained=LENGTH)
    for method in ("ntk", "frequency-aware", *TIMED):
        with pytest.raises(ValueError, match="knows only its frequencies"):
            custom.extrapolate(method, scale=2.0, trained=LENGTH)


def test_yarn_scale_is_the_temperature() -> None:
    assert rope3d.yarn_scale(1.0, 64) == pytest.approx(1 / 8)
    assert rope3d.yarn_scale(4.0, 64) == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 8)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: r.extrapolate("ntk2", scale=2.0), "expected one of: ntk, "),
        (lambda r: r.extrapolate("time_aware", scale=2.0), "expected one of: time-aware, "),
        (lambda r: r.extrapolate("ntk", scale=0.5), "expected at least 1"),
        (lambda r: r.extrapolate("ntk", scale=math.inf), "one positive number, or 2"),
        (lambda r: r.extrapolate("ntk", scale=(2.0,)), "one positive number, or 2"),
        (lambda r: r.extrapolate("yarn", scale=2.0), "needs trained="),
        (lambda r: r.extrapolate("yarn", scale=2.0, trained=64, ramp=(2, 1)), "low < high"),
        (lambda r: r.extrapolate("frequency-aware", scale=2.0, trained=6.0), "above 2 pi"),
        (lambda r: r.extrapolate("riflex", scale=2.0, trained=64, k=7), "expected 1 to 6"),
        (lambda r: r.extrapolate("riflex", scale=2.0, trained=64, k=(1,)), "k is"),
        (lambda r: r.extrapolate("time-aware", scale=2.0).rotation(torch.zeros(3, 2)), "give t"),
        (
            lambda r: r.extrapolate("time-aware", scale=2.0).rotation(
                torch.zeros(3, 2), torch.zeros(2)
            ),
            "one timestep per token",
        ),
        (
            lambda r: r.extrapolate("time-aware", scale=2.0).rotation(
                torch.zeros(3, 2), torch.zeros(2, 3, 1)
            ),
            "one timestep per sample",
        ),
        (
            lambda r: r.extrapolate("time-aware", scale=2.0).rotation(
                torch.zeros(3, 3), torch.zeros(3)
            ),
            "on_axes",
        ),
        (lambda r: rope3d.Rope(r.frequencies, r.base), "give both or neither"),
        (lambda r: rope3d.Rope(r.frequencies, r.base[:1], r.exponents), "1 bases"),
        (lambda r: rope3d.Rope(r.frequencies, (9.0, 9.0), r.exponents), "not base"),
        (lambda r: rope3d.TimedRope(rope3d.Rope(((1.0,),)), "time-aware", (2.0,)), "no exponents"),
        (lambda r: rope3d.TimedRope(r, "ntk", (2.0, 2.0)), "method is 'ntk'"),
        (lambda r: rope3d.TimedRope(r, "time-aware", (2.0,)), "expected 2 numbers"),
        (lambda r: rope3d.TimedRope(r, "time-aware", (2.0, 0.5)), "expected 2 numbers"),
        (lambda r: rope3d.yarn_scale(0.5, 64), "at least 1"),
    ],
)
def test_errors_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(rope3d.lumina(24))
