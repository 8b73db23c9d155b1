"""Named layouts against closed forms, and against the projects that they come from."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import rope3d

#: name: (layout, channels of each axis, base)
AXIAL = {
    "flux": (rope3d.flux(), (16, 56, 56), 10000.0),
    "wan": (rope3d.wan(), (44, 42, 42), 10000.0),
    "wan-96": (rope3d.wan(96), (32, 32, 32), 10000.0),
    "hunyuan-video": (rope3d.hunyuan_video(), (16, 56, 56), 256.0),
    "cogvideox": (rope3d.cogvideox(), (16, 24, 24), 10000.0),
    "lumina2": (rope3d.lumina2(), (32, 32, 32), 10000.0),
}
GRID = rope3d.grid(frames=5, height=6, width=7)
#: The other projects compute frequencies and angles in float32, some in float64.
FLOAT32, FLOAT64 = 1e-6, 2e-7


class InFloat64(TorchFunctionMode):
    """Let code that asks for float32 compute in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func

        def widen(x):
            return torch.float64 if x is torch.float32 else x

        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **kwargs)


def interleaved(table: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the tables of diffusers, which name each number twice."""
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in table)
    assert torch.equal(cos[:, ::2], cos[:, 1::2])
    return cos[:, ::2], sin[:, ::2]


def tables(rope: rope3d.Rope, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rotation = rope.rotation(positions)
    return rotation.cos, rotation.sin


@pytest.mark.parametrize("name", AXIAL)
def test_each_axis_has_its_own_series(name) -> None:
    rope, dims, base = AXIAL[name]
    q = torch.randn(len(GRID), 2, sum(dims), dtype=torch.float64)
    turned, _ = rope3d.apply(q, q, rope, GRID)
    first = 0
    for axis, dim in enumerate(dims):
        angle = GRID[:, axis, None].double() / base ** (torch.arange(0, dim, 2).double() / dim)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        block = q[..., first : first + dim].unflatten(-1, (-1, 2)).contiguous()
        expected = torch.view_as_real(torch.view_as_complex(block) * turn).flatten(-2)
        torch.testing.assert_close(turned[..., first : first + dim], expected, atol=1e-6, rtol=0)
        first += dim
    assert first == rope.head_dim


def test_mrope_shares_one_series_and_splits_heads_in_half() -> None:
    rope = rope3d.mrope((16, 24, 24))
    positions = torch.randint(0, 500, (9, 3))
    q = torch.randn(9, 2, 128, dtype=torch.float64)
    turned, _ = rope3d.apply(q, q, rope, positions)
    axis = torch.tensor([0] * 16 + [1] * 24 + [2] * 24)
    angle = positions[:, axis].double() * 1e6 ** (-torch.arange(64).double() / 64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.complex(q[..., :64], q[..., 64:]) * turn
    expected = torch.cat((expected.real, expected.imag), -1)
    torch.testing.assert_close(turned, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_partial_rotary_leaves_the_rest(pairing) -> None:
    part = rope3d.axial((8,), pairing=pairing)
    rope = part.partial(12).partial(20)
    assert rope.head_dim == 20
    assert rope == part.partial(20)
    for method in ("ntk", "time-aware"):
        before = rope.extrapolate(method, scale=2.0)
        assert before == part.extrapolate(method, scale=2.0).partial(20)
        assert before.head_dim == 20
    q, k = torch.randn(5, 3, 20), torch.randn(5, 1, 20)
    positions = torch.randn(5, 1)
    turned = rope3d.apply(q, k, rope, positions)
    alone = rope3d.apply(q[..., :8].clone(), k[..., :8].clone(), part, positions)
    for ours, expected, x in zip(turned, alone, (q, k), strict=True):
        torch.testing.assert_close(ours[..., :8], expected, atol=1e-6, rtol=0)
        assert torch.equal(ours[..., 8:], x[..., 8:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_half_split_is_interleaved_in_another_order(dtype) -> None:
    order = torch.arange(24).view(2, 12).T.flatten()  # channels m and m + 12 become neighbours
    q, positions = torch.randn(5, 3, 24).to(dtype), torch.randn(5, 2)
    half = rope3d.axial((12, 12), pairing="half")
    ours, _ = rope3d.apply(q, q, half, positions)
    expected, _ = rope3d.apply(q[..., order], q[..., order], rope3d.axial((12, 12)), positions)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours[..., order], expected, atol=1e-6, rtol=2**-7)


def test_flux_equals_diffusers(apart) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    embed = module.FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])
    ours, theirs = tables(rope3d.flux(), GRID), interleaved(embed(GRID))
    apart("flux()", "diffusers, FluxPosEmbed", ours, theirs, FLOAT64)


def test_wan_equals_diffusers(apart) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    embed = module.WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    theirs = interleaved(embed(torch.zeros(1, 4, 5, 12, 14)))
    apart("wan()", "diffusers, WanRotaryPosEmbed", tables(rope3d.wan(), GRID), theirs, FLOAT64)


def test_hunyuan_video_equals_diffusers(apart) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    embed = module.HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)
    theirs = interleaved(embed(torch.zeros(1, 4, 5, 12, 14)))
    ours = tables(rope3d.hunyuan_video(), GRID)
    apart("hunyuan_video()", "diffusers, HunyuanVideoRotaryPosEmbed", ours, theirs, FLOAT32)


def test_cogvideox_equals_diffusers(apart) -> None:
    module = pytest.importorskip("diffusers.models.embeddings")
    table = module.get_3d_rotary_pos_embed(64, ((0, 0), (6, 7)), (6, 7), 5, device="cpu")
    ours = tables(rope3d.cogvideox(), GRID)
    apart("cogvideox()", "diffusers, get_3d_rotary_pos_embed", ours, interleaved(table), FLOAT32)


def test_lumina2_equals_diffusers(apart) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_lumina2")
    embed = module.Lumina2RotaryPosEmbed(10000, [32, 32, 32], [300, 512, 512])
    mask = torch.ones(1, 9, dtype=torch.bool)
    table = embed(torch.zeros(1, 16, 12, 14), mask)[3][0]  # 9 text tokens, then 6 x 7 of the image
    text = torch.stack((torch.arange(9.0), torch.zeros(9), torch.zeros(9)), -1)
    image = rope3d.grid(frames=1, height=6, width=7) + torch.tensor([9.0, 0.0, 0.0])
    ours = tables(rope3d.lumina2(), torch.cat((text, image)))
    source = "diffusers, Lumina2RotaryPosEmbed"
    apart("lumina2()", source, ours, (table.real.float(), table.imag.float()), FLOAT64)


def test_lumina_equals_diffusers(apart) -> None:
    module = pytest.importorskip("diffusers.models.embeddings")
    for method, factors in (
        ("extrapolation", {}),
        ("interpolation", {"linear_factor": 1.5}),
        ("ntk", {"ntk_factor": 1.5}),
    ):
        table = module.get_2d_rotary_pos_embed_lumina(72, 12, 14, **factors).reshape(-1, 36)
        rope = rope3d.lumina(72).extrapolate(method, scale=1.5)
        ours = tables(rope, rope3d.grid(height=12, width=14))
        source = "diffusers, get_2d_rotary_pos_embed_lumina"
        apart(f"lumina(72), {method}", source, ours, (table.real, table.imag), FLOAT32)


@pytest.fixture
def qwen2_vl():
    """The rotary embedding of Qwen2-VL as a function of float32 or float64 q, k and positions."""
    module = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = module.Qwen2VLTextConfig(
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [16, 24, 24],
        },
    )

    def turn(q, k, positions):
        cos, sin = module.Qwen2VLRotaryEmbedding(config)(q, positions.T[:, None])
        return (cos[0, :, :64], sin[0, :, :64]), module.apply_rotary_pos_emb(q, k, cos, sin)

    return turn


MROPE = rope3d.mrope((16, 24, 24))


def test_mrope_equals_transformers(qwen2_vl, apart) -> None:
    # As far as their float32 angles are exact enough: at position 21 they are 1.5e-6 off.
    positions = torch.cartesian_prod(*[torch.arange(17)] * 3)
    table, _ = qwen2_vl(*(torch.zeros(1, 1, len(positions), 128),) * 2, positions)
    source = "transformers, Qwen2VLRotaryEmbedding in its float32, positions up to 16"
    apart("mrope((16, 24, 24))", source, tables(MROPE, positions), table, 1e-6)

    generator = torch.Generator().manual_seed(0)
    positions = rope3d.grid(frames=4, height=8, width=8).long()
    q, k = (torch.rand(1, heads, 256, 128, generator=generator) * 2 - 1 for heads in (2, 1))
    _, theirs = qwen2_vl(q, k, positions)
    source = "transformers, Qwen2VLRotaryEmbedding in its float32, grid of 4 x 8 x 8"
    ours = rope3d.apply(q.transpose(1, 2), k.transpose(1, 2), MROPE, positions)
    ours = [x.transpose(1, 2) for x in ours]
    apart("mrope((16, 24, 24)), q and k below 1", source, ours, theirs, 1e-6)


def test_mrope_equals_transformers_up_to_the_rounding_of_their_angles(qwen2_vl, apart) -> None:
    # A float32 angle below 200 is up to 2^-17 = 7.6e-6 off, and as much again for the frequency.
    q, k = torch.randn(1, 2, 9, 128), torch.randn(1, 1, 9, 128)
    positions = torch.randint(0, 200, (9, 3), generator=torch.Generator().manual_seed(0))
    table, theirs = qwen2_vl(q, k, positions)
    source = "transformers, Qwen2VLRotaryEmbedding in its float32, positions below 200"
    apart("mrope((16, 24, 24))", source, tables(MROPE, positions), table, 2e-5)
    ours = rope3d.apply(q.transpose(1, 2), k.transpose(1, 2), MROPE, positions)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.transpose(1, 2), right, atol=1e-4, rtol=0)


@pytest.mark.parametrize("top", [200, 100_000])
def test_mrope_equals_transformers_in_float64(qwen2_vl, apart, top) -> None:
    q, k = torch.randn(1, 2, 9, 128).double(), torch.randn(1, 1, 9, 128).double()
    positions = torch.randint(0, top, (9, 3), generator=torch.Generator().manual_seed(0))
    with InFloat64():
        table, theirs = qwen2_vl(q, k, positions)
    assert table[0].dtype == torch.float64
    source = f"transformers, Qwen2VLRotaryEmbedding in float64, positions below {top}"
    apart("mrope((16, 24, 24))", source, tables(MROPE, positions), table, 1e-6)
    ours = rope3d.apply(q.transpose(1, 2), k.transpose(1, 2), MROPE, positions)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.transpose(1, 2), right, atol=1e-6, rtol=0)


def test_partial_rotary_equals_transformers(apart) -> None:
    module = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    q, k = torch.randn(2, 1, 2, 9, 80, generator=torch.Generator().manual_seed(0))
    rope = rope3d.axial((32,), pairing="half").partial(80)
    angle = torch.arange(9.0)[:, None] * 10000 ** (-torch.arange(0, 32, 2) / 32)
    angle = torch.cat((angle, angle), -1)[None]
    theirs = module.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    ours = rope3d.apply(q.transpose(1, 2), k.transpose(1, 2), rope, torch.arange(9)[:, None])
    ours = [x.transpose(1, 2) for x in ours]
    source = "transformers, apply_rotary_pos_emb of GPT-NeoX"
    apart('axial((32,), pairing="half").partial(80), q and k', source, ours, theirs, FLOAT32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rope3d.wan(7), "dims are"),
        (lambda: rope3d.wan(4), "dims are"),
        (lambda: rope3d.cogvideox(72), "multiple of 16"),
        (lambda: rope3d.mrope(()), "sections are"),
        (lambda: rope3d.mrope((16, 0)), "sections are"),
        (lambda: rope3d.flux().partial(64), "at least the 128"),
        (lambda: rope3d.axial((8,), pairing="halves"), "pairing is 'halves'"),
    ],
)
def test_errors_say_what_was_expected(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
