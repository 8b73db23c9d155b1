"""Everything that is installed keeps the promises of its protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from modality_image import Digits, Image, ImageFolder
from nextdit_core import Dataset, Example, Modality, registry
from nextdit_core.modality import load_modality
from nextdit_core.testing import check_modality
from nextdit_core.text_encoders import TextEncoder, load_text_encoder


@pytest.mark.parametrize("name", list(registry.parts("nextdit.modalities")))
def test_every_modality_passes_the_conformance_checks(name: str) -> None:
    modality = load_modality(name)
    assert isinstance(modality, Modality)
    size = modality.default_size
    values = torch.rand(len(modality.positions(size)), modality.token_dim) * 2 - 1
    medium = modality.decode(modality.detokenize(values, size))
    check_modality(modality, [medium, medium], atol=1e-6)


@pytest.mark.parametrize("name", list(registry.parts("nextdit.text_encoders")))
def test_every_text_encoder_reads_any_prompt(name: str, letters: Path) -> None:
    options = {"model": str(letters)} if name == "transformers" else {}
    encoder = load_text_encoder(name, options)
    assert isinstance(encoder, TextEncoder)
    condition = encoder(["a red fox", "", "孤舟蓑笠翁 🎣"])
    assert condition.text.shape[-1] == encoder.text_dim
    assert torch.isfinite(condition.text).all()
    assert (condition.lengths >= 1).all()


@pytest.mark.parametrize("group", list(registry.GROUPS))
def test_every_part_loads(group: str) -> None:
    for name in registry.parts(group):
        registry.load(group, name)


def test_images_of_different_sizes_and_colours(tmp_path) -> None:
    grey = [Pillow.new("L", (8, 12), 200), Pillow.new("L", (4, 4), 0)]
    check_modality(Image(channels=1, patch_size=4, height=8, width=8), grey, wrong_size=(6, 8))
    colours = [Pillow.new("RGB", (6, 4), "red"), Pillow.new("RGB", (2, 2), "blue")]
    check_modality(Image(patch_size=2), colours, wrong_size=(5, 4))
    red = Image(patch_size=2).decode(Image(patch_size=2).encode(colours[0]))
    assert red.getpixel((5, 3)) == (255, 0, 0)


def test_digits_are_the_ones_that_scikit_learn_ships() -> None:
    from sklearn.datasets import load_digits

    dataset = Digits("all", size=8)
    assert isinstance(dataset, Dataset)
    real = load_digits()
    assert len(dataset) == 1797
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in dataset.pictures[:20]])).flatten(1)
    assert torch.equal(pixels, (torch.tensor(real.images[:20]).flatten(1) * 255 / 16).round().int())
    example = dataset[3]
    assert isinstance(example, Example)
    assert example.caption == "a handwritten three"


def test_digits_are_split_without_overlap() -> None:
    train, test = Digits("train"), Digits("test")
    assert len(train) + len(test) == 1797
    seen = {picture.tobytes() for picture in train.pictures}
    assert sum(picture.tobytes() in seen for picture in test.pictures) == 0


def test_a_folder_of_pictures_has_captions(tmp_path) -> None:
    Pillow.new("RGB", (40, 20), "red").save(tmp_path / "fox.png")
    (tmp_path / "fox.txt").write_text("a red fox\n")
    (tmp_path / "deep").mkdir()
    Pillow.new("L", (9, 9), 7).save(tmp_path / "deep" / "owl.jpg")
    dataset = ImageFolder(str(tmp_path), height=8, width=16)
    examples = [dataset[index] for index in range(len(dataset))]
    assert [example.caption for example in examples] == ["", "a red fox"]
    assert all(example.media.size == (16, 8) for example in examples)
    assert examples[1].media.getpixel((8, 4)) == (255, 0, 0)
