"""Wavelengths as numbers, and what the figure shows."""

import math
import sys

import pytest
import torch

import rope3d

METHODS = ("extrapolation", "interpolation", "ntk", "frequency-aware", "time-aware")


def test_wavelength_times_frequency_is_a_turn() -> None:
    rope = rope3d.lumina(24)
    ours = rope3d.wavelengths(rope)
    assert ours.shape == (2, 12)
    assert ours[0, 0].item() == pytest.approx(2 * math.pi)
    assert ours[0, 2].item() == pytest.approx(2 * math.pi * 10000 ** (4 / 24))
    assert ours[0, 1].item() == math.inf


def test_wavelengths_follow_the_timestep() -> None:
    rope = rope3d.paper(24, base=5.0)
    timed = rope.extrapolate("time-aware", scale=2.0)
    ours = rope3d.wavelengths(timed, torch.tensor([0.0, 1.0]))
    assert ours.shape == (2, 3, 12)
    torch.testing.assert_close(ours[0], 2 * rope3d.wavelengths(rope))
    with pytest.raises(ValueError, match="give t"):
        rope3d.wavelengths(timed)


def test_the_pair_of_the_trained_length_is_where_frequency_aware_meets_interpolation() -> None:
    length = 64.0
    rope = rope3d.axial((400,))
    plain, aware = (
        rope3d.wavelengths(rope)[0],
        rope3d.wavelengths(rope.extrapolate("frequency-aware", scale=2.0, trained=length))[0],
    )
    beyond = plain >= length
    torch.testing.assert_close(aware[beyond], 2 * plain[beyond])
    assert (aware[~beyond] < 2 * plain[~beyond]).all()


def test_the_figure_has_a_line_per_layout(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    rope = rope3d.paper(24, base=5.0)
    ropes = {m: rope.extrapolate(m, scale=2.0, trained=16) for m in METHODS}
    ax = rope3d.plot_wavelengths(ropes, t=0.3, trained=16, target=32)
    assert [line.get_label() for line in ax.get_lines()][:5] == list(METHODS)
    expected = rope3d.wavelengths(rope)[2, 8:]
    assert ax.get_lines()[0].get_ydata() == pytest.approx(expected.tolist())
    ax.figure.savefig(tmp_path / "wavelengths.png")
    assert rope3d.plot_wavelengths({"trained": rope}, ax=ax) is ax


def test_a_missing_matplotlib_is_named_with_its_cure(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"rope3d\[plot\]"):
        rope3d.plot_wavelengths({"trained": rope3d.lumina(8)})


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        rope3d.plot_wavelengths({})
