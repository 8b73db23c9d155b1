"""The attention backend that rope3d finds through the entry-point group `rope3d.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from nextdit_kernels import softmax_attention

__all__ = ["ATTENTION", "TritonAttention"]


class _Case(Protocol):
    """What is read of a `rope3d.AttentionCase`; rope3d itself is not imported."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def scale(self) -> float | tuple[float, ...] | Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...] | None: ...
    @property
    def key_lengths(self) -> tuple[int, ...] | None: ...
    @property
    def key_mask(self) -> Tensor | None: ...


@dataclass(frozen=True)
class TritonAttention:
    """Attend with the Triton kernels; satisfies `rope3d.GatedAttentionBackend`."""

    name: str = "triton"

    def why_not(self, case: _Case) -> str | None:
        """Say why the kernels cannot serve a case, or None if they can.

        Args:
            case: A `rope3d.AttentionCase`.

        Returns:
            A reason that names what is served, or None.
        """
        if case.q.shape[-1] != case.v.shape[-1]:
            return (
                f"head_dim is {case.q.shape[-1]} and value_dim {case.v.shape[-1]}; the kernels "
                "take equal ones"
            )
        if case.key_mask is not None and case.lengths is not None and len(set(case.lengths)) > 1:
            return (
                "queries are packed with different lengths and keys masked; leave the keys out "
                "and pack them, with their lengths"
            )
        return softmax_attention.why_not(case.q, case.k, case.v)

    def attend(self, case: _Case) -> Tensor:
        """Attend as `nextdit_kernels.attention` documents."""
        tensors, options, shape = _arguments(case)
        return softmax_attention.attention(*tensors, **options).view(shape)

    def attend_gated(self, case: _Case, gate: Tensor, out: Tensor) -> Tensor:
        """Attend and add as `nextdit_kernels.gated_cross_attention` documents."""
        tensors, options, shape = _arguments(case)
        rest = out.view(tensors[0].shape) if out.is_contiguous() else out.reshape(tensors[0].shape)
        attend = softmax_attention.gated_cross_attention
        return attend(*tensors, gate, rest, **options).view(shape)


def _arguments(case: _Case) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], torch.Size]:
    """Give the tensors and options of the kernels, and the shape that q had."""
    q, k, v, scale = case.q, case.k, case.v, case.scale
    lengths, key_lengths = case.lengths, case.key_lengths
    if isinstance(scale, tuple):
        scale = _scales(scale, q.device)
    elif isinstance(scale, Tensor):
        scale = scale.to(torch.float32)
    if lengths is not None and key_lengths is None:  # packed queries, dense keys
        if case.key_mask is not None:
            q, lengths = q.unflatten(0, (len(lengths), -1)), None
        else:
            key_lengths = (k.shape[1],) * k.shape[0]
            k, v = k.flatten(0, 1), v.flatten(0, 1)
    options: dict[str, Any] = {
        "lengths": lengths,
        "key_lengths": key_lengths,
        "key_mask": case.key_mask,
        "scale": scale,
    }
    return (q, k, v), options, case.q.shape


@lru_cache(maxsize=256)
def _scales(scales: tuple[float, ...], device: torch.device) -> Tensor:
    """Copy scales to a device, once for equal ones."""
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=torch.float32, device=device)


ATTENTION = TritonAttention()
