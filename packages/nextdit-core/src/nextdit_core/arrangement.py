"""How the samples of a batch lie in the rows of a hidden tensor: dense, packed or padded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nextdit_core.tokens import Tokens

__all__ = ["Arrangement", "arrange", "owners"]


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where each token of a batch is in a hidden tensor `[rows, tokens, width]`.

    Dense: one row per sample, all of one length. Packed: one row, the samples one after another.
    Padded: one row per sample, filled up.

    Args:
        rows: Rows of the hidden tensor.
        tokens: Tokens in a row.
        lengths: Packed only: tokens of each sample, on the host.
        owner: Packed only: `[total_tokens]` int64, the sample of each token.
        key_mask: Padded only: `[batch, tokens]` bool, True at a real token.
        places: Padded only: `[total_tokens]` int64, where each token is among all places.
    """

    rows: int
    tokens: int
    lengths: tuple[int, ...] | None = None
    owner: Tensor | None = None
    key_mask: Tensor | None = None
    places: Tensor | None = None

    def place(self, values: Tensor) -> Tensor:
        """Put `[total_tokens, size]` in rows, `[rows, tokens, size]`; zeros fill them up."""
        if self.places is not None:
            rows = values.new_zeros(self.rows * self.tokens, values.shape[-1])
            values = rows.index_copy(0, self.places, values)
        return values.view(self.rows, self.tokens, -1)

    def take(self, x: Tensor) -> Tensor:
        """Take `[total_tokens, size]` out of rows."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def spread(self, vectors: Tensor) -> Tensor:
        """Give one vector per sample, `[batch, size]`, the form that broadcasts over the rows."""
        if self.owner is None:
            return vectors[:, None]
        return vectors.index_select(0, self.owner)[None]


def arrange(tokens: Tokens, *, pack: bool = False, pad_to: int | None = None) -> Arrangement:
    """Choose how a batch lies in rows.

    Nothing waits for a device. What depends on the lengths alone is copied to it the first time and
    kept for equal lengths, so that later steps of a request copy nothing.

    Args:
        tokens: The batch.
        pack: Pack samples of one length too, which are dense otherwise.
        pad_to: Pad to rows of as many tokens.

    Returns:
        The arrangement.

    Raises:
        ValueError: A sample has more than `pad_to` tokens.

    >>> arrange(Tokens(torch.zeros(5, 2), torch.zeros(5, 3), (2, 3))).owner
    tensor([0, 0, 1, 1, 1])
    """
    lengths, device = tokens.lengths, tokens.values.device
    if pad_to is not None:
        longest = max(lengths)
        if longest > pad_to:
            raise ValueError(
                f"pad_to is {pad_to}, and a sample has {longest} tokens; expected at least as many"
            )
        steps = torch.arange(pad_to, device=device)
        mask = steps < _counts(lengths, device)[:, None]
        owner = owners(lengths, device)
        # A token is as many places on as there are filling ones in the rows before its own.
        shifts = _shifts(lengths, pad_to, device).index_select(0, owner)
        places = torch.arange(len(owner), device=device) + shifts
        return Arrangement(len(lengths), pad_to, key_mask=mask, places=places)
    equal = tokens.equal_length
    if equal is not None and not pack:
        return Arrangement(len(lengths), equal)
    return Arrangement(1, sum(lengths), lengths, owners(lengths, device))


def owners(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Say to which sample each packed token belongs: `[total_tokens]` int64.

    >>> owners((1, 2), torch.device("cpu"))
    tensor([0, 1, 1])
    """
    counts = _counts(lengths, device)
    samples = torch.arange(len(lengths), device=device)
    # Knowing the total, no device has to be waited for.
    return samples.repeat_interleave(counts, output_size=sum(lengths))


def _counts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _on_device(lengths, device)


def _shifts(lengths: tuple[int, ...], pad_to: int, device: torch.device) -> Tensor:
    total = 0
    shifts: list[int] = []
    for sample, length in enumerate(lengths):
        shifts.append(sample * pad_to - total)
        total += length
    return _on_device(tuple(shifts), device)


def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy numbers of the host to a device, once for equal ones."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    return _copied(numbers, device)


@lru_cache(maxsize=256)
def _copied(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not serve a later backward
        return torch.tensor(numbers, device=device)
