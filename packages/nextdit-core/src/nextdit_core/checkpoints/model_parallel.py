"""Checkpoints of several model-parallel ranks as one.

fairscale cuts some weights by output rows and some by input columns; what it does not cut is in
every shard.

Source: the layers of lumina_next_t2i/models/model.py in Alpha-VLLM/Lumina-T2X.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nextdit_core.checkpoints.tensor_files import Stored, TensorFile
from nextdit_core.errors import UserError

__all__ = ["MergedShards", "cut_axis"]

ROWS = re.compile(
    r"(attention\.(wq|wk|wv|wk_y|wv_y)|(feed_forward|experts\.\d+)\.(w1|w3)|adaLN_modulation\.1"
    r"|x_embedder"
    r"|cap_embedder\.1|t_embedder\.mlp\.0|final_layer\.linear)\.(weight|bias)$|attention\.gate$"
)
COLUMNS = re.compile(
    r"(attention\.wo|(feed_forward|experts\.\d+)\.w2|t_embedder\.mlp\.2"
    r"|y_embedder\.embedding_table)\.weight$"
)
NORMS = re.compile(r"attention\.(q|k|ky)_norm\.")


def cut_axis(name: str) -> int | None:
    """Tell along which axis a tensor is cut over the ranks; None where all have the whole."""
    if ROWS.search(name):
        return 0
    return 1 if COLUMNS.search(name) else None


class MergedShards:
    """The shards of one model-parallel checkpoint, as one file.

    Args:
        files: One per rank, in order.

    Raises:
        UserError: The shards do not fit one another, or cannot be merged without changing what
            the network computes.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files = files
        self.path: Path = files[0].path
        self.stored: dict[str, Stored] = {}
        names = files[0].stored.keys()
        for file in files[1:]:
            if file.stored.keys() != names:
                odd = sorted(file.stored.keys() ^ names)[:5]
                raise UserError(
                    f"{file.path} and {self.path} hold different tensors ({', '.join(odd)}); the "
                    f"shards do not belong together"
                )
        if len(files) > 1 and any(NORMS.search(name) for name in names):
            raise UserError(
                f"{self.path} is one of {len(files)} model-parallel shards with QK-norm. Each rank "
                f"normalised over its own heads only, which one merged network does not do; run it "
                f"with the authors' code on {len(files)} ranks"
            )
        for name in names:
            self.stored[name] = self._whole(name)

    def _whole(self, name: str) -> Stored:
        parts = [file.stored[name] for file in self.files]
        first, axis = parts[0], cut_axis(name)
        if any(part != first for part in parts) or (axis or 0) >= max(len(first.shape), 1):
            raise UserError(f"the shards of {self.path} hold {name} in different shapes or formats")
        if axis is None or not first.shape:
            return first
        shape = list(first.shape)
        shape[axis] *= len(parts)
        return Stored(tuple(shape), first.dtype)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some of the tensors from all shards."""
        names = list(names)
        shards = [file.read(names) for file in self.files]
        return {name: self._merge(name, [shard[name] for shard in shards]) for name in names}

    def _merge(self, name: str, parts: list[Tensor]) -> Tensor:
        axis = cut_axis(name)
        if axis is not None:
            return torch.cat(parts, axis)
        if not all(torch.equal(parts[0], part) for part in parts[1:]):
            raise UserError(f"the shards of {self.path} disagree in {name}, which each has whole")
        return parts[0]
