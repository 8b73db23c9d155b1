"""A modality and a dataset that exist for these tests, installed as a stranger would."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nextdit_core import Recipe, registry

MODULE = '''
"""Dots on a line, in samples of several lengths."""
import torch
from nextdit_core import Example, Modality, UserError


class Dots(Modality):
    axes = 1
    suffix = ".txt"
    token_dim = 2
    default_size = (6,)

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.options = {"scale": scale}

    def size(self, latent):
        return (len(latent),)

    def positions(self, size):
        if len(size) != 1 or size[0] < 1:
            raise UserError(f"dots size {size} does not work")
        positions = torch.zeros(size[0], 3)
        positions[:, 0] = torch.arange(size[0])
        return positions

    def tokenize(self, latent):
        return latent * self.scale

    def detokenize(self, values, size):
        return values / self.scale

    def write(self, media, path, captions):
        rows = zip(captions, media, strict=True)
        path.write_text("".join(f"{caption}: {dots.tolist()}\\n" for caption, dots in rows))


class Lines:
    def __init__(self, count: int = 20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        rows = torch.linspace(-1, 1, 4 + index % 3)
        up = index % 2 == 0
        return Example(torch.stack([rows, rows if up else -rows], -1), "up" if up else "down")
'''

ENTRY_POINTS = """
[nextdit.modalities]
dots = toy_dots:Dots
[nextdit.datasets]
lines = toy_dots:Lines
"""


@pytest.fixture
def install(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Put a distribution on the path: a module and its metadata."""

    def put(name: str, module: str, entry_points: str, source: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        monkeypatch.syspath_prepend(folder)
        registry.refresh()
        return folder

    yield put
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture
def toy(install: Callable[..., Path]) -> Path:
    """Install the toy modality `dots` and dataset `lines`."""
    return install("toy-dots", "toy_dots", ENTRY_POINTS, MODULE)


@pytest.fixture
def recipe(toy: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Make small recipes for the toy modality."""

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "modality": "dots",
            "dataset": "lines",
            "model": {"width": 16, "layers": 1, "heads": 2},
            "text_encoder_options": {"text_dim": 16, "heads": 2},
            "optimizer": {"lr": 3e-3},
            "sampling": {"nfe": 4},
            "steps": 12,
            "batch_tokens": 24,
            "checkpoint_every": 4,
            "log_every": 2,
            "device": "cpu",
        }
        return Recipe.from_dict(values | changes)

    return make


@pytest.fixture(scope="session")
def golden() -> Path:
    """Find the reference tensors, beside the checkout or where NEXTDIT_GOLDEN says."""
    said = os.environ.get("NEXTDIT_GOLDEN")
    places = [Path(said)] if said else [p / "shared" / "golden" for p in Path(__file__).parents]
    for place in places:
        if (place / "tiny_official.safetensors").is_file():
            return place
    pytest.skip("no reference tensors: set NEXTDIT_GOLDEN to their folder")


@pytest.fixture
def random() -> torch.Generator:
    """Seed the random numbers of a test."""
    return torch.Generator().manual_seed(0)
