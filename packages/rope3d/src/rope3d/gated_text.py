"""GatedText: the second attention of Next-DiT, to the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["GatedText"]


@dataclass(frozen=True, eq=False)
class GatedText:
    """Text that every token attends to besides its own sample, added through a gate.

    out = self attention + tanh(gate) * attention(rotated q, keys, values)

    The text keys are not rotated. The gate is one number per query head, 0 in a new model, so
    that text comes in gradually. The sum is what the output projection takes.

    Args:
        keys: `[samples, text_tokens, kv_heads, head_dim]`, one row per sample, also where the
            queries are packed; or packed `[total_text_tokens, kv_heads, head_dim]`.
        values: As `keys`; the last size is that of the first attention's values.
        gate: `[heads]`, before tanh.
        mask: `[samples, text_tokens]` bool, True = attend, for keys with one row per sample.
        lengths: Text tokens of each sample, numbers on the host, for packed keys.

    Source:
        Lumina-Next, arXiv 2406.18583; Alpha-VLLM/Lumina-T2X, `Attention.forward`. The scale is
        1 / sqrt(head_dim), also where the first attention is scaled proportionally.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor
    mask: Tensor | None = None
    lengths: Sequence[int] | None = None
