"""Image autoencoders of diffusers: a picture to a latent of an eighth of its sides, and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from nextdit_core import LatentSpec, UserError
from nextdit_core.checkpoints.hub import local_path
from nextdit_core.folder import read_object

__all__ = ["KLAutoencoder"]

CLASS = "AutoencoderKL"
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")

Precision = Literal["float32", "bfloat16", "float16"]


class KLAutoencoder:
    """A pretrained `AutoencoderKL` of diffusers, such as that of SDXL, which Lumina-Next uses.

    Scale and shift are those that its `config.json` says. Encoding gives the mean of the
    posterior, not a draw from it. The settings are read at once, the weights when `to` is called
    or the first picture comes. Nothing is trained.

    Args:
        model: A folder that diffusers' `save_pretrained` wrote, or a name on the Hugging Face
            hub, such as "stabilityai/sdxl-vae". Of a diffusers pipeline its autoencoder is taken.
        subfolder: Where in it the autoencoder is. None means its root, or "vae" of a pipeline.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights. That of SDXL overflows in float16.

    Raises:
        UserError: There is no such folder, it holds another autoencoder or no weights, or an
            option does not fit.

    Source: Rombach et al., Latent Diffusion Models, arXiv 2112.10752.
    """

    def __init__(
        self,
        model: str,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Precision = "float32",
    ) -> None:
        if dtype not in get_args(Precision):
            raise UserError(f"dtype is {dtype!r}; accepted: {', '.join(get_args(Precision))}")
        here = Path(model).expanduser()
        self.folder = _folder(model, subfolder, revision).absolute()
        given = {
            "model": str(here.absolute()) if here.is_dir() else model,
            "subfolder": subfolder,
            "revision": revision,
            "dtype": None if dtype == "float32" else dtype,
        }
        self.options = {name: value for name, value in given.items() if value is not None}
        self.dtype = dtype
        values = read_object(self.folder / "config.json")
        if values.get("_class_name", CLASS) != CLASS:
            raise UserError(
                f"{self.folder} is a {values['_class_name']}; expected diffusers' {CLASS}, such "
                f"as stabilityai/sdxl-vae"
            )
        self.latent, self.media_channels = _spec(self.folder, values)
        if not any(self.folder.glob(WEIGHTS[0])):
            raise UserError(
                f"{self.folder} holds no weights; expected diffusion_pytorch_model.safetensors "
                f"(pickled .bin files are not read; save the autoencoder as safetensors)"
            )
        self.device = torch.device("cpu")
        self._model: Any = None
        self._lock = threading.Lock()

    def to(self, device: torch.device) -> Self:
        """Read the weights, if they are not yet, and compute on this device from now on."""
        with self._lock:
            if self._model is None:
                self._model = self._load()
            self._model.to(device)
            self.device = torch.device(device)
        return self

    @torch.no_grad()
    def encode(self, media: Tensor) -> Tensor:
        """Encode one picture.

        Args:
            media: `[media_channels, height, width]` in [-1, 1], both sides multiples of the
                stride.

        Returns:
            `[channels, height / stride, width / stride]` float32 on the CPU.

        Raises:
            UserError: A side is no multiple of the stride.
        """
        strides = self.latent.strides
        if any(extent % stride for extent, stride in zip(media.shape[1:], strides, strict=True)):
            raise UserError(
                f"a picture of {'x'.join(map(str, media.shape[1:]))} cannot be encoded; expected "
                f"sides that are multiples of {strides[0]}"
            )
        model = self._ready()
        posterior = model.encode(media[None].to(self.device, model.dtype)).latent_dist
        return self.latent.normalise(posterior.mode()[0].float()).cpu()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode one latent, `[channels, height, width]`, to float32 pixels on the CPU.

        Raises:
            UserError: The pixels are not finite: the network overflowed.
        """
        model = self._ready()
        z = self.latent.denormalise(latent.float().to(self.device))
        pixels = model.decode(z[None].to(model.dtype)).sample[0].float().cpu()
        if not bool(pixels.isfinite().all()):
            fix = "; decode with dtype='float32'" if model.dtype == torch.float16 else ""
            raise UserError(f"the decoded picture is not finite in {model.dtype}{fix}")
        return pixels

    def _ready(self) -> Any:
        if self._model is None:
            self.to(self.device)
        return self._model

    def _load(self) -> Any:
        library = _diffusers()
        try:
            model, found = library.AutoencoderKL.from_pretrained(
                self.folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=getattr(torch, self.dtype),
            )
        except Exception as error:  # of many kinds: safetensors, shapes, settings
            said = " ".join(str(error).split())[:300]
            raise UserError(f"cannot read the autoencoder in {self.folder}: {said}") from error
        missing = sorted(map(str, found["missing_keys"]))
        if missing:
            raise UserError(
                f"the weights in {self.folder} do not fit its config.json: {len(missing)} tensors "
                f"are missing, first {', '.join(missing[:5])}; save the autoencoder again"
            )
        return model.eval().requires_grad_(False)


def _folder(model: str, subfolder: str | None, revision: str | None) -> Path:
    """Find where the autoencoder is, on disk or on the hub."""
    inside = [subfolder] if subfolder else ["", "vae"]
    files = [Path(one, file).as_posix() for one in inside for file in ("config.json", *WEIGHTS)]
    root = local_path(model, patterns=["model_index.json", *files], revision=revision)
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; give the autoencoder's, or a name on the Hugging Face hub "
            f"such as stabilityai/sdxl-vae"
        )
    if subfolder is None and (root / "model_index.json").is_file():
        subfolder = "vae"
    folder = root / (subfolder or "")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is no autoencoder of diffusers; give the folder "
            f"that its save_pretrained wrote"
        )
    return folder


def _spec(folder: Path, values: Mapping[str, Any]) -> tuple[LatentSpec, int]:
    """Read shape and scale from config.json; what it does not say is diffusers' default."""
    try:
        channels = int(values.get("latent_channels", 4))
        stride = 2 ** (len(values["block_out_channels"]) - 1)
        factor = float(values.get("scaling_factor", 0.18215))
        std, mean = values.get("latents_std"), values.get("latents_mean")
        shift = values.get("shift_factor")
        spec = LatentSpec(
            channels,
            (stride, stride),
            tuple(factor / float(one) for one in std) if std else (factor,),
            tuple(map(float, mean)) if mean else (float(shift or 0.0),),
        )
        return spec, int(values.get("in_channels", 3))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder / 'config.json'} was changed or is damaged: {type(error).__name__}: {error}"
        ) from error


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"autoencoder 'kl-image' needs the diffusers library ({error}); install it with: "
            f'pip install "modality-image[vae]"'
        ) from error
    return diffusers
