"""Low-rank adapters: a few weights beside frozen ones, through peft (the extra `lora`).

W' = W + (alpha/rank)·B·A

Source: Hu et al., LoRA, arXiv 2106.09685, §4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nextdit_core.backbone import NextDiT
from nextdit_core.checkpoints.mapping import described
from nextdit_core.checkpoints.shards import save_weights
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError, unknown_name
from nextdit_core.recipe import LoraRecipe

__all__ = ["add_adapters", "check_adapters", "merged", "save_adapter"]

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"


def check_adapters(recipe: LoraRecipe, config: NextDiTConfig) -> None:
    """Find out what would stop adapters, before any work.

    Raises:
        UserError: peft is not installed, or no linear layer has one of the names.
    """
    if find_spec("peft") is None:
        raise UserError("lora needs peft: pip install 'nextdit-core[lora]'")
    linear = {
        name.rpartition(".")[2]
        for name, module in described(config).layers.named_modules()
        if isinstance(module, nn.Linear) and not name.rpartition(".")[2].isdigit()
    }
    for target in recipe.targets:
        if target not in linear:
            raise unknown_name("linear layer in lora.targets", target, linear)


def add_adapters(backbone: NextDiT, recipe: LoraRecipe) -> None:
    """Freeze a backbone, and put adapters that change nothing yet beside its linear layers.

    Args:
        backbone: Changed in place; the adapters are drawn from the global random numbers.
        recipe: Rank, scale, and which layers.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_config(recipe), backbone)


def _config(recipe: LoraRecipe, base: str | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank if recipe.alpha is None else recipe.alpha,
        target_modules=list(recipe.targets),
        base_model_name_or_path=base,
    )


def merged(weights: Mapping[str, Tensor], recipe: LoraRecipe) -> dict[str, Tensor]:
    """Add the adapters to the weights beside them, under the names of a network without any.

    Args:
        weights: State dict of a model with adapters.
        recipe: They were made by.

    Returns:
        State dict of one without.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        layer, base, ending = name.partition(_BASE)
        if base and ending == ".weight":
            a, b = weights[layer + _A], weights[layer + _B]
            tensor = tensor + recipe.scale * (b @ a)
        found[layer + ending] = tensor
    return found


def save_adapter(
    folder: Path, weights: Mapping[str, Tensor], recipe: LoraRecipe, base: str | None
) -> None:
    """Write the adapters alone as peft reads them: `PeftModel.from_pretrained(backbone, folder)`.

    Args:
        folder: A new one.
        weights: State dict of a `FlowModel` with adapters.
        recipe: They were made by.
        base: Where the other weights came from.
    """
    folder.mkdir()
    _config(recipe, base).save_pretrained(str(folder))
    own = {
        f"base_model.model.{name.removeprefix('backbone.')}".replace(".default", ""): tensor
        for name, tensor in weights.items()
        if ".lora_" in name
    }
    save_weights(folder / "adapter_model.safetensors", own)
