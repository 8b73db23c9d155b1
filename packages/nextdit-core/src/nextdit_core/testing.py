"""Checks that any modality has to pass; its author runs them on a few media of theirs.

They are plain functions that raise `AssertionError`, so they work under every test runner.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextdit_core.backbone import NextDiT
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError
from nextdit_core.modality import REQUIRED, Modality, Size
from nextdit_core.tokens import Tokens

__all__ = ["check_modality"]


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


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _check_attributes(modality: Modality) -> None:
    lacking = [name for name in REQUIRED if not hasattr(modality, name)]
    _check(not lacking, f"the modality lacks {', '.join(lacking)}")
    _check(modality.axes in (1, 2, 3), f"axes is {modality.axes}; expected 1, 2 or 3")
    _check(modality.suffix.startswith("."), f"suffix is {modality.suffix!r}; expected '.xyz'")
    options = json.loads(json.dumps(dict(modality.options)))
    again = type(modality)(**options)
    _check(
        dict(again.options) == dict(modality.options),
        f"built from its options {options} the modality has others: {dict(again.options)}",
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
