"""Weight files, opened for what they hold and read a few tensors at a time.

What `read` gives are views of the mapped file: nothing is copied before it is used, and the pages
go when the views do. Only tensors are ever taken from a file; no pickle runs.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from nextdit_core.errors import UserError

__all__ = ["SafetensorsFile", "Stored", "TensorFile", "TorchFile", "Weights", "open_file"]

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it.

    Args:
        shape: Its sizes.
        dtype: Its number format.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Room that it takes."""
        return self.numbers * self.dtype.itemsize


class TensorFile(Protocol):
    """Named tensors in a file."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def stored(self) -> Mapping[str, Stored]:
        """What it holds."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map some of the tensors; they must not be written to."""
        ...


def open_file(path: Path) -> TensorFile:
    """Open a weight file by its ending.

    Args:
        path: `.safetensors`, or `.pth`, `.pt` or `.bin` as written by `torch.save`.

    Returns:
        The file, its list of tensors read.

    Raises:
        UserError: It is missing or damaged, has another ending, holds something besides tensors
            or numbers that are not floating point, or would run code.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; copy the checkpoint again, with all its files")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return TorchFile(path)
    raise UserError(f"{path} is not a weight file; expected .safetensors, .pth, .pt or .bin")


class SafetensorsFile:
    """A safetensors file.

    Args:
        path: The file.

    Raises:
        UserError: It is damaged, or holds numbers that are not floating point.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored: dict[str, Stored] = {}
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {
                    name: (tuple(part.get_shape()), part.get_dtype())
                    for name, part in slices.items()
                }
        except Exception as error:  # a damaged file raises whatever its first bad byte leads to
            raise _damaged(path, error) from error
        for name, (shape, dtype) in found.items():
            self.stored[name] = Stored(shape, _float(path, name, FLOATS.get(dtype), dtype))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map some of the tensors."""
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except Exception as error:
            raise _damaged(self.path, error) from error


class TorchFile:
    """A state dict written by `torch.save`, read by PyTorch's unpickler for weights only.

    Files of PyTorch before 1.6 cannot be mapped and stay in memory.

    Args:
        path: The file.

    Raises:
        UserError: It is damaged, would run code, or holds something besides tensors of floating
            point numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._mapped = zipfile.is_zipfile(path)
            self._kept = tensors = self._load()
            self.stored = {
                name: Stored(
                    tuple(tensor.shape),
                    _float(
                        path,
                        name,
                        tensor.dtype if tensor.dtype in FLOATS.values() else None,
                        str(tensor.dtype),
                    ),
                )
                for name, tensor in tensors.items()
            }
        except UserError:
            raise
        except Exception as error:  # a damaged file raises whatever its first bad byte leads to
            raise _damaged(path, error) from error
        if self._mapped:
            self._kept = {}

    def _load(self) -> dict[str, Tensor]:
        found: Any = torch.load(self.path, "cpu", weights_only=True, mmap=self._mapped)
        for key in ("model", "state_dict"):
            if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
                found = found[key]
        if not isinstance(found, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise UserError(f"{self.path} is not a state dict; expected named tensors and no more")
        strided = torch.strided
        for name, tensor in found.items():
            room = tensor.untyped_storage().nbytes() if tensor.layout == strided else -1
            if tensor.numel() * tensor.element_size() > room:
                raise UserError(f"{self.path} is damaged: {name} is larger than what is stored")
        return dict(found)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map some of the tensors."""
        tensors = self._kept or self._load()
        return {name: tensors[name] for name in names}


def _float(path: Path, name: str, dtype: torch.dtype | None, found: str) -> torch.dtype:
    if dtype is None:
        raise UserError(
            f"{path} holds {name} as {found}; weights are float32, bfloat16, float16 or float64; "
            f"quantised files are not read: quantise the loaded model instead"
        )
    return dtype


def _damaged(path: Path, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if "weights_only" in said or "WeightsUnpickler" in said or "Unsupported" in said:
        return UserError(
            f"{path} would run code when it is unpickled, or is damaged, and was not read "
            f"({said[:160]}); ask for it as safetensors"
        )
    return UserError(f"cannot read weights {path}: {said}; it is damaged or was cut: copy it again")


class Weights:
    """The tensors of a checkpoint, over all its files.

    Args:
        files: The files; no two hold one name.

    Raises:
        UserError: Two files hold one name.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files = files
        self.stored: dict[str, Stored] = {}
        self._home: dict[str, TensorFile] = {}
        for file in files:
            for name, stored in file.stored.items():
                if name in self._home:
                    raise UserError(
                        f"{name} is in {self._home[name].path} and in {file.path}; remove one file"
                    )
                self.stored[name], self._home[name] = stored, file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes by name."""
        return {name: stored.shape for name, stored in self.stored.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map some of the tensors; they must not be written to."""
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files.index(self._home[name]), []).append(name)
        found: dict[str, Tensor] = {}
        for index, some in wanted.items():
            found |= self.files[index].read(some)
        return found
