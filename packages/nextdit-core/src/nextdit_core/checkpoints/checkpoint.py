"""A checkpoint that was found, recognised and checked, and not read yet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nextdit_core.checkpoints import authors, class_conditional, diffusers
from nextdit_core.checkpoints.authors import Variant
from nextdit_core.checkpoints.feed_forwards import ExpertsBy, expert_kind
from nextdit_core.checkpoints.fit import check_fit, check_sizes
from nextdit_core.checkpoints.mapping import Derived, converted_shapes, own_tensors, same
from nextdit_core.checkpoints.model_args import read_model_args
from nextdit_core.checkpoints.model_parallel import MergedShards
from nextdit_core.checkpoints.own_config import read_own_config
from nextdit_core.checkpoints.recognise import Layout, recognise, refuse_foreign
from nextdit_core.checkpoints.shards import find_shards
from nextdit_core.checkpoints.tensor_files import Weights, open_file
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError
from nextdit_core.folder import MARKER, check_complete, read_object
from nextdit_core.model_folder import CARD, CHECKPOINTS, find_model

__all__ = ["Checkpoint", "open_checkpoint"]

CONSOLIDATED = re.compile(r"consolidated(_ema)?\.(\d+)-of-(\d+)\.(safetensors|pth)")
CLASS_CONDITIONAL = (Layout.CLASS_CONDITIONAL, Layout.MIXTURE)
STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class Checkpoint:
    """A backbone on disk, in any layout.

    Args:
        place: The folder or file.
        layout: What it was recognised as.
        config: Its sizes.
        weights: Its tensors, to be read a few at a time.
        plan: What each of our tensors is made of.
        left_out: What it holds and a backbone does not need, in words.
        model_args: What the authors' training script was started with, where it is known.
    """

    place: Path
    layout: Layout
    config: NextDiTConfig
    weights: Weights
    plan: Mapping[str, Derived]
    left_out: tuple[str, ...] = ()
    model_args: Mapping[str, Any] = field(default_factory=dict)


def open_checkpoint(
    path: str | Path,
    *,
    ema: bool = False,
    patch_size: int | None = None,
    heads: int | None = None,
    experts_by: ExpertsBy | None = None,
) -> Checkpoint:
    """Find the backbone that a path stands for, recognise its layout, and check its tensors.

    Args:
        path: A backbone's folder, a saved model, a run, a diffusers pipeline or its transformer, an
            authors' folder, or a single weight file.
        ema: Take the authors' averaged weights.
        patch_size: Side of a patch, where the checkpoint does not say it and it is not 2.
        heads: Query heads, where the checkpoint is class-conditional and of no released width.
        experts_by: "time" or "space", by what experts are chosen where no tensor tells.

    Returns:
        The checkpoint; of the weights only the list of names and shapes was read.

    Raises:
        UserError: There is none, it is damaged or another network, tensors are missing, unexpected
            or misshapen, or what was said does not fit it.
    """
    place = _backbone_place(Path(path))
    files = [place] if place.is_file() else _files(place, ema)
    consolidated = CONSOLIDATED.fullmatch(files[0].name)
    if consolidated:
        files = _ranks(files[0], consolidated)
    if ema and not (consolidated and consolidated.group(1)):
        raise UserError(
            f"{place} has no file of averaged weights (consolidated_ema.*); ask without ema"
        )
    folder = place if place.is_dir() else place.parent
    weights = _open(files, merge=consolidated is not None)
    layout = recognise(weights.shapes)
    if consolidated and layout is Layout.OWN:
        layout = Layout.AUTHORS
    refuse_foreign(place, layout, weights.shapes)
    values = _config_values(folder)
    args = folder / "model_args.pth"
    theirs = layout in (Layout.AUTHORS, *CLASS_CONDITIONAL)
    said = read_model_args(args) if theirs and args.is_file() else {}
    config, variant, plan, expected = _plan(
        place, layout, weights.shapes, values, said, patch_size, heads, expert_kind(experts_by)
    )
    if heads is not None and heads != config.heads:
        raise UserError(f"heads is {heads}, and {place} says {config.heads}; leave out heads")
    if patch_size is not None and config.patch_size not in (None, patch_size):
        raise UserError(
            f"patch_size is {patch_size}, and {place} says {config.patch_size}; leave out "
            f"patch_size"
        )
    config = replace(config, patch_size=patch_size or config.patch_size)
    check_fit(place, layout.value, weights.shapes, expected)
    if variant is None:
        return Checkpoint(place, layout, config, weights, plan)
    left_out = variant.left_out(config)
    return Checkpoint(place, layout, config, weights, plan, left_out, said)


def _backbone_place(path: Path) -> Path:
    """Go down to the folder that holds the backbone's weights."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"there is no file or folder {path}; expected a checkpoint on disk, or OWNER/NAME on "
            f"the Hugging Face hub"
        )
    if (path / CARD).is_file() or (path / CHECKPOINTS).is_dir():
        return find_model(path) / "backbone"
    if (path / MARKER).is_file():
        check_complete(path)
    if (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file():
        if not (path / "transformer").is_dir():
            raise UserError(
                f"{path} is a diffusers pipeline without a transformer, so not Lumina-Next"
            )
        return path / "transformer"
    return path


def _files(folder: Path, ema: bool) -> list[Path]:
    """Find the weight files of a folder; of consolidated ones the first is enough."""
    kinds: dict[bool, list[Path]] = {False: [], True: []}
    for file in sorted(folder.iterdir()):
        match = CONSOLIDATED.fullmatch(file.name)
        if match:
            kinds[match.group(1) is not None].append(file)
    if kinds[ema] or kinds[True]:
        files = kinds[ema] or kinds[True]
        return [next((file for file in files if file.suffix == ".safetensors"), files[0])]
    for stem in STEMS:
        found = find_shards(folder, stem)
        if found:
            return found
    endings = (".safetensors", ".pth", ".pt", ".bin")
    left = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in endings and file.name != "model_args.pth"
    ]
    if len(left) != 1:
        names = ", ".join(file.name for file in left[:5]) or "none"
        raise UserError(
            f"{folder} holds no checkpoint that is known: expected model.safetensors, "
            f"diffusion_pytorch_model.safetensors or consolidated.00-of-01.safetensors (or their "
            f"shards); weight files there: {names}. Give the path of one file to read it alone"
        )
    return left


def _ranks(file: Path, match: re.Match[str]) -> list[Path]:
    """List the shards of all model-parallel ranks."""
    ema, digits, count, ending = match.groups()
    if not 0 < int(count) <= 1024:
        raise UserError(f"{file.name} says that it is one of {count} shards; expected 1 to 1024")
    names = [
        f"consolidated{ema or ''}.{rank:0{len(digits)}d}-of-{count}.{ending}"
        for rank in range(int(count))
    ]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{file.parent} lacks {len(missing)} of {len(names)} model-parallel shards: "
            f"{', '.join(missing[:5])}; copy them beside the others"
        )
    return [file.parent / name for name in names]


def _open(files: Sequence[Path], *, merge: bool) -> Weights:
    opened = [open_file(file) for file in files]
    return Weights([MergedShards(opened)] if merge and len(opened) > 1 else opened)


def _config_values(folder: Path) -> Mapping[str, Any] | None:
    file = folder / "config.json"
    return read_object(file) if file.is_file() else None


def _plan(
    place: Path,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Any] | None,
    said: Mapping[str, Any],
    patch_size: int | None,
    heads: int | None,
    experts_by: ExpertsBy | None,
) -> tuple[NextDiTConfig, Variant | None, dict[str, Derived], dict[str, tuple[int, ...]]]:
    """Find the sizes, what theirs adds to them, what ours is made of, and what has to be there."""

    def lacks(name: str) -> UserError:
        return UserError(
            f"{place} looks like {layout.value}, and its tensors do not fit: missing or without a "
            f"size: {name}. Check that all files of the checkpoint are there"
        )

    if layout is Layout.OWN:
        if values is None:
            raise UserError(
                f"{place} looks like {layout.value}, and there is no config.json beside it; give "
                f"the folder that save_pretrained wrote"
            )
        config = read_own_config(place, values)
        check_sizes(place, config, shapes, authors.layer_count(shapes))
        own = own_tensors(config)
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        return config, None, {name: same(name) for name in own}, expected
    if layout is Layout.DIFFUSERS:
        named = diffusers.authors_shapes(shapes)
        if values is None:
            config, patch = authors.infer_config(named, lacks=lacks), patch_size or 2
        else:
            _check_class(place, values)
            config, patch = diffusers.read_config(values)
        side = _sample_size(values or {}, "sample_size", 1)
        variant = Variant.of(named, patch)
        reading, writing = diffusers.reading, diffusers.writing
    else:
        named = shapes
        if layout is Layout.MIXTURE:
            experts_by = experts_by or _experts_by(said)
        config = authors.infer_config(named, heads, lacks=lacks, experts_by=experts_by)
        patch = patch_size or _patch_size(said)
        side = _sample_size(said, "image_size", 8)
        variant = Variant.of(named, patch)
        reading, writing = authors.reading, authors.writing
    if layout in CLASS_CONDITIONAL:
        reading, writing = class_conditional.reading, class_conditional.writing
        authors.check_patches(config, patch)
    else:
        authors.check_expressible(config, patch)
    check_sizes(place, config, named, authors.layer_count(named))
    expected = converted_shapes(config, writing(config, variant))
    config = replace(config, patch_size=patch, sample_size=side)
    return config, variant, reading(config, variant), expected


def _check_class(place: Path, values: Mapping[str, Any]) -> None:
    name = values.get("_class_name", diffusers.CLASS)
    if name != diffusers.CLASS:
        raise UserError(
            f"{place} holds the weights of {diffusers.CLASS} and a config.json of {name}; they do "
            f"not belong together"
        )


def _experts_by(model_args: Mapping[str, Any]) -> ExpertsBy | None:
    """Read by what experts are chosen from a name such as DiT_Llama_600M_patch2_Spatial."""
    name = str(model_args.get("model", ""))
    if not name.startswith("DiT_Llama_") or name.endswith("_Both"):
        return None
    return "space" if name.endswith("_Spatial") else "time"


def _patch_size(model_args: Mapping[str, Any]) -> int:
    """Read the patch size from a name such as NextDiT_2B_GQA_patch2; all releases have 2."""
    match = re.search(r"patch(\d{1,3})", str(model_args.get("model", "")))
    return int(match.group(1)) if match else 2


def _sample_size(values: Mapping[str, Any], key: str, pixels: int) -> int | None:
    """Read the side of the latents that a checkpoint was trained on, where it says so."""
    found = values.get(key)
    known = isinstance(found, int) and pixels <= found < 1 << 20
    return found // pixels if known else None
