"""AttentionCase: one attention to carry out, as every backend receives it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["AttentionCase", "boundaries", "on_device"]


@dataclass(frozen=True, eq=False)
class AttentionCase:
    """Queries, keys and values whose shapes fit, and who attends to whom.

    Three forms: dense, `[batch, tokens, heads, head_dim]`; packed, `[total_tokens, heads,
    head_dim]` with `lengths` and `key_lengths`; and packed queries with dense keys, one row of keys
    per sample, with `lengths` alone.

    Args:
        q: Queries, already rotated.
        k: Keys, already rotated, with kv_heads that divide the heads of q.
        v: Values; the last size may differ from that of k.
        scale: Factor on the scores: one number; one per sample, on the host; or float32
            `[samples]` on the device of q.
        lengths: Tokens of each sample, where q is packed.
        key_lengths: Keys of each sample, where k and v are packed.
        key_mask: `[samples, keys]` bool, True = attend, where k and v are dense; or None.
        rounded_scores: Whether scores may be rounded to the dtype of q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | tuple[float, ...] | Tensor
    lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    key_mask: Tensor | None = None
    rounded_scores: bool = False

    @property
    def dense(self) -> bool:
        """Whether queries and keys are both dense."""
        return self.q.ndim == 4

    @property
    def packed(self) -> bool:
        """Whether queries and keys are both packed."""
        return self.k.ndim == 3

    @property
    def needs_gradient(self) -> bool:
        """Whether autograd records this attention."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbouring packed samples of equal lengths and scale: (first, last + 1) of each run."""
        assert self.lengths is not None
        runs: list[tuple[int, int]] = []
        for sample in range(len(self.lengths)):
            if sample and self._size(sample) == self._size(sample - 1):
                runs[-1] = (runs[-1][0], sample + 1)
            else:
                runs.append((sample, sample + 1))
        return runs

    def _size(self, sample: int) -> tuple[int, int, float]:
        assert self.lengths is not None
        keys = self.k.shape[1] if self.key_lengths is None else self.key_lengths[sample]
        scale = self.scale[sample] if isinstance(self.scale, tuple) else 0.0
        return self.lengths[sample], keys, scale

    def scaled_queries(self) -> tuple[Tensor, float]:
        """Put scales that differ between samples on the queries.

        Returns:
            Queries in their dtype, and the one factor that remains on the scores.
        """
        scale = self.scale
        if not isinstance(scale, (tuple, Tensor)):
            return self.q, scale
        rest = self.q.shape[-1] ** -0.5
        if isinstance(scale, tuple):
            scale = on_device(scale, torch.float32, self.q.device)
        growth = scale.to(torch.float32) / rest
        if self.lengths is None:
            growth = growth[:, None, None, None]
        else:
            lengths = on_device(self.lengths, torch.int64, self.q.device)
            growth = growth.repeat_interleave(lengths, output_size=self.q.shape[0])[:, None, None]
        return (self.q * growth).to(self.q.dtype), rest


def boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Give where each sample begins, and the end: `[samples + 1]` int32, kept on the device.

    >>> boundaries((4, 3), torch.device("cpu")).tolist()
    [0, 4, 7]
    """
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return on_device(tuple(ends), torch.int32, device)


def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers of the host to a device, once for equal ones; do not write to the result."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _copied(numbers, dtype, device)


@lru_cache(maxsize=256)
def _copied(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not serve a later backward
        return torch.tensor(numbers, dtype=dtype, device=device)
