"""A frozen text encoder whose features are computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nextdit_core.conditioning import Conditioning
from nextdit_core.errors import UserError
from nextdit_core.text_encoders import FrozenTextEncoder
from nextdit_core.text_encoders.feature_cache import FeatureCache
from nextdit_core.text_encoders.prompts import check_prompts

__all__ = ["CachedTextEncoder"]

#: Prompts that are encoded together.
BATCH = 32


class CachedTextEncoder(nn.Module):
    """Read features from disk, and compute only those that are not there.

    Once `fill` has seen a dataset's captions, training does not touch the language model, whose
    weights are then not in memory.

    Args:
        encoder: Satisfies `FrozenTextEncoder`.
        folder: See `FeatureCache`.

    Raises:
        UserError: The encoder learns, so that its features do not stay what they are.
    """

    def __init__(self, encoder: nn.Module, folder: str | Path) -> None:
        super().__init__()
        own: Any = encoder
        if not isinstance(own, FrozenTextEncoder) or any(True for _ in encoder.parameters()):
            raise UserError(
                f"{type(encoder).__name__} learns with the backbone, so its features cannot be "
                f"kept; leave text_cache out, or use a frozen one: text_encoder=transformers"
            )
        self.encoder = encoder
        self.folder = folder
        self.text_dim, self.options = own.text_dim, own.options
        self._cache: FeatureCache | None = None

    @property
    def cache(self) -> FeatureCache:
        """The features on disk; the first use reads the encoder's weights through."""
        if self._cache is None:
            self._cache = FeatureCache(self.folder, self._frozen.identity(), self.text_dim)
        return self._cache

    @property
    def _frozen(self) -> FrozenTextEncoder:
        return cast("FrozenTextEncoder", self.encoder)

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Look prompts up, and encode and keep those that are not there.

        Args:
            prompts: At least one.

        Returns:
            Features `[batch, text_tokens, text_dim]` with lengths, where the encoder is.

        Raises:
            UserError: See `check_prompts`; or features cannot be computed or written.
        """
        check_prompts(prompts)
        rows = {prompt: self.cache.read(prompt) for prompt in dict.fromkeys(prompts)}
        rows |= self._make([prompt for prompt, row in rows.items() if row is None])
        return Conditioning.of([cast("Tensor", rows[one]) for one in prompts], self._frozen.device)

    def fill(self, prompts: Iterable[str], *, begin: float = 0.0) -> Iterator[tuple[int, int]]:
        """Encode what is not there yet, and free the encoder's weights at the end.

        Several processes may fill one folder. Each walks all prompts in a circle, from a place
        of its own, and passes by what another has made; so they share the work without waiting
        for one another.

        Args:
            prompts: All that will be asked for.
            begin: Where in the circle to begin, in [0, 1).

        Yields:
            After each batch, how many prompts were passed so far and how many are new.

        Raises:
            UserError: Features cannot be computed or written.
        """
        ordered = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
        batches = [ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH)]
        first = int(begin * len(batches))
        done = made = 0
        try:
            for batch in [*batches[first:], *batches[:first]]:
                missing = [prompt for prompt in batch if prompt not in self.cache]
                self._make(missing)
                done, made = done + len(batch), made + len(missing)
                yield done, made
        finally:
            self._frozen.release()

    def _make(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        for at in range(0, len(prompts), BATCH):
            batch = prompts[at : at + BATCH]
            condition = self._frozen(batch)
            text, lengths = condition.text.cpu(), condition.lengths.tolist()
            for prompt, row, length in zip(batch, text, lengths, strict=True):
                if not bool(torch.isfinite(row[:length]).all()):
                    raise UserError(
                        f"the features of {prompt[:60]!r} are not finite; use a text encoder "
                        f"dtype of 'bfloat16' or 'float32'"
                    )
                rows[prompt] = row[:length].clone()
                self.cache.write(prompt, rows[prompt])
        return rows
