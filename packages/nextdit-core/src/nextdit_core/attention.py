"""The attention of a block: to the sample itself, and through gates to the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import rope3d
from nextdit_core.arrangement import Arrangement
from nextdit_core.block_operations import norm_rotate
from nextdit_core.config import NextDiTConfig
from nextdit_core.context_drop import Pooling
from nextdit_core.eager_cpu import linear
from nextdit_core.prepared_conditioning import LayerText

#: Softmax scale of the self attention: a number, by token count, or 1/sqrt(head_dim).
Scale = float | Literal["proportional"] | None

__all__ = ["Attention", "AttentionChoice", "Scale"]


@dataclass(frozen=True, eq=False)
class AttentionChoice:
    """How the self attention of every block of one forward works.

    Args:
        rotation: Of every token, in the rows of the hidden tensor.
        scale: Softmax scale.
        trained_tokens: Tokens per sample at training, for "proportional".
        pooling: Of keys and values, or None.
    """

    rotation: rope3d.Rotation
    scale: Scale = None
    trained_tokens: int | None = None
    pooling: Pooling | None = None


class Attention(nn.Module):
    """Self attention with rotary q and k, plus gated attention to text keys.

    out = wo( self + tanh(gate) · cross ), the gate per head and zero at the start; the text
    keys are not rotated and are attended by the same rotated queries.
    """

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.keys_heads
        self.head_dim = config.head_dim
        width, kv_width = config.width, self.kv_heads * config.head_dim

        def norm(size: int) -> nn.Module:
            return nn.LayerNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_width, bias=False)
        self.wv = nn.Linear(width, kv_width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = norm(width), norm(kv_width)
        if config.text_dim is not None:
            self.wk_y = nn.Linear(config.text_dim, kv_width, bias=False)
            self.wv_y = nn.Linear(config.text_dim, kv_width, bias=False)
            self.ky_norm = norm(kv_width)
            self.gate = nn.Parameter(torch.zeros(self.heads))

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Project `[batch, text_tokens, text_dim]` to keys and values of this layer."""
        shape = (*text.shape[:2], self.kv_heads, self.head_dim)
        keys = self.ky_norm(self.wk_y(text)).view(shape)
        return keys, self.wv_y(text).view(shape)

    def forward(
        self,
        x: Tensor,
        arrangement: Arrangement,
        choice: AttentionChoice,
        text: LayerText | None,
    ) -> Tensor:
        """Attend within each sample of `[rows, tokens, width]`."""
        rows, tokens, _ = x.shape
        q = linear(self.wq, x).view(rows, tokens, self.heads, self.head_dim)
        k = linear(self.wk, x).view(rows, tokens, self.kv_heads, self.head_dim)
        v = linear(self.wv, x).view(rows, tokens, self.kv_heads, self.head_dim)
        q, k = self._norm_rotate(q, k, choice.rotation)
        second = None
        if text is not None:
            second = rope3d.GatedText(
                text.keys, text.values, self.gate, mask=text.mask, lengths=text.lengths
            )
        lengths, key_lengths, pooling = arrangement.lengths, None, choice.pooling
        if pooling is not None:
            q, k, v = q.flatten(0, 1), pooling(k.flatten(0, 1)), pooling(v.flatten(0, 1))
            lengths = lengths or (tokens,) * rows
            key_lengths = pooling.lengths
            packed_text = text is not None and text.lengths is not None
            if len(set(lengths)) == len(set(key_lengths)) == 1 and not packed_text:
                # Dense attention is quicker.
                q, k, v = (part.unflatten(0, (len(lengths), -1)) for part in (q, k, v))
                lengths = key_lengths = None
        elif lengths is not None:
            q, k, v = q[0], k[0], v[0]
        out = rope3d.attention(
            q,
            k,
            v,
            lengths=lengths,
            key_lengths=key_lengths,
            key_mask=arrangement.key_mask,
            scale=choice.scale,
            trained_tokens=choice.trained_tokens,
            text=second,
            # With normed q and k the error of a whole forward stays below diffusers' in bfloat16.
            rounded_scores=isinstance(self.q_norm, nn.LayerNorm),
        )
        return linear(self.wo, out.reshape(rows, tokens, -1))

    def _norm_rotate(
        self, q: Tensor, k: Tensor, rotation: rope3d.Rotation
    ) -> tuple[Tensor, Tensor]:
        """Normalise over all heads of a token where the configuration says so, and rotate."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if not (isinstance(q_norm, nn.LayerNorm) and isinstance(k_norm, nn.LayerNorm)):
            return rope3d.rotate(q, k, rotation)
        norms = (q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias)
        return norm_rotate(q, k, rotation, *norms, eps=q_norm.eps)
