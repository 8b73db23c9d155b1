"""What a sample is conditioned on: text features and, where a modality needs it, one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Conditioning"]


@dataclass(frozen=True)
class Conditioning:
    """Text features of a batch, with the number of real tokens of each sample.

    Args:
        text: `[batch, text_tokens, text_dim]`; rows past a sample's length are ignored.
        lengths: `[batch]` int64, each in [1, text_tokens].
        extra: `[batch, modulation_dim]` added to the timestep embedding (class label,
            camera azimuth, ...), or None.

    Raises:
        ValueError: Shapes do not agree.
    """

    text: Tensor
    lengths: Tensor
    extra: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the parts agree."""
        if self.text.ndim != 3:
            raise ValueError(
                f"text has shape {tuple(self.text.shape)}; expected [batch, text_tokens, text_dim]"
            )
        if self.lengths.shape != self.text.shape[:1]:
            raise ValueError(
                f"lengths have shape {tuple(self.lengths.shape)}; expected [{self.text.shape[0]}]"
            )

    @property
    def mask(self) -> Tensor:
        """`[batch, text_tokens]` bool, True at a real text token."""
        steps = torch.arange(self.text.shape[1], device=self.text.device)
        return steps < self.lengths[:, None]

    def pooled(self) -> Tensor:
        """Average the features over each sample's real tokens: `[batch, text_dim]`, float32."""
        mask = self.mask[..., None].float()
        return (self.text.float() * mask).sum(1) / mask.sum(1).clamp(min=1.0)

    @staticmethod
    def of(rows: Sequence[Tensor], device: torch.device | None = None) -> Conditioning:
        """Fill up the features of several prompts with zeros to one batch.

        Args:
            rows: At least one, `[tokens, text_dim]` each, of any lengths from 1.
            device: Where the batch goes; where the rows are when None.

        Returns:
            A batch, in order, `text_tokens` a multiple of 8.
        """
        lengths = [len(row) for row in rows]
        width = -(-max(lengths) // 8) * 8
        text = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
        for place, row in zip(text, rows, strict=True):
            place[: len(row)] = row
        return Conditioning(text.to(device), torch.tensor(lengths).to(text.device).to(device))

    @staticmethod
    def stack(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches, filling up to the longest text.

        Args:
            parts: At least one; either all or none carry `extra`.

        Returns:
            One batch, in order.
        """
        longest = max(part.text.shape[1] for part in parts)
        text = [
            torch.nn.functional.pad(part.text, (0, 0, 0, longest - part.text.shape[1]))
            for part in parts
        ]
        extra = [part.extra for part in parts if part.extra is not None]
        if extra and len(extra) != len(parts):
            raise ValueError("some parts carry an extra vector and some do not; give it to all")
        return Conditioning(
            torch.cat(text),
            torch.cat([part.lengths for part in parts]),
            torch.cat(extra) if extra else None,
        )
