"""Tokens with positions: the one form in which every modality meets the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """A batch of samples, packed one after another without padding.

    Args:
        values: `[total_tokens, token_dim]`.
        positions: `[total_tokens, 3]`, float: (time or view, row, column) of each token.
        lengths: Tokens of each sample, on the host; they sum to `total_tokens`.

    Raises:
        ValueError: The three do not agree.

    >>> a = Tokens(torch.zeros(4, 2), torch.zeros(4, 3), (4,))
    >>> Tokens.pack([a, a]).cu_seqlens.tolist()
    [0, 4, 8]
    """

    values: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that the parts agree."""
        total = sum(self.lengths)
        if self.values.ndim != 2 or self.values.shape[0] != total:
            raise ValueError(
                f"values have shape {tuple(self.values.shape)}; lengths {self.lengths} need "
                f"[{total}, token_dim]"
            )
        if self.positions.shape != (total, 3):
            raise ValueError(
                f"positions have shape {tuple(self.positions.shape)}; expected [{total}, 3]"
            )

    @property
    def batch(self) -> int:
        """How many samples are packed."""
        return len(self.lengths)

    @property
    def equal_length(self) -> int | None:
        """The length that all samples share, or None where they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def cu_seqlens(self) -> Tensor:
        """`[batch + 1]` int32: where each sample begins, then the total."""
        sums = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return sums.to(self.values.device)

    def with_values(self, values: Tensor) -> Tokens:
        """Give the same layout other values, `[total_tokens, token_dim]`."""
        return replace(self, values=values)

    def split(self) -> tuple[Tensor, ...]:
        """Cut the values back into one `[tokens, token_dim]` per sample."""
        return self.values.split(self.lengths)

    @staticmethod
    def pack(samples: Sequence[Tokens]) -> Tokens:
        """Put several batches into one, in order.

        Args:
            samples: At least one; all of one token_dim.

        Returns:
            The packed batch.

        Raises:
            ValueError: There is nothing to pack.
        """
        if not samples:
            raise ValueError("nothing to pack: samples is empty; give at least one Tokens")
        return Tokens(
            torch.cat([sample.values for sample in samples]),
            torch.cat([sample.positions for sample in samples]),
            tuple(length for sample in samples for length in sample.lengths),
        )
