"""Text features on disk: one safetensors file for each encoder and prompt.

<folder>/<encoder's identity>/<2 digits>/<SHA-256 of the prompt>.safetensors

A file appears whole or not at all, and any number of processes may write to one folder: what two
of them make of one prompt is the same to rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nextdit_core.folder import cannot_write, new_file

__all__ = ["FeatureCache"]


class FeatureCache:
    """The features of one encoder.

    Args:
        folder: Where they are kept; may be shared by encoders, processes and machines.
        identity: See `FrozenTextEncoder.identity`.
        features_dim: Width of the features.
    """

    def __init__(self, folder: str | Path, identity: str, features_dim: int) -> None:
        self.folder = Path(folder).expanduser().absolute() / identity[:32]
        self.features_dim = features_dim

    def path(self, prompt: str) -> Path:
        """Name the file of a prompt."""
        digest = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def __contains__(self, prompt: str) -> bool:
        """Say whether there is a file for a prompt, without reading it."""
        return self.path(prompt).is_file()

    def read(self, prompt: str) -> Tensor | None:
        """Read the features of a prompt.

        Args:
            prompt: The text.

        Returns:
            `[tokens, features_dim]` on the CPU, or None where there are none. A damaged file
            counts as none, with a warning.
        """
        path = self.path(prompt)
        try:
            # In one piece: safe_open opens a file twice, and it may be replaced between.
            data = path.read_bytes()
            features = load(data)["features"]
            written = _header(data)["__metadata__"]["checksum"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            damage = str(error)
        else:
            if written == _checksum(features) and features.shape[1:] == (self.features_dim,):
                return features
            damage = "other bytes than were written"
        warnings.warn(
            f"{path} is damaged ({damage}); its features are computed again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    def write(self, prompt: str, features: Tensor) -> None:
        """Keep the features of a prompt.

        Args:
            prompt: The text.
            features: `[tokens, features_dim]`.

        Raises:
            UserError: The folder is not writable, or the disk is full.
        """
        features = features.detach().cpu().contiguous()
        metadata = {"checksum": _checksum(features)}
        with new_file(self.path(prompt)) as partial:
            partial.write_bytes(save({"features": features}, metadata))

    def size(self) -> tuple[int, int]:
        """Count the prompts and the bytes on disk.

        Raises:
            UserError: The folder cannot be read.
        """
        files = total = 0
        try:
            for place, _, names in os.walk(self.folder):
                for name in names:
                    if name.endswith(".safetensors") and not name.startswith("."):
                        files += 1
                        total += os.stat(os.path.join(place, name)).st_size
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return files, total


def _header(data: bytes) -> dict[str, Any]:
    """Read the JSON in front of the tensors, behind 8 bytes that tell its length."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _checksum(features: Tensor) -> str:
    """Give the CRC-32 of dtype, shape and bytes, against damage that safetensors lets pass."""
    kind = zlib.crc32(f"{features.dtype} {tuple(features.shape)}".encode())
    data: Any = features.view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data, kind):08x}"
