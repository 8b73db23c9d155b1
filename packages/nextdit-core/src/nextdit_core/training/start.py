"""Weights that a run starts from: what they are, and whether they fit the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextdit_core.backbone import NextDiT
from nextdit_core.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nextdit_core.checkpoints.hub import local_path
from nextdit_core.checkpoints.load import read_backbone
from nextdit_core.checkpoints.shards import find_shards, load_part
from nextdit_core.checkpoints.tensor_files import Weights, open_file
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError
from nextdit_core.model_folder import CARD
from nextdit_core.objective import FlowMatching
from nextdit_core.recipe import Recipe, SizesRecipe
from nextdit_core.saved_model import ModelCard, read_card

__all__ = ["GivenWeights", "check_sizes"]

#: What the keys of [model] decide; two of them decide one size together.
_EFFECT = {
    "kv_heads": "keys_heads",
    "multiple_of": "ffn_width",
    "ffn_dim_multiplier": "ffn_width",
}


@dataclass(frozen=True)
class GivenWeights:
    """A checkpoint that `init_from` names, opened and not read.

    Args:
        checkpoint: The backbone, in any layout.
        folder: The saved model that it is part of, or None.
        card: Its card, or None.
    """

    checkpoint: Checkpoint
    folder: Path | None
    card: ModelCard | None

    @classmethod
    def open(cls, path: str) -> GivenWeights:
        """Find and recognise a checkpoint.

        Args:
            path: As for `NextDiT.from_pretrained`.

        Raises:
            UserError: There is none, it is damaged, or it is another network.
        """
        try:
            place = local_path(path)
            if (place / CARD).is_file():
                place = local_path(path, pipeline=True)  # of the hub, the text encoder too
            checkpoint = open_checkpoint(place)
        except UserError as error:
            raise UserError(f"init_from: {error}") from error
        folder = checkpoint.place.parent
        whole = (folder / CARD).is_file() and place.name != "backbone"
        return cls(checkpoint, folder, read_card(folder)) if whole else cls(checkpoint, None, None)

    def check(self, recipe: Recipe, encoder: nn.Module, objective: FlowMatching) -> None:
        """Compare the parts of a saved model with those of a recipe.

        Args:
            recipe: The run.
            encoder: The recipe's text encoder.
            objective: The recipe's.

        Raises:
            UserError: They differ, or a LoRA would leave a text encoder untrained.
        """
        owned = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        if self.card is None:
            if recipe.lora is not None and owned:
                raise UserError(
                    f"lora trains adapters alone, and {self.checkpoint.place} has no weights for "
                    f"the text encoder {recipe.text_encoder!r}; start from a saved model that has "
                    f"them, use a frozen text encoder, or leave lora out"
                )
            return
        theirs = self.card.objective
        conflicts: list[str] = []
        if (theirs.path, theirs.prediction) != (objective.path, objective.prediction):
            conflicts.append(
                f"it predicts {theirs}, and the recipe has {objective} (objective.path="
                f"{theirs.path} objective.prediction={theirs.prediction} would fit)"
            )
        if self.card.text_encoder != recipe.text_encoder:
            conflicts.append(
                f"its text encoder is {self.card.text_encoder!r}, and the recipe's "
                f"{recipe.text_encoder!r}"
            )
        elif owned and self.folder is not None:
            files = find_shards(self.folder / "text_encoder", "model")
            stored = Weights([open_file(file) for file in files]).shapes
            wrong = sorted(
                name for name in owned.keys() | stored.keys() if owned.get(name) != stored.get(name)
            )
            if wrong:
                conflicts.append(
                    f"its text encoder has options {dict(self.card.text_encoder_options)}, and the "
                    f"recipe's has weights of other sizes: {', '.join(wrong[:5])}"
                )
        if conflicts:
            raise UserError(
                f"init_from {self.folder}: {'; '.join(conflicts)}. Change the recipe, or start "
                f"from the backbone alone: init_from={self.checkpoint.place}"
            )

    def read(self, encoder: nn.Module) -> NextDiT:
        """Read the backbone as float32, and the text encoder's weights into it where there are any.

        Args:
            encoder: Its weights are replaced.

        Raises:
            UserError: A file is damaged.
        """
        if self.folder is not None and encoder.state_dict():
            encoder.load_state_dict(load_part(self.folder / "text_encoder", torch.device("cpu")))
        return read_backbone(self.checkpoint, dtype=torch.float32).train()


def check_sizes(
    given: NextDiTConfig,
    needed: Mapping[str, Any],
    said: SizesRecipe,
    card: ModelCard | None = None,
) -> None:
    """Compare the sizes of given weights with what the recipe needs and says.

    Args:
        given: The sizes of the weights.
        needed: token_dim, axes and text_dim of the recipe's modality and text encoder.
        said: The recipe's [model]; keys that it leaves out are the weights'.
        card: Of the saved model that the weights are of, where they are of one.

    Raises:
        UserError: Sizes differ; all that do are named.
    """
    where = {"token_dim": "modality", "axes": "modality", "text_dim": "text encoder"}
    conflicts = [
        f"{name} is {getattr(given, name)}, and the recipe's {where[name]} has {value}"
        for name, value in needed.items()
        if getattr(given, name) != value
    ]
    if card is not None and any(one.startswith(("token_dim", "axes")) for one in conflicts):
        conflicts.append(
            f"the weights are of modality {card.modality!r} with modality_options "
            f"{dict(card.modality_options)}"
        )
    keys = said.to_fields()
    own = {key: keys[key] for key in keys if key in said.model_fields_set}
    try:
        wanted = NextDiTConfig.from_dict({**given.to_dict(), **own})
    except UserError as error:
        conflicts.append(f"with its other sizes, {error}")
    else:
        effects = dict.fromkeys(_EFFECT.get(key, key) for key in own)
        conflicts += [
            f"{effect} is {getattr(given, effect)}, and the recipe's [model] makes it "
            f"{getattr(wanted, effect)}"
            for effect in effects
            if getattr(given, effect) != getattr(wanted, effect)
        ]
    if conflicts:
        raise UserError(
            f"the weights of init_from do not fit the recipe: {'; '.join(conflicts)}. Keys of "
            f"[model] that are left out are taken from the weights"
        )
