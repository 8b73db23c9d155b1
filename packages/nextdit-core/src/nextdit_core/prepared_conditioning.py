"""What of a request depends neither on t nor on x, computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerText", "PreparedConditioning"]


@dataclass(frozen=True, eq=False)
class LayerText:
    """The text as one layer attends to it.

    Args:
        keys: `[batch, text_tokens, kv_heads, head_dim]`, normed, or packed
            `[total_text_tokens, kv_heads, head_dim]`.
        values: As `keys`.
        mask: `[batch, text_tokens]` bool where they are not packed; None where all is text.
        lengths: Text tokens of each sample, on the host, where they are packed.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class PreparedConditioning:
    """Everything of a request that depends neither on t nor on x, computed once.

    Args:
        vector: `[batch, modulation_dim]` added to the timestep embedding, or None.
        text_keys: Per layer `[batch, text_tokens, kv_heads, head_dim]`, normed; in the packed form
            `[total_text_tokens, kv_heads, head_dim]`. None without text.
        text_values: Per layer, same shape.
        mask: `[batch, text_tokens]` bool, or None: without text, in the packed form, and where
            every row is full.
        lengths: Text tokens of each sample, on the host, where they are known there.
        packed: Whether the text is in the packed form.
    """

    vector: Tensor | None
    text_keys: tuple[Tensor, ...] = ()
    text_values: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    packed: bool = False

    @property
    def batch(self) -> int | None:
        """Samples, or None where nothing tells."""
        if self.packed and self.lengths is not None:
            return len(self.lengths)
        if self.text_keys:
            return self.text_keys[0].shape[0]
        return None if self.vector is None else self.vector.shape[0]

    def layer(self, index: int) -> LayerText | None:
        """Give what one layer attends to, or None without text."""
        if not self.text_keys:
            return None
        lengths = self.lengths if self.packed else None
        return LayerText(self.text_keys[index], self.text_values[index], self.mask, lengths)

    @property
    def in_one_row(self) -> PreparedConditioning:
        """The packed form, which packed samples attend to without a mask; gathered once.

        Where the lengths are known on the device only, the same object: its mask then serves, and
        nothing waits.
        """
        if self.packed or not self.text_keys or self.lengths is None:
            return self
        if torch.compiler.is_compiling():
            return self._gathered(self.lengths)
        kept = vars(self)  # not `cached_property`, whose lock no compiler enters
        if "_in_one_row" not in kept:
            kept["_in_one_row"] = self._gathered(self.lengths)
        return kept["_in_one_row"]

    def _gathered(self, lengths: tuple[int, ...]) -> PreparedConditioning:
        longest = self.text_keys[0].shape[1]
        real = [
            sample * longest + token
            for sample, length in enumerate(lengths)
            for token in range(length)
        ]
        places = torch.tensor(real, device=self.text_keys[0].device)

        def gather(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1).index_select(0, places)

        return PreparedConditioning(
            self.vector,
            tuple(gather(keys) for keys in self.text_keys),
            tuple(gather(values) for values in self.text_values),
            None,
            lengths,
            packed=True,
        )

    def first(self, count: int) -> PreparedConditioning:
        """Take the first samples of a batch."""
        lengths = None if self.lengths is None else self.lengths[:count]
        rows = sum(lengths) if self.packed and lengths is not None else count
        return PreparedConditioning(
            None if self.vector is None else self.vector[:count],
            tuple(keys[:rows] for keys in self.text_keys),
            tuple(values[:rows] for values in self.text_values),
            None if self.mask is None else self.mask[:count],
            lengths,
            self.packed,
        )
