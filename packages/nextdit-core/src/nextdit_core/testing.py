"""Checks that any modality or autoencoder has to pass, on a few media of its author's.

They are plain functions that raise `AssertionError`, so they work under every test runner.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextdit_core.autoencoder import REQUIRED as OF_AUTOENCODER
from nextdit_core.autoencoder import Autoencoder
from nextdit_core.backbone import NextDiT
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError
from nextdit_core.modality import REQUIRED, Modality, Size
from nextdit_core.tokens import Tokens

__all__ = ["check_autoencoder", "check_modality"]


def check_modality(
    modality: Modality, media: Sequence[Any], *, wrong_size: Size = (0,), atol: float = 1e-6
) -> None:
    """Check that a modality keeps the promises of `nextdit_core.Modality`.

    Args:
        modality: What is checked.
        media: At least two examples, of different sizes where the modality allows it.
        wrong_size: A size that the modality must refuse.
        atol: Largest difference of a latent after `tokenize` and `detokenize`.

    Raises:
        AssertionError: A promise is broken; the message says which.

    Convention: `decode(encode(medium))` is not compared with the medium, because an
    autoencoder may lose something; it is written to a file instead.
    """
    _check_attributes(modality)
    latents = [modality.encode(medium) for medium in media]
    for latent in latents:
        _check_round_trip(modality, latent, atol)
    _check_default_size(modality)
    _check_refusal(modality, wrong_size)
    _check_packed(modality, latents)
    _check_files(modality, [modality.decode(latent) for latent in latents])


def check_autoencoder(autoencoder: Autoencoder, media: Sequence[torch.Tensor]) -> None:
    """Check that an autoencoder keeps the promises of `nextdit_core.Autoencoder`.

    Args:
        autoencoder: What is checked.
        media: At least two, `[media_channels, ...]` in [-1, 1], of different sizes where it
            allows them.

    Raises:
        AssertionError: A promise is broken; the message says which.

    Convention: What comes back is not compared with the medium, as something may be lost, nor the
        scale of latents with 1, as the examples may be no pictures of the kind it was trained on.
    """
    lacking = [name for name in OF_AUTOENCODER if not hasattr(autoencoder, name)]
    _check(not lacking, f"the autoencoder lacks {', '.join(lacking)}")
    _check_options(autoencoder, "autoencoder")
    spec = autoencoder.latent
    moved = autoencoder.to(torch.device("cpu"))
    _check(moved is autoencoder, "to(device) must return the autoencoder itself")
    for medium in media:
        cells = [
            extent // stride for extent, stride in zip(medium.shape[1:], spec.strides, strict=True)
        ]
        latent = autoencoder.encode(medium)
        _check(
            list(latent.shape) == [spec.channels, *cells],
            f"a medium of {list(medium.shape)} has a latent of {list(latent.shape)}; its spec "
            f"calls for {[spec.channels, *cells]}",
        )
        _check(latent.dtype == torch.float32, f"latents have dtype {latent.dtype}, not float32")
        _check(
            torch.equal(latent, autoencoder.encode(medium)),
            "encoding the same medium twice gives two latents; encode to the mean, do not draw",
        )
        back = autoencoder.decode(latent)
        _check(back.shape == medium.shape, f"decode gave {back.shape}; expected {medium.shape}")
        _check(back.dtype == torch.float32, f"decoded media have dtype {back.dtype}, not float32")
        _check(not (latent.requires_grad or back.requires_grad), "it is frozen: no gradients")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _check_attributes(modality: Modality) -> None:
    lacking = [name for name in REQUIRED if not hasattr(modality, name)]
    _check(not lacking, f"the modality lacks {', '.join(lacking)}")
    _check(modality.axes in (1, 2, 3), f"axes is {modality.axes}; expected 1, 2 or 3")
    _check(modality.suffix.startswith("."), f"suffix is {modality.suffix!r}; expected '.xyz'")
    _check_options(modality, "modality")
    _check(
        modality.token_dim % modality.latent_channels == 0,
        f"token_dim {modality.token_dim} is no multiple of latent_channels "
        f"{modality.latent_channels}",
    )


def _check_options(part: Modality | Autoencoder, kind: str) -> None:
    options = json.loads(json.dumps(dict(part.options)))
    again = type(part)(**options)
    _check(
        dict(again.options) == dict(part.options),
        f"built from its options {options} the {kind} has others: {dict(again.options)}",
    )


def _check_round_trip(modality: Modality, latent: torch.Tensor, atol: float) -> None:
    size = tuple(modality.size(latent))
    values, positions = modality.tokenize(latent), modality.positions(size)
    _check(values.is_floating_point(), f"tokens have dtype {values.dtype}; expected a float one")
    _check(
        values.shape == (len(positions), modality.token_dim),
        f"tokens have shape {tuple(values.shape)}; positions and token_dim call for "
        f"{(len(positions), modality.token_dim)}",
    )
    _check(
        positions.shape == (len(positions), 3),
        f"positions have shape {tuple(positions.shape)}; expected [tokens, 3]",
    )
    back = modality.detokenize(values, size)
    _check(back.shape == latent.shape, f"detokenize gave {back.shape}; expected {latent.shape}")
    worst = float((back - latent).abs().max())
    _check(worst <= atol, f"detokenize(tokenize(latent)) differs by {worst}; allowed {atol}")


def _check_default_size(modality: Modality) -> None:
    size = tuple(modality.default_size)
    tokens = len(modality.positions(size))
    latent = modality.detokenize(torch.zeros(tokens, modality.token_dim), size)
    found = tuple(modality.size(latent))
    _check(found == size, f"a latent of default_size {size} says that its size is {found}")


def _check_refusal(modality: Modality, wrong_size: Size) -> None:
    try:
        modality.positions(wrong_size)
    except UserError:
        return
    raise AssertionError(f"positions({wrong_size}) raised no UserError")


def _check_packed(modality: Modality, latents: Sequence[torch.Tensor]) -> None:
    """A backbone gives each sample the same velocity in a packed batch as alone."""
    width = {1: 16, 2: 16, 3: 24}[modality.axes]
    config = NextDiTConfig(
        token_dim=modality.token_dim, axes=modality.axes, width=width, layers=1, heads=2
    )
    backbone = NextDiT(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    samples = []
    for latent in latents:
        values = modality.tokenize(latent).float()
        positions = modality.positions(tuple(modality.size(latent)))
        samples.append(Tokens(values, positions, (len(values),)))
    times = torch.linspace(0.1, 0.9, len(samples))
    with torch.no_grad():
        packed = backbone(Tokens.pack(samples), times)
        alone = torch.cat([backbone(one, t[None]) for one, t in zip(samples, times, strict=True)])
    worst = float((packed - alone).abs().max())
    _check(worst <= 1e-4, f"packed with others a sample's velocity differs by {worst} from alone")


def _check_files(modality: Modality, media: Sequence[Any]) -> None:
    with TemporaryDirectory() as folder:
        for count in (1, len(media)):
            path = Path(folder) / f"{count}{modality.suffix}"
            modality.write(media[:count], path, ["a caption"] * count)
            _check(
                path.is_file() and path.stat().st_size > 0,
                f"write left no file for {count} media",
            )
