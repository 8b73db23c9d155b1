"""A text encoder that reads UTF-8 bytes and learns together with the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nextdit_core.conditioning import Conditioning
from nextdit_core.text_encoders.prompts import check_prompts

__all__ = ["ByteTextEncoder"]

START, END, FILL = 256, 257, 258


class ByteTextEncoder(nn.Module):
    """Encode prompts byte by byte; any language, no vocabulary, no download.

    A start and an end symbol frame the bytes, so that the empty prompt has features too.
    Bytes and their places are embedded with unit variance: at DiT's customary 0.02 a small
    model takes several times as many steps before it tells captions apart.

    Args:
        text_dim: Width of the features.
        layers: Transformer layers over the bytes.
        heads: Attention heads; divides `text_dim`.
        max_bytes: Longer prompts are cut to this many bytes, before a character that would
            be torn apart.

    Raises:
        ValueError: A size is below 1, or `heads` does not divide `text_dim`.

    >>> encoder = ByteTextEncoder(text_dim=32, layers=1, heads=2)
    >>> encoder(["seven", ""]).lengths.tolist()
    [7, 2]
    """

    def __init__(
        self, text_dim: int = 64, layers: int = 1, heads: int = 4, max_bytes: int = 256
    ) -> None:
        super().__init__()
        sizes = {"text_dim": text_dim, "layers": layers, "heads": heads, "max_bytes": max_bytes}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if text_dim % heads:
            raise ValueError(f"text_dim {text_dim} is not a multiple of heads {heads}")
        self.text_dim = text_dim
        self.max_bytes = max_bytes
        self.options = sizes
        self.bytes = nn.Embedding(FILL + 1, text_dim)
        self.places = nn.Embedding(max_bytes + 2, text_dim)
        layer = nn.TransformerEncoderLayer(
            text_dim,
            heads,
            dim_feedforward=4 * text_dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(text_dim)

    def symbols(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Frame and pad the bytes of each prompt.

        Args:
            prompts: At least one.

        Returns:
            Symbols `[batch, text_tokens]`, filled up to a multiple of 8 or to the longest that
            there can be, and lengths `[batch]`.

        Raises:
            UserError: See `check_prompts`.
        """
        check_prompts(prompts)
        rows = [[START, *_cut(prompt, self.max_bytes), END] for prompt in prompts]
        width = min(-(-max(map(len, rows)) // 8) * 8, self.max_bytes + 2)
        filled = [row + [FILL] * (width - len(row)) for row in rows]
        return torch.tensor(filled), torch.tensor([len(row) for row in rows])

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts.

        Args:
            prompts: At least one; any text, the empty one included.

        Returns:
            Features `[batch, text_tokens, text_dim]` with lengths.

        Raises:
            UserError: See `check_prompts`.
        """
        device = self.bytes.weight.device
        symbols, on_host = self.symbols(prompts)
        symbols, lengths = symbols.to(device), on_host.to(device)
        places = torch.arange(symbols.shape[1], device=device)
        fill = places >= lengths[:, None]
        hidden = self.bytes(symbols) + self.places(places)
        hidden = self.layers(hidden, src_key_padding_mask=fill)
        return Conditioning(self.norm(hidden), lengths, host_lengths=tuple(on_host.tolist()))


def _cut(prompt: str, limit: int) -> bytes:
    """Take the longest beginning of whole characters that has at most so many bytes."""
    kept = prompt.encode("utf-8")[:limit]
    return kept.decode("utf-8", errors="ignore").encode("utf-8")
