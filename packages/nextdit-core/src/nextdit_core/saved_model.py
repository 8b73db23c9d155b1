"""A trained model as a folder that people recognise.

nextdit.json                    format version, parts by entry-point name, sampling defaults
backbone/config.json            sizes
backbone/model.safetensors      weights
text_encoder/model.safetensors  weights, where the text encoder learns with the backbone
README.md                       model card
complete.json                   completeness marker, written last
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextdit_core.backbone import NextDiT
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError
from nextdit_core.flow_model import FlowModel
from nextdit_core.folder import check_complete, read_json, write_json, write_text
from nextdit_core.modality import Modality, load_modality
from nextdit_core.text_encoders import load_text_encoder

__all__ = [
    "FORMAT_VERSION",
    "ModelCard",
    "find_model",
    "load_model",
    "load_parts",
    "load_weights",
    "read_card",
    "save_weights",
    "write_model",
]

FORMAT_VERSION = 1
CARD = "nextdit.json"
CHECKPOINTS = "checkpoints"
PARTS = ("backbone", "text_encoder")


@dataclass(frozen=True)
class ModelCard:
    """What `nextdit.json` says.

    Args:
        modality: Entry-point name.
        modality_options: Keyword arguments that rebuild it.
        text_encoder: Entry-point name.
        text_encoder_options: Keyword arguments that rebuild it.
        sampling: nfe, solver, schedule and guidance used unless a request says otherwise.
        step: Optimiser steps behind the weights.
        example_prompts: Prompts that the model should know.
    """

    modality: str
    modality_options: Mapping[str, Any]
    text_encoder: str
    text_encoder_options: Mapping[str, Any]
    sampling: Mapping[str, Any]
    step: int
    example_prompts: list[str] = field(default_factory=list)


def find_model(path: str | Path) -> Path:
    """Find the model folder that a path stands for.

    Args:
        path: A model folder, or a run folder, whose newest complete checkpoint is taken.

    Returns:
        The model folder, checked to be complete and of this format version.

    Raises:
        UserError: There is none, or it is truncated or of another version.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(
                f"{path} holds no complete checkpoint yet; train it first: nextdit train "
                f"{path / 'recipe.toml'}"
            )
        path = newest
    if path.is_dir() and not (path / CARD).is_file():
        raise UserError(
            f"{path} holds no {CARD}, so it is not a saved nextdit model; give the folder of a "
            f"run or of a model"
        )
    check_complete(path)
    check_format(path)
    return path


def check_format(path: Path) -> None:
    """Refuse a model folder of another format version.

    Raises:
        UserError: The version is not the one that this package reads.
    """
    found = read_json(path / CARD).get("format_version")
    if found != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {found!r}; nextdit-core {version('nextdit-core')} reads "
            f"version {FORMAT_VERSION}; use the nextdit-core that wrote it, or a newer one: "
            f"pip install -U nextdit-core"
        )


def newest_checkpoint(run: Path) -> Path | None:
    """Find the newest complete checkpoint of a run folder; incomplete ones are passed over."""
    for folder in sorted((run / CHECKPOINTS).glob("step_*"), reverse=True):
        try:
            check_complete(folder)
        except UserError:
            continue
        return folder
    return None


def write_model(
    folder: Path, weights: Mapping[str, Tensor], config: NextDiTConfig, card: ModelCard
) -> None:
    """Write the files of a model into an empty folder (see `folder.new_folder`).

    Args:
        folder: The folder.
        weights: State dict of a `FlowModel`.
        config: The backbone's sizes.
        card: What goes into `nextdit.json`.
    """
    for part in PARTS:
        own = {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"{part}.")
        }
        if own:
            (folder / part).mkdir()
            save_weights(folder / part / "model.safetensors", own)
    write_json(folder / "backbone" / "config.json", config.to_dict())
    write_json(
        folder / CARD,
        {
            "format_version": FORMAT_VERSION,
            "modality": {"name": card.modality, "options": dict(card.modality_options)},
            "text_encoder": {
                "name": card.text_encoder,
                "options": dict(card.text_encoder_options),
            },
            "sampling": dict(card.sampling),
            "step": card.step,
            "example_prompts": card.example_prompts,
            "written_by": f"nextdit-core {version('nextdit-core')}",
        },
    )
    prompt = card.example_prompts[0] if card.example_prompts else ""
    write_text(
        folder / "README.md",
        f"---\nlibrary_name: nextdit\ntags: [{card.modality}, next-dit, flow-matching]\n---\n\n"
        f"# A Next-DiT model for {card.modality}\n\n"
        f"{sum(tensor.numel() for tensor in weights.values()):,} parameters, "
        f"{card.step} training steps.\n\n"
        "```python\nfrom nextdit_core import Pipeline\n\n"
        f'media = Pipeline.from_pretrained("path/of/this/folder")({prompt!r}, seed=0)\n```\n\n'
        "Architecture: Lumina-Next, arXiv 2406.18583.\n",
    )


def read_card(folder: Path) -> ModelCard:
    """Read `nextdit.json` of a model folder.

    Raises:
        UserError: It is missing, not JSON, or lacks something.
    """
    values = read_json(folder / CARD)
    try:
        return ModelCard(
            modality=values["modality"]["name"],
            modality_options=values["modality"]["options"],
            text_encoder=values["text_encoder"]["name"],
            text_encoder_options=values["text_encoder"]["options"],
            sampling=values["sampling"],
            step=values["step"],
            example_prompts=values["example_prompts"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD} lacks {error}; it was changed or is damaged") from error


def load_model(
    path: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[FlowModel, Modality, ModelCard]:
    """Load a model folder, or the newest checkpoint of a run folder.

    Args:
        path: See `find_model`.
        device: Where the weights go.
        dtype: What they become.

    Returns:
        The model in evaluation mode, its modality, and the card.

    Raises:
        UserError: The folder is truncated, of another version, needs a part that is not
            installed, or its weights do not fit its sizes.
    """
    folder = find_model(path)
    card = read_card(folder)
    modality = load_modality(card.modality, card.modality_options)
    config = NextDiTConfig.from_dict(read_json(folder / "backbone" / "config.json"))
    with torch.device("meta"):
        model = FlowModel(
            NextDiT(config), load_text_encoder(card.text_encoder, card.text_encoder_options)
        )
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_parts(folder, model, device).items()
    }
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit its sizes: {error}") from error
    if model.text_encoder is not None:  # what it keeps to itself
        model.text_encoder.to(device)
    return model.eval().requires_grad_(False), modality, card


def load_parts(folder: Path, model: FlowModel, device: torch.device) -> dict[str, Tensor]:
    """Read the weights of a model folder, by their names in the model.

    Args:
        folder: The folder.
        model: Tells which parts have weights of their own.
        device: Where they go.

    Returns:
        Weights by name.

    Raises:
        UserError: A file is missing or damaged.
    """
    owners = {name.partition(".")[0] for name in model.state_dict()}
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        if part in owners
        for name, tensor in load_weights(folder / part / "model.safetensors", device).items()
    }


def save_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It cannot be written; safetensors has an error of its own for that.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        save_file(own, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(file)) from error


def load_weights(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read weights {file}: {error}") from error
