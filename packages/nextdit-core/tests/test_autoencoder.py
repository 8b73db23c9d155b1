"""Autoencoders of strangers: found by name, checked by the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextdit_core import Autoencoder, LatentSpec, UserError
from nextdit_core.autoencoder import load_autoencoder
from nextdit_core.testing import check_autoencoder

#: Means of runs of numbers as a latent: what an autoencoder has to bring, and no more.
MODULE = """
import torch
from nextdit_core import LatentSpec


class Means:
    media_channels = 1

    def __init__(self, run: int = 4, scale: float = 2.0):
        self.latent = LatentSpec(1, (run,), (scale,), (0.5,))
        self.options = {"run": run, "scale": scale}

    def encode(self, media):
        (run,) = self.latent.strides
        return self.latent.normalise(media.unflatten(1, (-1, run)).mean(2))

    def decode(self, latent):
        (run,) = self.latent.strides
        return self.latent.denormalise(latent).repeat_interleave(run, 1)

    def to(self, device):
        return self


class Half:
    def encode(self, media):
        return media
"""
ENTRY_POINTS = """
[nextdit.autoencoders]
means = toy_means:Means
half = toy_means:Half
"""


@pytest.fixture
def means(install: Callable[..., Path]) -> Any:
    """A stranger's autoencoder, by its name."""
    install("toy-means", "toy_means", ENTRY_POINTS, MODULE)
    return load_autoencoder("means", {"run": 2})


@pytest.fixture
def media() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.rand(1, size, generator=random) * 2 - 1 for size in (4, 10)]


def test_a_strangers_autoencoder_is_found_and_keeps_its_promises(
    means: Any, media: list[torch.Tensor]
) -> None:
    assert isinstance(means, Autoencoder)
    check_autoencoder(means, media)
    latent = means.encode(torch.tensor([[0.25, 0.75, -1.0, 0.0]]))
    assert latent.tolist() == [[0.0, -2.0]]  # (mean - 0.5) * 2
    assert means.decode(latent).tolist() == [[0.5, 0.5, -0.5, -0.5]]


def test_a_class_that_lacks_something_is_named(means: Any) -> None:
    with pytest.raises(UserError, match=r"'half' lacks latent, media_channels, .* toy_means\.Half"):
        load_autoencoder("half")
    with pytest.raises(UserError, match="'means' has no option 'runs'; accepted: run"):
        load_autoencoder("means", {"runs": 2})


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("encode", lambda one, x: torch.randn(1, x.shape[1] // 2), "gives two latents"),
        ("encode", lambda one, x: x, r"a latent of \[1, 4\]; its spec calls for \[1, 2\]"),
        ("encode", lambda one, x: x[:, ::2].double(), "float64, not float32"),
        ("encode", lambda one, x: x[:, ::2].requires_grad_(), "no gradients"),
        ("decode", lambda one, x: x, "decode gave"),
        ("decode", lambda one, x: x.repeat_interleave(2, 1).double(), "float64, not float32"),
        ("to", lambda one, device: None, "must return the autoencoder itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checks_find_what_is_broken(
    means: Any,
    media: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    broken: Any,
    message: str,
) -> None:
    monkeypatch.setattr(type(means), name, broken)
    with pytest.raises(AssertionError, match=message):
        check_autoencoder(means, media)


def test_options_that_build_another_are_found(means: Any, media: list[torch.Tensor]) -> None:
    means.options = {"run": 2}
    with pytest.raises(AssertionError, match="the autoencoder has others"):
        check_autoencoder(means, media)


def test_channels_have_scales_of_their_own() -> None:
    spec = LatentSpec(2, (8, 8), scale=(2.0, 4.0), shift=(1.0, -1.0))
    z = torch.tensor([3.0, 3.0])[:, None, None].expand(2, 1, 2)
    assert spec.normalise(z)[:, 0, 0].tolist() == [4.0, 16.0]
    assert torch.equal(spec.denormalise(spec.normalise(z)), z)
