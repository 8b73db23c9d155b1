"""Attention written out: the definition that every other backend is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rope3d.attention_case import AttentionCase

__all__ = ["WRITTEN_OUT", "WrittenOut"]


@dataclass(frozen=True)
class WrittenOut:
    """Scores, softmax and weighted sum in float32 or wider, holding all the scores at once."""

    name: str = "reference"

    def why_not(self, case: AttentionCase) -> str | None:
        """Refuse only tensors that hold no real floating-point numbers."""
        if case.q.dtype.is_floating_point:
            return None
        return f"q is {case.q.dtype}; attention needs floating point"

    def attend(self, case: AttentionCase) -> Tensor:
        """Attend sample by sample."""
        q, scale = case.scaled_queries()
        if case.dense:
            return _attend(q, case.k, case.v, case.key_mask, scale)
        lengths = case.lengths or ()
        queries = q.split(lengths)
        if case.key_lengths is None:
            keys, values = case.k.unbind(), case.v.unbind()
        else:
            keys, values = case.k.split(case.key_lengths), case.v.split(case.key_lengths)
        masks = (None,) * len(lengths) if case.key_mask is None else case.key_mask.split(1)
        parts = [
            _attend(q_i[None], k_i[None], v_i[None], mask, scale)[0]
            for q_i, k_i, v_i, mask in zip(queries, keys, values, masks, strict=True)
        ]
        return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], case.v.shape[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads = k.shape[2]
    # Query heads that share a key head stand beside one another: K and V are not repeated.
    grouped = q.to(dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    keys = k.to(dtype).permute(0, 2, 3, 1).unsqueeze(2)
    values = v.to(dtype).transpose(1, 2).unsqueeze(2)
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * (grouped @ keys)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, None], -torch.inf)
        weights = scores.softmax(-1)
        if mask is not None:  # a query without keys gets 0, not 0 / 0
            weights = weights.masked_fill(~mask.any(-1)[:, None, None, None, None], 0.0)
        out = weights @ values
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


WRITTEN_OUT = WrittenOut()
