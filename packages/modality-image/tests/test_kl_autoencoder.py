"""Latents of diffusers' autoencoders, against diffusers itself and its documented formulas."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from modality_image import Image, KLAutoencoder
from nextdit_core import Autoencoder, LatentSpec, UserError, registry
from nextdit_core.autoencoder import load_autoencoder
from nextdit_core.testing import check_autoencoder, check_modality

diffusers = pytest.importorskip("diffusers")

SCALES: dict[str, dict[str, Any]] = {
    "sdxl": {"scaling_factor": 0.13025},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "by channel": {
        "scaling_factor": 0.5,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [2.0, 0.5, 1.0, 4.0],
    },
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Write a small random autoencoder of diffusers; give it and its folder."""

    def make(**changes: Any) -> tuple[Any, Path]:
        sizes: dict[str, Any] = {
            "block_out_channels": (8, 8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = diffusers.AutoencoderKL(**sizes | changes).eval()
        folder = tmp_path / "vae"
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("scale", SCALES)
def test_latents_are_those_that_diffusers_trains_on(
    saved: Any, random: torch.Generator, scale: str
) -> None:
    """(z - shift) * scaling_factor, or (z - mean) * scaling_factor / std, as its pipelines do."""
    model, folder = saved(**SCALES[scale])
    ours = KLAutoencoder(str(folder))
    pixels = torch.rand(3, 16, 24, generator=random) * 2 - 1
    config = model.config
    with torch.no_grad():
        z = model.encode(pixels[None]).latent_dist.mean
        if config.latents_mean is not None:
            mean, std = (
                torch.tensor(row).view(1, 4, 1, 1)
                for row in (config.latents_mean, config.latents_std)
            )
            expected = (z - mean) * config.scaling_factor / std
        else:
            expected = (z - (config.shift_factor or 0.0)) * config.scaling_factor
        decoded = model.decode(z).sample[0]
    latent = ours.encode(pixels)
    assert (latent - expected[0]).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
    assert (ours.decode(latent) - decoded).abs().max() <= 1e-5


def test_it_keeps_the_promises_of_an_autoencoder(saved: Any, random: torch.Generator) -> None:
    _, folder = saved()
    ours = load_autoencoder("kl-image", {"model": str(folder)})
    assert isinstance(ours, Autoencoder)
    assert ours.latent == LatentSpec(4, (4, 4), (0.18215,), (0.0,))
    media = [torch.rand(3, *size, generator=random) * 2 - 1 for size in ((8, 8), (16, 4))]
    check_autoencoder(ours, media)


def test_images_in_its_latent_space_keep_the_promises_of_a_modality(
    saved: Any, tmp_path: Path
) -> None:
    model, folder = saved()
    noise = np.random.default_rng(0)
    pictures = [
        Pillow.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((16, 24), (8, 8))
    ]
    image = Image(height=16, width=16, **_latent_space(folder))
    assert (image.token_dim, image.latent_channels, image.default_size) == (16, 4, (16, 16))
    check_modality(image, pictures, wrong_size=(12, 16))
    latent = image.encode(pictures[0])
    assert latent.shape == (4, 4, 6)
    assert image.size(latent) == (16, 24)
    pixels = torch.from_numpy(np.asarray(pictures[0], dtype=np.float32) / 127.5 - 1.0)
    with torch.no_grad():
        z = model.encode(pixels.permute(2, 0, 1)[None]).latent_dist.mean
        expected = model.decode(z).sample[0].clamp(-1.0, 1.0)
    assert (image.decode_tensor(latent) - expected).abs().max() <= 1e-5
    levels = np.asarray(image.decode(latent), dtype=np.float32)
    assert np.abs(levels - (expected.permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.51


def _latent_space(folder: Path) -> dict[str, Any]:
    return {"autoencoder": "kl-image", "autoencoder_options": {"model": str(folder)}}


def test_its_options_find_it_again_from_elsewhere(
    saved: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = saved()
    monkeypatch.chdir(folder.parent)
    image = Image(height=16, width=16, **_latent_space(Path("vae")))
    monkeypatch.chdir("/")
    again = Image(**json.loads(json.dumps(image.options)))
    assert again.options == image.options
    latent = torch.randn(4, 2, 2)
    assert torch.equal(again.decode_tensor(latent), image.decode_tensor(latent))


def test_weights_are_read_when_they_are_needed(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved()
    reads: list[object] = []
    read = diffusers.AutoencoderKL.from_pretrained
    monkeypatch.setattr(
        diffusers.AutoencoderKL,
        "from_pretrained",
        lambda *args, **options: (reads.append(args), read(*args, **options))[1],
    )
    ours = KLAutoencoder(str(folder))
    assert not reads
    ours.decode(torch.zeros(4, 1, 1))
    ours.to(torch.device("cpu")).encode(torch.zeros(3, 4, 4))
    assert len(reads) == 1


def test_half_precision_is_near(saved: Any, random: torch.Generator) -> None:
    _, folder = saved()
    latent = torch.randn(4, 2, 3, generator=random)
    half, full = (KLAutoencoder(str(folder), dtype=dtype) for dtype in ("bfloat16", "float32"))
    found, exact = half.decode(latent), full.decode(latent)
    assert found.dtype == torch.float32
    assert 0.0 < (found - exact).abs().max() < 0.1
    assert half.options["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 1}, "takes 3 channels and image channels is 1"),
        ({"height": 12}, r"both multiples of 8 \(the patch size of 4 pixels a cell\)"),
        ({"autoencoder": "kl-imag"}, "unknown autoencoder 'kl-imag'; accepted: kl-image"),
        ({"autoencoder": None}, "autoencoder_options are given and no autoencoder"),
        ({"autoencoder_options": {"modell": "x"}}, "no option 'modell'; accepted: model"),
        ({"autoencoder_options": {"model": "nowhere"}}, "there is no folder nowhere"),
    ],
    ids=str,
)
def test_images_that_cannot_work_are_refused(
    saved: Any, options: dict[str, Any], message: str
) -> None:
    _, folder = saved()
    with pytest.raises(UserError, match=message):
        Image(**{"height": 16, "width": 16, **_latent_space(folder)} | options)


def test_folders_that_hold_no_such_autoencoder_are_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved()
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cannot read the autoencoder in"):
        KLAutoencoder(str(folder)).to(torch.device("cpu"))
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no weights; .*pickled \.bin files are not read"):
        KLAutoencoder(str(folder))
    (folder / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(UserError, match="is a AutoencoderTiny; expected diffusers' AutoencoderKL"):
        KLAutoencoder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        KLAutoencoder(str(folder))
    with pytest.raises(UserError, match="'float64'; accepted: float32"):
        KLAutoencoder(str(folder), dtype="float64")  # type: ignore[arg-type]


def test_a_tensor_that_is_missing_is_no_random_one(saved: Any) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = saved()
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"decoder\.conv_out\.weight"):
        KLAutoencoder(str(folder)).to(torch.device("cpu"))


def test_sizes_and_overflow_are_named(saved: Any) -> None:
    model, folder = saved()
    ours = KLAutoencoder(str(folder))
    with pytest.raises(UserError, match=r"16x18 cannot be encoded; .* multiples of 4"):
        ours.encode(torch.zeros(3, 16, 18))
    model.decoder.conv_out.bias.data.fill_(float("inf"))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"in torch\.float16; decode with dtype='float32'"):
        KLAutoencoder(str(folder), dtype="float16").decode(torch.zeros(4, 2, 2))


def test_without_diffusers_it_says_what_to_install(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved()
    ours = KLAutoencoder(str(folder))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'pip install "modality-image\[vae\]"'):
        ours.decode(torch.zeros(4, 2, 2))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", lambda group: {})
    with pytest.raises(UserError, match=r"pip install modality-image\[vae\]"):
        load_autoencoder("kl-image")


@pytest.mark.parametrize(
    "numbers",
    [
        {"scale": (0.0,)},
        {"scale": (1.0, 1.0)},
        {"shift": (float("nan"),)},
        {"channels": 0},
        {"strides": ()},
    ],
    ids=str,
)
def test_a_latent_that_means_nothing_is_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="latent"):
        LatentSpec(**{"channels": 4, "strides": (8, 8), **numbers})
