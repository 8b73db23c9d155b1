"""Lumina-Next as others save it, as the parts of a pipeline: text encoder, backbone, autoencoder.

A diffusers pipeline holds all three, and a scheduler of which the shift of the time grid is read.
The authors' folder, or any backbone alone, holds one, and is told where the others are. Parts are
named as plug-ins are: the modality "image" with the autoencoder "kl-image", and the text encoder
"transformers".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextdit_core.autoencoder import load_autoencoder
from nextdit_core.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nextdit_core.checkpoints.hub import PIPELINE_CLASSES
from nextdit_core.checkpoints.load import read_backbone
from nextdit_core.checkpoints.save import PATCH_SIZE, SAMPLE_SIZE
from nextdit_core.errors import UserError
from nextdit_core.flow_model import FlowModel
from nextdit_core.folder import read_object
from nextdit_core.modality import Modality
from nextdit_core.model_folder import CARD
from nextdit_core.saved_model import ModelCard, build_parts, check_parts

__all__ = ["INDEX", "LuminaPipeline", "load_lumina", "open_lumina"]

INDEX = "model_index.json"
#: What a folder with a backbone holds some of.
BACKBONE = ("*.safetensors", "*.safetensors.index.json", "*.pth", "*.pt", "*.bin", "transformer")
LUMINA_2 = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
TRANSFORMER = "LuminaNextDiT2DModel"
AUTOENCODER = "AutoencoderKL"
SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
#: Settings of a scheduler that bend its grid otherwise.
BENDS = (
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
#: Folders of a pipeline, and the argument that stands in for one that is missing.
FOLDERS = {
    "transformer": None,
    "text_encoder": "text_encoder",
    "tokenizer": "text_encoder",
    "vae": "autoencoder",
    "scheduler": None,
}
#: What the authors' scripts call autoencoders, on the hub.
THEIR_AUTOENCODERS = {
    "sdxl": "stabilityai/sdxl-vae",
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
}
#: Numbers of evaluations, guidance and, where nothing says otherwise, shift of the authors' demo.
NFE, GUIDANCE, SHIFT = 30, 4.0, 4.0
#: In four-channel latents the authors guide the first three.
GUIDED = {4: [0, 1, 2]}


@dataclass(frozen=True)
class LuminaPipeline:
    """A pipeline that was found and checked; of its weights nothing was read.

    Args:
        card: The other parts by name, and how to sample.
        checkpoint: The backbone.
        scheduler: Class and shift of diffusers' scheduler, in words, where there is one.
    """

    card: ModelCard
    checkpoint: Checkpoint
    scheduler: str | None


def open_lumina(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    text_encoder: str | Path | None = None,
    autoencoder: str | Path | None = None,
    ema: bool = False,
) -> LuminaPipeline:
    """Find the parts of a pipeline.

    Args:
        path: A diffusers pipeline, or a backbone of any layout.
        dtype: What the backbone will be, which the text encoder follows: float32, or bfloat16.
        text_encoder: Folder or name on the hub of a language model, in place of the pipeline's.
        autoencoder: Folder or name on the hub of an image autoencoder, likewise.
        ema: Take the authors' averaged weights.

    Returns:
        The parts by name.

    Raises:
        UserError: It is another pipeline, a part is missing or of another kind, or a backbone
            alone came without its parts.
    """
    if not path.exists():
        raise UserError(
            f"there is no file or folder {path}; expected a saved model, a run, a diffusers "
            f"pipeline of Lumina-Next or a backbone, or OWNER/NAME on the Hugging Face hub"
        )
    scheduler, shift = None, SHIFT
    if (path / INDEX).is_file():
        _check_index(path, {"text_encoder": text_encoder, "autoencoder": autoencoder})
        scheduler, shift = _scheduler(path / "scheduler" / "scheduler_config.json")
        text_encoder, autoencoder = text_encoder or path, autoencoder or path
    elif path.is_dir() and not any(any(path.glob(kind)) for kind in BACKBONE):
        raise UserError(
            f"{path} holds no {CARD}, no {INDEX} and no weights, so it is no saved nextdit model, "
            f"no diffusers pipeline and no backbone; give the folder of a run or of a model"
        )
    checkpoint = open_checkpoint(path, ema=ema)
    if checkpoint.config.text_dim is None or checkpoint.config.axes != 2:
        raise UserError(
            f"{path} is no text-to-image backbone: it has text_dim {checkpoint.config.text_dim} "
            f"and {checkpoint.config.axes} position axes. It is loaded by NextDiT.from_pretrained"
        )
    if text_encoder is None or autoencoder is None:
        raise _alone(path, checkpoint, text_encoder, autoencoder)
    return LuminaPipeline(
        _card(path, checkpoint, str(text_encoder), str(autoencoder), dtype, shift),
        checkpoint,
        scheduler,
    )


def load_lumina(
    path: Path, device: torch.device, dtype: torch.dtype, **parts: Any
) -> tuple[FlowModel, Modality, ModelCard]:
    """Load a pipeline.

    Args:
        path: See `open_lumina`.
        device: Where the weights go.
        dtype: What those of the backbone become.
        parts: The other arguments of `open_lumina`.

    Returns:
        The model in evaluation mode, its modality, and a card with sampling defaults.

    Raises:
        UserError: See `open_lumina`; or parts do not fit one another, or a file is damaged.
    """
    found = open_lumina(path, dtype=dtype, **parts)
    modality, encoder = build_parts(found.card)
    check_parts(found.checkpoint.config, modality, encoder)
    modality = modality.to(device)
    backbone = read_backbone(found.checkpoint, dtype=dtype, device=device)
    model = FlowModel(backbone, encoder.to(device))
    return model.eval().requires_grad_(False), modality, found.card


def _card(
    path: Path,
    checkpoint: Checkpoint,
    text_encoder: str,
    autoencoder: str,
    dtype: torch.dtype,
    shift: float,
) -> ModelCard:
    options = {"model": autoencoder}
    latent = load_autoencoder("kl-image", options).latent
    patch = checkpoint.config.patch_size or PATCH_SIZE
    channels = checkpoint.config.token_dim / patch**2
    if channels != latent.channels:
        raise UserError(
            f"{path} takes latents of {channels:g} channels in patches of {patch}x{patch}, and the "
            f"autoencoder {autoencoder} makes latents of {latent.channels} channels; give the one "
            f"that the backbone was trained with"
        )
    side = (checkpoint.config.sample_size or SAMPLE_SIZE) * latent.strides[0]
    sampling: dict[str, Any] = {
        "nfe": NFE,
        "solver": "auto",
        "schedule": f"shift:{shift:g}" if shift != 1.0 else "auto",
        "guidance": GUIDANCE,
    }
    if latent.channels in GUIDED:
        sampling["guidance_channels"] = GUIDED[latent.channels]
    full = dtype in (torch.float32, torch.float64)
    return ModelCard(
        modality="image",
        modality_options={
            "channels": 3,
            "patch_size": patch,
            "height": side,
            "width": side,
            "autoencoder": "kl-image",
            "autoencoder_options": options,
        },
        text_encoder="transformers",
        text_encoder_options={"model": text_encoder, "dtype": "float32" if full else "bfloat16"},
        sampling=sampling,
        step=None,
    )


def _check_index(path: Path, given: Mapping[str, object]) -> None:
    """Refuse other pipelines and other parts by their names."""
    index = read_object(path / INDEX)
    name = index.get("_class_name")
    if name in LUMINA_2:
        raise UserError(
            f"{path} is a Lumina-2 (Lumina-Image-2.0) pipeline, another network (joint attention "
            f"over text and image); use diffusers' Lumina2Pipeline"
        )
    if name not in PIPELINE_CLASSES:
        raise UserError(
            f"{path} is a pipeline of class {name}; expected diffusers' {PIPELINE_CLASSES[0]}, "
            f"which Lumina-Next is"
        )
    for folder, argument in FOLDERS.items():
        if not (path / folder).is_dir() and (argument is None or given[argument] is None):
            instead = f", or give {argument}= another one" if argument else ""
            raise UserError(f"{path} lacks the folder {folder}; copy the whole pipeline{instead}")
    for part, expected in (("transformer", TRANSFORMER), ("vae", AUTOENCODER)):
        if FOLDERS[part] is not None and given[str(FOLDERS[part])] is not None:
            continue
        said = index.get(part)
        found = said[1] if isinstance(said, list) and len(said) == 2 else expected
        if found != expected:
            raise UserError(
                f"{path / INDEX} says that its {part} is a {found}; expected {expected}"
            )


def _scheduler(file: Path) -> tuple[str, float]:
    """Read class and shift of diffusers' scheduler; the solver is one of ours."""
    values = read_object(file)
    name = values.get("_class_name")
    if name not in SCHEDULERS:
        raise UserError(
            f"{file} is of a {name}; expected {' or '.join(SCHEDULERS)}: Lumina-Next is a flow "
            f"model, and other schedulers follow other paths from noise to data"
        )
    for key in BENDS:
        if values.get(key) not in (None, False):
            raise UserError(
                f"{file} sets {key} to {values[key]!r}, which is not read here; remove it and "
                f"choose a time grid with schedule="
            )
    shift = values.get("shift", 1.0)
    if not isinstance(shift, int | float) or not 0.0 < shift < math.inf:
        raise UserError(f"{file} sets shift to {shift!r}; expected a number greater than 0")
    return f"{name}, shift {float(shift):g}", float(shift)


def _alone(
    path: Path,
    checkpoint: Checkpoint,
    text_encoder: str | Path | None,
    autoencoder: str | Path | None,
) -> UserError:
    """Say what a backbone alone lacks."""
    said = str(checkpoint.model_args.get("vae", "sdxl"))
    lacking = {
        f"text_encoder={str(text_encoder or 'google/gemma-2b')!r}": text_encoder,
        f"autoencoder={THEIR_AUTOENCODERS.get(said, said)!r}": autoencoder,
    }
    words = ", ".join(words for words, value in lacking.items() if value is None)
    return UserError(
        f"{path} is {checkpoint.layout.value}, a backbone alone, which is loaded by "
        f"NextDiT.from_pretrained; to sample pictures with Lumina-Next's, say where its other "
        f"parts are, such as {words}"
    )
