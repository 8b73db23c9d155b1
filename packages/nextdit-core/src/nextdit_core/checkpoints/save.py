"""Write a backbone in our layout, diffusers' or the authors'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from nextdit_core.checkpoints import authors, class_conditional, diffusers
from nextdit_core.checkpoints.authors import Variant
from nextdit_core.checkpoints.mapping import same
from nextdit_core.checkpoints.model_args import write_model_args
from nextdit_core.checkpoints.own_config import own_config_values
from nextdit_core.checkpoints.shards import parse_size, save_shards
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import unknown_name
from nextdit_core.folder import check_free, new_folder, write_json, write_text

__all__ = ["MAX_SHARD_SIZE", "LayoutName", "save_backbone", "write_backbone"]

LayoutName = Literal["nextdit", "diffusers", "authors"]
MAX_SHARD_SIZE = "5GB"
#: What the releases have, taken where a config does not say.
PATCH_SIZE, SAMPLE_SIZE = 2, 128

#: The constructors of the authors' text-to-image folder, and of the class-conditional ones.
CONSTRUCTORS = {"2b": "NextDiT_2B_patch2", "2b-gqa": "NextDiT_2B_GQA_patch2"}
CLASS_CONSTRUCTORS = {
    "600m": "DiT_Llama_600M_patch2",
    "2b": "DiT_Llama_2B_patch2",
    "3b": "DiT_Llama_3B_patch2",
    "7b": "DiT_Llama_7B_patch2",
    "600m-moe-time": "DiT_Llama_600M_patch2",
    "600m-moe-space": "DiT_Llama_600M_patch2_Spatial",
    "600m-moe-both": "DiT_Llama_600M_patch2_Both",
}


def save_backbone(
    weights: Mapping[str, Tensor],
    config: NextDiTConfig,
    path: str | Path,
    *,
    layout: LayoutName = "nextdit",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    patch_size: int | None = None,
    sample_size: int | None = None,
) -> None:
    """Write a folder; see `NextDiT.save_pretrained`."""
    config = replace(
        config,
        patch_size=config.patch_size if patch_size is None else patch_size,
        sample_size=config.sample_size if sample_size is None else sample_size,
    )
    check_savable(config, Path(path), layout, max_shard_size)
    most = parse_size(max_shard_size)
    variant = Variant(
        config.patch_size or PATCH_SIZE, sample_size=config.sample_size or SAMPLE_SIZE
    )
    with new_folder(Path(path)) as folder:
        if layout == "nextdit":
            write_backbone(folder, weights, config, max_shard_size=most)
            write_text(folder / "README.md", _readme(weights, config))
        elif layout == "diffusers":
            plan = diffusers.writing(config, variant)
            save_shards(folder, "diffusion_pytorch_model", weights, plan, most)
            write_json(folder / "config.json", diffusers.config_values(config, variant))
        else:
            # Their readers count shards as model-parallel ranks, so there is one file.
            total = sum(tensor.nbytes for tensor in weights.values())
            theirs = authors if config.classes is None else class_conditional
            plan = theirs.writing(config, variant)
            save_shards(folder, "consolidated.00-of-01", weights, plan, 2 * total)
            args = model_args_of(config)
            if args is not None:
                write_model_args(folder / "model_args.pth", args)


def layout_name(name: str) -> LayoutName:
    """Check the name of a layout.

    Raises:
        UserError: There is no such layout.
    """
    for known in get_args(LayoutName):
        if name == known:
            return known
    raise unknown_name("layout", name, get_args(LayoutName))


def check_savable(
    config: NextDiTConfig, path: Path, layout: str, max_shard_size: int | str
) -> None:
    """Find out what would stop a save, before weights are read or written.

    Raises:
        UserError: The place is taken, or the layout does not exist or cannot hold the backbone.
    """
    patch_size = config.patch_size or PATCH_SIZE
    parse_size(max_shard_size)
    if layout_name(layout) == "authors" and config.classes is not None:
        class_conditional.check_expressible(config, patch_size)
    elif layout != "nextdit":
        authors.check_expressible(config, patch_size)
    check_free(path)


def write_backbone(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: NextDiTConfig,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write config.json and the weights of our layout into a folder that is being made."""
    plan = {name: same(name) for name in weights}
    save_shards(folder, "model", weights, plan, parse_size(max_shard_size))
    write_json(folder / "config.json", own_config_values(config))


def model_args_of(config: NextDiTConfig) -> dict[str, Any] | None:
    """Give what the weights say of the authors' arguments, where a constructor of theirs fits."""
    constructors = CONSTRUCTORS if config.classes is None else CLASS_CONSTRUCTORS
    given = {
        name: getattr(config, name)
        for name in ("token_dim", "text_dim", "qk_norm", "classes", "final_shift", "sample_size")
    }
    config = replace(config, patch_size=None if config.patch_size == 2 else config.patch_size)
    for size, constructor in constructors.items():
        if NextDiTConfig.named(size, **given) == config:
            said = {"model": constructor, "qk_norm": config.qk_norm, "model_parallel_size": 1}
            return said if config.classes is None else said | {"num_classes": config.classes}
    return None


def _readme(weights: Mapping[str, Tensor], config: NextDiTConfig) -> str:
    count = sum(tensor.numel() for tensor in weights.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in weights.values()}))
    return (
        "---\nlibrary_name: nextdit\ntags: [next-dit, flow-matching]\n---\n\n"
        f"# A Next-DiT backbone\n\n{count:,} parameters ({dtypes}): {config.layers} layers of "
        f"width {config.width}, tokens of {config.token_dim} numbers.\n\n"
        "```python\nfrom nextdit_core import NextDiT\n\n"
        'backbone = NextDiT.from_pretrained("path/of/this/folder")\n```\n\n'
        "Architecture: Lumina-Next, arXiv 2406.18583. Written by nextdit-core "
        f"{version('nextdit-core')}.\n"
    )
