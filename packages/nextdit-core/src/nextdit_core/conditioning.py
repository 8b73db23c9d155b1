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
        host_lengths: The same numbers as `lengths` on the host, for what needs them there, such
            as packed attention, without waiting for a device. None means read from `lengths`
            where these are on the CPU, and otherwise not known.

    Raises:
        ValueError: Shapes do not agree, or a length that the host knows is not in
            [1, text_tokens]: a sample without text has the encoded empty prompt.
    """

    text: Tensor
    lengths: Tensor
    extra: Tensor | None = None
    host_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that the parts agree, as far as that needs no waiting for a device."""
        if self.text.ndim != 3:
            raise ValueError(
                f"text has shape {tuple(self.text.shape)}; expected [batch, text_tokens, text_dim]"
            )
        if self.lengths.shape != self.text.shape[:1]:
            raise ValueError(
                f"lengths have shape {tuple(self.lengths.shape)}; expected [{self.text.shape[0]}]"
            )
        if self.lengths.is_floating_point() or self.lengths.dtype == torch.bool:
            raise ValueError(f"lengths are {self.lengths.dtype}; expected whole numbers, int64")
        known = self.host_lengths
        if _is_readable(self.lengths):
            read = tuple(self.lengths.tolist())
            if known not in (None, read):
                raise ValueError(f"lengths are {read} and host_lengths {known}; expected the same")
            known = read
            object.__setattr__(self, "host_lengths", known)
        if known is None:
            return
        batch, longest = self.text.shape[:2]
        if len(known) != batch or not all(1 <= length <= longest for length in known):
            raise ValueError(
                f"lengths are {known}; expected {batch}, each in [1, {longest}]; a sample without "
                f"text has the encoded empty prompt"
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
        text = text.to(device)
        on_device = torch.tensor(lengths).to(text.device)
        return Conditioning(text, on_device, host_lengths=tuple(lengths))

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
        known = [part.host_lengths for part in parts if part.host_lengths is not None]
        if extra and len(extra) != len(parts):
            raise ValueError("some parts carry an extra vector and some do not; give it to all")
        return Conditioning(
            torch.cat(text),
            torch.cat([part.lengths for part in parts]),
            torch.cat(extra) if extra else None,
            sum(known, ()) if len(known) == len(parts) else None,
        )


def _is_readable(lengths: Tensor) -> bool:
    """Say whether the numbers are at hand: on the CPU, and no stand-ins of a trace."""
    return (
        lengths.device.type == "cpu"
        and type(lengths) is Tensor
        and not torch.compiler.is_compiling()
    )
