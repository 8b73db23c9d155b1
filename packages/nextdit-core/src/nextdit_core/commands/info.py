"""`nextdit info`: versions and devices here, or what a saved model is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from nextdit_core.errors import UserError

__all__ = ["info"]

DISTRIBUTIONS = (
    "nextdit-core",
    "rope3d",
    "flowsolvers",
    "nextdit-kernels",
    "modality-image",
    "nextdit-ray",
    "torch",
    "triton",
    "ray",
)


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--heads", type=click.IntRange(1), help="Query heads, where no tensor tells them.")
@click.option(
    "--experts-by",
    type=click.Choice(["time", "space"]),
    help="By what experts are chosen, where no tensor tells it.",
)
def info(path: Path | None, heads: int | None, experts_by: Literal["time", "space"] | None) -> None:
    """Describe this installation or, given PATH, a saved model, a run, a pipeline or a backbone.

    A backbone may be ours, the authors' or diffusers'; a pipeline is diffusers' of Lumina-Next.
    """
    rows = _installation() if path is None else _model(path, heads, experts_by)
    for name, value in rows:
        click.echo(f"{name:<18}{value}")


def _installation() -> list[tuple[str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from nextdit_core import block_operations

    rows = [("python", platform.python_version())]
    for name in DISTRIBUTIONS:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    count = torch.cuda.device_count()
    rows += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(count)]
    if not count:
        rows.append(("cuda", "no device"))
    rows.append(("mps", "available" if torch.backends.mps.is_available() else "no device"))
    rows.append(("cpu threads", str(torch.get_num_threads())))
    device, dtype = ("cuda", torch.bfloat16) if count else ("cpu", torch.float32)
    return rows + list(block_operations.explain(device, dtype).items())


def _model(
    path: Path, heads: int | None, experts_by: Literal["time", "space"] | None
) -> list[tuple[str, str]]:
    from nextdit_core.lumina_pipeline import INDEX
    from nextdit_core.model_folder import is_saved_model

    if is_saved_model(path):
        return _saved_model(path)
    if (path / INDEX).is_file():
        return _pipeline(path, heads, experts_by)
    return _backbone(path, heads, experts_by)


def _pipeline(
    path: Path, heads: int | None, experts_by: Literal["time", "space"] | None
) -> list[tuple[str, str]]:
    """Describe a pipeline of Lumina-Next; weights are not read."""
    from nextdit_core.lumina_pipeline import open_lumina
    from nextdit_core.saved_model import build_parts

    rows = _backbone(path, heads, experts_by)
    try:
        found = open_lumina(path)
        modality, encoder = build_parts(found.card)
    except UserError as error:  # the backbone is worth describing all the same
        return [*rows, ("no pipeline", str(error))]
    card = found.card
    sampling = ", ".join(f"{key} {value}" for key, value in card.sampling.items())
    return [
        *rows,
        ("modality", f"{card.modality} {dict(card.modality_options)}"),
        ("default size", "x".join(map(str, modality.default_size))),
        ("latents", _latents(card.modality_options)),
        ("text encoder", f"{card.text_encoder} {dict(card.text_encoder_options)}"),
        ("text features", f"{getattr(encoder, 'text_dim', '?')} wide"),
        ("scheduler", str(found.scheduler)),
        ("sampling", sampling),
    ]


def _latents(options: Mapping[str, Any]) -> str:
    """Describe what the autoencoder of a modality makes."""
    from nextdit_core.autoencoder import load_autoencoder

    found = load_autoencoder(options["autoencoder"], options["autoencoder_options"])
    latent = found.latent
    numbers = [", ".join(f"{one:g}" for one in row) for row in (latent.scale, latent.shift)]
    return (
        f"{found.media_channels} channels to {latent.channels}, a cell for "
        f"{'x'.join(map(str, latent.strides))}, scale {numbers[0]}, shift {numbers[1]}"
    )


def _backbone(
    path: Path, heads: int | None, experts_by: Literal["time", "space"] | None
) -> list[tuple[str, str]]:
    """Describe a backbone of any layout; its weights are not read."""
    from nextdit_core.checkpoints.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, heads=heads, experts_by=experts_by)
    stored = checkpoint.weights.stored.values()
    count = sum(one.bytes for one in stored)
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in stored})
    parameters = sum(one.numbers for one in stored)
    rows = [
        ("checkpoint", str(checkpoint.place)),
        ("layout", checkpoint.layout.value),
        (
            "stored",
            f"{parameters:,} parameters in {len(stored)} tensors, {', '.join(dtypes)}, "
            f"{count / 2**20:,.0f} MiB",
        ),
        ("backbone", str(checkpoint.config)),
    ]
    rows += [("left out", line) for line in checkpoint.left_out]
    args = ", ".join(f"{name}={value!r}" for name, value in checkpoint.model_args.items())
    return [*rows, ("model_args", args)] if args else rows


def _saved_model(path: Path) -> list[tuple[str, str]]:
    import torch

    from nextdit_core.model_folder import find_model
    from nextdit_core.saved_model import load_model

    folder = find_model(path)
    model, modality, card = load_model(folder, torch.device("cpu"), torch.float32)
    count = sum(parameter.numel() for parameter in model.backbone.parameters())
    encoder = sum(parameter.numel() for parameter in model.parameters()) - count
    learnt = f"{encoder:,} parameters" if encoder else "frozen, its weights are not in the folder"
    sampling = ", ".join(f"{key} {value}" for key, value in card.sampling.items())
    rows = [
        ("folder", str(folder)),
        ("modality", f"{card.modality} {dict(card.modality_options)}"),
        ("default size", "x".join(map(str, modality.default_size))),
        ("backbone", f"{count:,} parameters, {model.backbone.config}"),
        ("text encoder", f"{card.text_encoder} {dict(card.text_encoder_options)}, {learnt}"),
        ("training steps", "unknown" if card.step is None else str(card.step)),
        ("predicts", str(card.objective)),
        ("sampling", sampling),
    ]
    return rows + [("prompt", prompt) for prompt in card.example_prompts[:10]]
