"""Positions against loops written out."""

import itertools

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


@pytest.mark.parametrize(
    "there", [n for k in (1, 2, 3) for n in itertools.combinations(range(3), k)]
)
@pytest.mark.parametrize("centred", [False, True])
def test_any_axes_with_their_own_offset_and_step(there, centred) -> None:
    names, lengths = ("frames", "height", "width"), (2, 3, 4)
    offsets, steps = (10.0, -3.0, 0.25), (0.5, 2.0, -1.0)
    expected = [
        [
            offsets[axis] + steps[axis] * (i - ((lengths[axis] - 1) / 2 if centred else 0))
            for axis, i in zip(there, token, strict=True)
        ]
        for token in itertools.product(*(range(lengths[axis]) for axis in there))
    ]
    positions = rope3d.grid(
        **{names[axis]: lengths[axis] for axis in there},
        offset=[offsets[axis] for axis in there],
        step=[steps[axis] for axis in there],
        centred=centred,
    )
    assert positions.dtype == torch.float32
    assert positions.tolist() == expected


def test_a_sound_is_a_column_of_seconds_rounded_once() -> None:
    seconds = rope3d.grid(frames=250, step=1 / 25)
    assert seconds.shape == (250, 1)
    assert torch.equal(seconds[:, 0], torch.tensor([i / 25 for i in range(250)]))


def test_a_step_scales_frames_as_cosmos_does(apart) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    embed = module.CosmosRotaryPosEmbed(96, (8, 16, 16), (1, 2, 2), rope_scale=(1.0, 1.0, 1.0))
    cos, sin = embed(torch.zeros(1, 4, 5, 12, 14), fps=30)
    positions = rope3d.grid(frames=5, height=6, width=7, step=(24 / 30, 1, 1))
    ours = rope3d.axial((32, 32, 32), pairing="half").rotation(positions)
    layout, source = "axial((32, 32, 32)) with a step", "diffusers, CosmosRotaryPosEmbed"
    apart(layout, source, (ours.cos, ours.sin), (cos[:, :48], sin[:, :48]), 2e-6)


def test_an_offset_centres_on_whole_positions_as_qwen_image_does(apart) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    embed = module.QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
    for height, width in ((6, 7), (1, 4)):
        table, _ = embed((2, height, width), torch.device("cpu"), max_txt_seq_len=1)
        positions = rope3d.grid(
            frames=2,
            height=height,
            width=width,
            offset=(0, -(height - height // 2), -(width - width // 2)),
        )
        ours = rope3d.axial((16, 56, 56)).rotation(positions)
        layout, source = "axial((16, 56, 56)) with an offset", "diffusers, QwenEmbedRope"
        apart(layout, source, (ours.cos, ours.sin), (table.real, table.imag), 2e-6)


def test_compiles_whole() -> None:
    torch._dynamo.reset()

    def place(cloud):
        grid = rope3d.grid(frames=2, height=3, width=4, step=(0.5, 1, 1), centred=True)
        return grid, rope3d.points(cloud, low=(0, 0, 0), high=2.0, length=8)

    cloud = torch.rand(5, 3)
    ours = torch.compile(place, backend="aot_eager", fullgraph=True)(cloud)
    for left, right in zip(ours, place(cloud), strict=True):
        torch.testing.assert_close(left, right)


def test_scores_do_not_notice_where_a_grid_is_centred() -> None:
    rope, q = rope3d.lumina(24), torch.randn(12, 1, 24, dtype=torch.float64)
    scores = []
    for centred in (False, True):
        turned, _ = rope3d.apply(q, q, rope, rope3d.grid(height=3, width=4, centred=centred))
        scores.append(turned[:, 0] @ turned[:, 0].T)
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


def test_the_middles_of_cells_are_the_grid() -> None:
    low, high, lengths = (-1.0, 0.0, 2.0), (1.0, 0.5, 12.0), (4, 2, 5)
    axes = [
        (torch.arange(n, dtype=torch.float64) + 0.5) / n * (b - a) + a
        for a, b, n in zip(low, high, lengths, strict=True)
    ]
    middles = torch.cartesian_prod(*axes)
    ours = rope3d.points(middles, low=low, high=high, length=lengths)
    expected = rope3d.grid(frames=4, height=2, width=5).double()
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_points_are_moved_by_gradients() -> None:
    cloud = torch.randn(2, 7, 3, requires_grad=True)
    positions = rope3d.points(cloud, low=-1.0, high=3.0, length=(8.0, 16.0, 32.0))
    assert positions.dtype == cloud.dtype
    positions.sum().backward()
    assert torch.equal(cloud.grad, torch.tensor([2.0, 4.0, 8.0]).expand(2, 7, 3))
    assert rope3d.points(cloud.bfloat16(), low=0, high=1, length=9).dtype == torch.bfloat16


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
        (lambda: rope3d.grid(), "at least one of them"),
        (lambda: rope3d.grid(frames=2, offset=(1.0, 2.0)), "offset is .*, or 1, one an axis"),
        (lambda: rope3d.grid(height=2, width=2, step=(1.0,)), "step is .*, or 2, one an axis"),
        (lambda: rope3d.grid(frames=2, step=float("nan")), "one finite number"),
        (lambda: rope3d.points(torch.zeros(5), low=0, high=1, length=4), "points, axes"),
        (lambda: rope3d.points(torch.zeros(5, 3).int(), low=0, high=1, length=4), "floating"),
        (lambda: rope3d.points(torch.zeros(5, 3), low=0, high=0, length=4), "low < high"),
        (lambda: rope3d.points(torch.zeros(5, 3), low=0, high=1, length=0), "positive length"),
        (lambda: rope3d.points(torch.zeros(5, 3), low=(0, 0), high=1, length=4), "low is"),
        (lambda: rope3d.pack([]), "nothing to pack"),
        (lambda: rope3d.pack([torch.zeros(2, 2), torch.zeros(2, 3)]), "the same axes in each"),
        (lambda: rope3d.pack([torch.zeros(2)]), r"expected \[tokens, axes\]"),
    ],
)
def test_errors_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
