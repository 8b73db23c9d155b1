"""Layouts against closed forms and the released tables."""

import math
import threading
from pathlib import Path

import pytest
import torch

import rope3d
from rope3d import angles

LAYOUTS = {
    "lumina": rope3d.lumina(24),
    "axial-1": rope3d.axial((24,)),
    "axial-3": rope3d.axial((8, 6, 10)),
    "paper": rope3d.paper(24),
    "on-axes": rope3d.lumina(24).on_axes(3, (1, 2)),
}


def test_lumina_equals_the_released_table(golden: Path, apart) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    table = safetensors.load_file(golden / "rope_tables_hd32.safetensors")["base"]
    rotation = rope3d.lumina(32).rotation(rope3d.grid(height=24, width=24))
    ours = torch.stack((rotation.cos, rotation.sin), -1).view(24, 24, 16, 2)
    apart("lumina(32)", "Lumina-T2X, recorded table", (ours,), (table,), 1e-5)


@pytest.mark.parametrize("rope", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_angle_is_the_sum_over_axes(rope: rope3d.Rope) -> None:
    positions = torch.randn(2, 5, rope.axes, dtype=torch.float64) * 1000
    angle = positions @ torch.tensor(rope.frequencies, dtype=torch.float64)
    rotation = rope.rotation(positions)
    assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
    assert rotation.cos.shape == (2, 5, rope.head_dim // 2)
    torch.testing.assert_close(rotation.cos, angle.cos().float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation.sin, angle.sin().float(), atol=1e-6, rtol=0)


def test_lumina_alternates_rows_and_columns() -> None:
    row, column = rope3d.lumina(72).frequencies
    assert row[::2] == column[1::2]
    assert row[::2] == pytest.approx([10000.0 ** (-4 * k / 72) for k in range(18)])
    assert set(row[1::2]) == set(column[::2]) == {0.0}


def test_axial_gives_each_axis_its_block() -> None:
    rope = rope3d.axial((4, 6), base=100.0)
    assert rope.frequencies[0] == pytest.approx((1.0, 0.1, 0, 0, 0))
    assert rope.frequencies[1] == pytest.approx((0, 0, 1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)))


def test_paper_counts_from_one_in_every_third() -> None:
    rope = rope3d.paper(24, base=5.0)
    theta = [5.0 ** (-6 * j / 24) for j in range(1, 5)]
    for axis, row in enumerate(rope.frequencies):
        assert row[4 * axis : 4 * axis + 4] == pytest.approx(theta)
        assert sum(value != 0 for value in row) == 4


def test_on_axes_reads_only_the_chosen_columns() -> None:
    wide = torch.randn(7, 4)
    moved = rope3d.lumina(8).on_axes(4, (3, 1)).rotation(wide)
    plain = rope3d.lumina(8).rotation(wide[:, [3, 1]])
    torch.testing.assert_close(moved.cos, plain.cos)
    torch.testing.assert_close(moved.sin, plain.sin)


def test_angles_stay_exact_far_from_the_origin() -> None:
    rotation = rope3d.axial((2,)).rotation(torch.tensor([[1_000_003]]))
    assert rotation.cos.item() == pytest.approx(math.cos(1_000_003), abs=1e-6)


def test_a_token_has_the_same_bits_alone_and_in_a_batch() -> None:
    positions = torch.randn(50, 2) * 100
    rope = rope3d.lumina(72)
    assert torch.equal(rope.rotation(positions).cos[7:8], rope.rotation(positions[7:8]).cos)


def test_frequencies_reach_a_device_once_even_from_many_threads() -> None:
    rope = rope3d.lumina(16, base=123.0)
    expected = rope.rotation(torch.ones(3, 2)).cos
    before = dict(vars(angles._MATRICES))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(rope.rotation(torch.ones(3, 2)).cos))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)
    assert vars(angles._MATRICES).keys() == before.keys()
    assert all(vars(angles._MATRICES)[key] is matrix for key, matrix in before.items())


def test_first_use_in_inference_mode_leaves_training_possible() -> None:
    rope = rope3d.lumina(8, base=77.0)
    with torch.inference_mode():
        rope.rotation(torch.ones(3, 2))
    positions = torch.ones(3, 2, requires_grad=True)
    rope.rotation(positions).sin.sum().backward()
    assert positions.grad is not None


def test_fake_tensors_are_not_cached() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    rope = rope3d.lumina(8, base=78.0)
    with FakeTensorMode():
        assert rope.rotation(torch.ones(3, 2)).cos.shape == (3, 4)
    assert rope.rotation(torch.zeros(3, 2)).cos.sum().item() == 12.0


def test_a_layout_is_data_that_compares_by_value() -> None:
    assert rope3d.lumina(8) == rope3d.lumina(8)
    assert len({rope3d.lumina(8), rope3d.lumina(8), rope3d.paper(12)}) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rope3d.lumina(70), "head_dim is 70; expected a positive multiple of 4"),
        (lambda: rope3d.lumina(0), "head_dim is 0"),
        (lambda: rope3d.paper(64), "multiple of 6; pad heads to 66"),
        (lambda: rope3d.axial((4, 3)), r"dims are \(4, 3\)"),
        (lambda: rope3d.axial(()), "one positive even number"),
        (lambda: rope3d.lumina(8, base=0.0), "base is 0.0"),
        (lambda: rope3d.Rope(()), "at least one row"),
        (lambda: rope3d.Rope(((1.0,), (1.0, 2.0))), r"rows of lengths \[1, 2\]"),
        (lambda: rope3d.Rope(((math.inf,),)), "not finite"),
        (lambda: rope3d.lumina(8).on_axes(3, (1,)), "expected 2 different columns"),
        (lambda: rope3d.lumina(8).on_axes(3, (1, 1)), "expected 2 different columns"),
        (lambda: rope3d.lumina(8).on_axes(2, (1, 2)), r"expected each in \[0, 2\)"),
        (lambda: rope3d.lumina(8).rotation(torch.zeros(5, 3)), "on_axes"),
        (lambda: rope3d.lumina(8).rotation(torch.zeros(2)), r"expected \[..., tokens, 2\]"),
    ],
)
def test_errors_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
