"""Positions against loops written out."""

import pytest
import torch

import rope3d


def test_image_grid_is_row_major() -> None:
    expected = [[row, column] for row in range(3) for column in range(4)]
    positions = rope3d.grid(height=3, width=4)
    assert positions.dtype == torch.float32
    assert positions.tolist() == expected


def test_video_grid_puts_frames_first() -> None:
    expected = [[f, r, c] for f in range(2) for r in range(3) for c in range(4)]
    assert rope3d.grid(frames=2, height=3, width=4).tolist() == expected


def test_empty_grid_keeps_its_axes() -> None:
    assert rope3d.grid(height=0, width=4).shape == (0, 2)


def test_pack_cuts_back_into_its_samples() -> None:
    samples = [rope3d.grid(height=2, width=n) for n in (3, 0, 5)]
    positions, cu_seqlens = rope3d.pack(samples)
    assert cu_seqlens.dtype == torch.int32
    for i, sample in enumerate(samples):
        assert torch.equal(positions[cu_seqlens[i] : cu_seqlens[i + 1]], sample)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rope3d.grid(height=-1, width=2), "at least 0"),
        (lambda: rope3d.pack([]), "nothing to pack"),
        (lambda: rope3d.pack([torch.zeros(2, 2), torch.zeros(2, 3)]), "the same axes in each"),
        (lambda: rope3d.pack([torch.zeros(2)]), r"expected \[tokens, axes\]"),
    ],
)
def test_errors_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
