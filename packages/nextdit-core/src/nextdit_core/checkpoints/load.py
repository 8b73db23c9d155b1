"""Read a backbone, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nextdit_core.backbone import NextDiT
from nextdit_core.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nextdit_core.checkpoints.feed_forwards import ExpertsBy
from nextdit_core.checkpoints.mapping import Derived, convert, described
from nextdit_core.checkpoints.tensor_files import Weights
from nextdit_core.errors import UserError

__all__ = ["load_backbone", "read_backbone"]

#: Bytes that are mapped at a time; what is mapped counts as memory in use until it is let go.
MAPPED_AT_ONCE = 16 << 20


def load_backbone(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
    patch_size: int | None = None,
    heads: int | None = None,
    experts_by: ExpertsBy | None = None,
) -> NextDiT:
    """Load a backbone from disk, in any layout; see `NextDiT.from_pretrained`."""
    checkpoint = open_checkpoint(
        path, ema=ema, patch_size=patch_size, heads=heads, experts_by=experts_by
    )
    return read_backbone(checkpoint, dtype=dtype, device=device)


def read_backbone(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> NextDiT:
    """Read the weights of a checkpoint that was opened.

    Beside the weights at their destination, a few tensors are in memory at any time: the backbone
    is described on the `meta` device, the files are mapped, and what was copied is let go.

    Args:
        checkpoint: The checkpoint.
        dtype: What the weights become; as stored when None.
        device: Where they go.

    Returns:
        The backbone in evaluation mode.

    Raises:
        UserError: A file is damaged, a weight is not finite, or the layout cannot be followed
            (diffusers' twin projections differ).
    """
    model = described(checkpoint.config)
    for some in _portions(checkpoint.plan, checkpoint.weights):
        sources = {source for derived in some.values() for source in derived.sources}
        mapped = checkpoint.weights.read(sources)
        copied = {
            name: _checked(name, _copy(tensor, dtype, device), checkpoint.place)
            for name, tensor in convert(mapped, some).items()
        }
        del mapped
        model.load_state_dict(copied, strict=False, assign=True)
    return model.eval()


def _portions(plan: Mapping[str, Derived], weights: Weights) -> Iterator[dict[str, Derived]]:
    """Cut a plan into parts whose sources are about as large as what may be mapped at once."""
    portion: dict[str, Derived] = {}
    size = 0
    for name, derived in plan.items():
        needed = sum(weights.stored[source].bytes for source in derived.sources)
        if portion and size + needed > MAPPED_AT_ONCE:
            yield portion
            portion = dict[str, Derived]()
            size = 0
        portion[name] = derived
        size += needed
    yield portion


def _copy(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _checked(name: str, tensor: Tensor, place: Path) -> Tensor:
    # Unlike isfinite(), the extremes need no temporaries; a NaN is both of them.
    if not tensor.is_meta and not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(
            f"{name} in {place} is not finite in {tensor.dtype}: the file is damaged, or the "
            f"weight needs a wider range, such as dtype=torch.bfloat16 or float32"
        )
    return tensor
