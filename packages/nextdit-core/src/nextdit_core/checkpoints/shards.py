"""Safetensors files, cut into shards with an index where they would grow too large.

`model.safetensors`, or `model-00001-of-00003.safetensors` ... and `model.safetensors.index.json`,
as transformers and diffusers name them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextdit_core.checkpoints.mapping import Derived, convert
from nextdit_core.errors import UserError
from nextdit_core.folder import read_object, write_json

__all__ = ["find_shards", "load_part", "load_weights", "parse_size", "save_shards", "save_weights"]

INDEX = ".safetensors.index.json"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """Read a number of bytes.

    Args:
        size: Bytes, or text such as "5GB" (10^9 bytes) or "512MiB" (2^20 bytes).

    Returns:
        Bytes.

    Raises:
        UserError: It is no positive size.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = UNITS.get(match.group(2).upper()) if match else None
    found = int(float(match.group(1)) * unit) if match and unit else 0
    if found < 1:
        raise UserError(f"size {size!r} is not a number of bytes; expected such as 5GB or 512MiB")
    return found


def save_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    plan: Mapping[str, Derived],
    max_shard_size: int,
) -> None:
    """Write converted tensors, one shard after the other, so that one at a time is in memory.

    Args:
        folder: Where to.
        stem: Name of the file, without its ending.
        tensors: What the plan takes.
        plan: What is written, in this order.
        max_shard_size: Most bytes of tensors in a file; a single tensor may exceed it.

    Raises:
        OSError: A file cannot be written.
    """
    described = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    sizes = {name: tensor.nbytes for name, tensor in convert(described, plan).items()}
    shards = _fill(sizes, max_shard_size)
    names = [
        f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
        for index in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        save_weights(folder / file, convert(tensors, {name: plan[name] for name in shard}))
    if len(shards) > 1:
        homes = {
            name: file for file, shard in zip(names, shards, strict=True) for name in sorted(shard)
        }
        total = {"total_size": sum(sizes.values())}
        write_json(folder / f"{stem}{INDEX}", {"metadata": total, "weight_map": homes})


def _fill(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def find_shards(folder: Path, stem: str) -> list[Path]:
    """Find the file or files of a stem.

    Args:
        folder: Where they are.
        stem: Name without ending, such as "model".

    Returns:
        One or several files; none where there is neither a file nor an index.

    Raises:
        UserError: The index is damaged or names a file that is missing.
    """
    index, single = folder / f"{stem}{INDEX}", folder / f"{stem}.safetensors"
    if single.is_file() and not index.is_file():
        return [single]
    if not index.is_file():
        return []
    homes = read_object(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise UserError(f"{index} has no weight_map; it is damaged: copy it again")
    files = set()
    for name in homes.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith("safetensors"):
            raise UserError(f"{index} names {name!r}, which is no file beside it; it is damaged")
        files.add(folder / name)
    for file in sorted(files):
        if not file.is_file():
            raise UserError(f"{index} names {file.name}, which is missing; copy the folder again")
    return sorted(files)


def load_part(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Read `model.safetensors`, sharded or not.

    Args:
        folder: Where it is.
        device: Where the tensors go.

    Returns:
        Tensors by name; none where the part has no weights.

    Raises:
        UserError: A file is missing or damaged.
    """
    files: Sequence[Path] = find_shards(folder, "model") or [folder / "model.safetensors"]
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_weights(file, device)
    return found


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
