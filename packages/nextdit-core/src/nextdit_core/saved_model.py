"""A trained model as a folder that people recognise.

nextdit.json                    format version, parts by entry-point name, objective, sampling
                                defaults
backbone/config.json            sizes
backbone/model.safetensors      weights
text_encoder/model.safetensors  weights, where the text encoder learns with the backbone
README.md                       model card
complete.json                   completeness marker, written last
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nextdit_core.checkpoints.checkpoint import open_checkpoint
from nextdit_core.checkpoints.load import read_backbone
from nextdit_core.checkpoints.save import write_backbone
from nextdit_core.checkpoints.shards import load_part, save_weights
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError
from nextdit_core.flow_model import FlowModel
from nextdit_core.folder import read_object, write_json, write_text
from nextdit_core.modality import Modality, load_modality
from nextdit_core.model_folder import CARD, FORMAT_VERSION, find_model
from nextdit_core.objective import FlowMatching
from nextdit_core.text_encoders import load_text_encoder

Kind = TypeVar("Kind")

#: The folders with weights.
PARTS = ("backbone", "text_encoder")

__all__ = [
    "ModelCard",
    "build_parts",
    "check_parts",
    "load_model",
    "load_parts",
    "read_card",
    "write_model",
]


@dataclass(frozen=True)
class ModelCard:
    """What `nextdit.json` says.

    Args:
        modality: Entry-point name.
        modality_options: Keyword arguments that rebuild it.
        text_encoder: Entry-point name.
        text_encoder_options: Keyword arguments that rebuild it.
        sampling: nfe, solver, schedule, guidance and, where not all of a latent's channels are
            guided, guidance_channels, used unless a request says otherwise.
        step: Optimiser steps behind the weights; None where they are not known.
        objective: What the backbone predicts, and along which path.
        example_prompts: Prompts that the model should know.
    """

    modality: str
    modality_options: Mapping[str, Any]
    text_encoder: str
    text_encoder_options: Mapping[str, Any]
    sampling: Mapping[str, Any]
    step: int | None
    objective: FlowMatching = field(default_factory=FlowMatching)
    example_prompts: list[str] = field(default_factory=list)


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
    (folder / "backbone").mkdir()
    write_backbone(folder / "backbone", _of_part(weights, "backbone"), config)
    encoder = _of_part(weights, "text_encoder")
    if encoder:
        (folder / "text_encoder").mkdir()
        save_weights(folder / "text_encoder" / "model.safetensors", encoder)
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
            "objective": card.objective.to_dict(),
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
        f"{sum(tensor.numel() for tensor in weights.values()):,} parameters"
        f"{'' if card.step is None else f', {card.step} training steps'}.\n\n"
        "```python\nfrom nextdit_core import Pipeline\n\n"
        f'media = Pipeline.from_pretrained("path/of/this/folder")({prompt!r}, seed=0)\n```\n\n'
        "Architecture: Lumina-Next, arXiv 2406.18583.\n",
    )


def _of_part(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    beginning = f"{part}."
    return {
        name.removeprefix(beginning): tensor
        for name, tensor in weights.items()
        if name.startswith(beginning)
    }


def read_card(folder: Path) -> ModelCard:
    """Read `nextdit.json` of a model folder.

    Raises:
        UserError: It is missing, not JSON, lacks something, or has an objective that is unknown.
    """
    values = read_object(folder / CARD)
    modality = _entry(folder, values, "modality", dict)
    encoder = _entry(folder, values, "text_encoder", dict)
    prompts = _entry(folder, values, "example_prompts", list)
    return ModelCard(
        modality=_entry(folder, modality, "name", str),
        modality_options=_entry(folder, modality, "options", dict),
        text_encoder=_entry(folder, encoder, "name", str),
        text_encoder_options=_entry(folder, encoder, "options", dict),
        sampling=_entry(folder, values, "sampling", dict),
        step=None if values.get("step", 0) is None else _entry(folder, values, "step", int),
        objective=_objective(folder, values),
        example_prompts=[str(prompt) for prompt in prompts],
    )


def _objective(folder: Path, values: Mapping[str, Any]) -> FlowMatching:
    """Read the objective; folders that are older than the choice hold the default one."""
    if "objective" not in values:
        return FlowMatching()
    try:
        return FlowMatching.from_dict(_entry(folder, values, "objective", dict))
    except UserError as error:
        raise UserError(f"{folder / CARD}: {error}") from error


def _entry(folder: Path, values: Mapping[str, Any], key: str, kind: type[Kind]) -> Kind:
    found = values.get(key)
    if not isinstance(found, kind):
        raise UserError(
            f"{folder / CARD} lacks {key!r}, or it is no {kind.__name__}; it was changed or is "
            f"damaged"
        )
    return found


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
    modality, encoder = build_parts(card)
    checkpoint = open_checkpoint(folder / "backbone")
    check_parts(checkpoint.config, modality, encoder)
    modality = modality.to(device)
    backbone = read_backbone(checkpoint, dtype=dtype, device=device)
    weights = load_part(folder / "text_encoder", device) if encoder.state_dict() else {}
    try:
        encoder.load_state_dict(
            {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in weights.items()
            },
            assign=True,
        )
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise UserError(f"the weights in {folder} do not fit its sizes: {said}") from error
    encoder.to(device)  # what it keeps to itself
    model = FlowModel(backbone, encoder)
    return model.eval().requires_grad_(False), modality, card


def build_parts(card: ModelCard) -> tuple[Modality, nn.Module]:
    """Build what a card names: the modality, and the text encoder without its weights.

    Raises:
        UserError: A part is not installed, or an option is wrong.
    """
    modality = load_modality(card.modality, card.modality_options)
    with torch.device("meta"):
        encoder = load_text_encoder(card.text_encoder, card.text_encoder_options)
    return modality, encoder


def check_parts(config: NextDiTConfig, modality: Modality, encoder: nn.Module) -> None:
    """Refuse parts that do not fit one another, before weights are read.

    Raises:
        UserError: Text features or tokens are of another width than the backbone takes.
    """
    text_dim = getattr(encoder, "text_dim", None)
    if text_dim != config.text_dim:
        name = f"{type(encoder).__name__} {encoder.extra_repr()}".strip()
        raise UserError(
            f"the text encoder ({name}) gives features of width {text_dim}, and the backbone "
            f"takes {config.text_dim}; give the encoder that it was trained with"
        )
    if (modality.token_dim, modality.axes) != (config.token_dim, config.axes):
        raise UserError(
            f"the modality has tokens of {modality.token_dim} numbers with {modality.axes} "
            f"position axes, and the backbone takes {config.token_dim} and {config.axes}"
        )


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
        for name, tensor in load_part(folder / part, device).items()
    }
