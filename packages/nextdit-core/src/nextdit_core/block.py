"""One block of the backbone."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from nextdit_core.arrangement import Arrangement
from nextdit_core.attention import Attention, AttentionChoice
from nextdit_core.block_operations import gate_residual, norm_modulate
from nextdit_core.config import NextDiTConfig
from nextdit_core.experts import SpaceExperts, TimeExperts
from nextdit_core.feed_forward import FeedForward
from nextdit_core.prepared_conditioning import LayerText

__all__ = ["Block"]


class Block(nn.Module):
    """One sandwich-normed block.

    x ← x + tanh(gate_a) · RMS2( Attn( RMS1(x) · (1 + scale_a) ) )
    x ← x + tanh(gate_f) · RMS2( FFN( RMS1(x) · (1 + scale_f) ) )

    Scales and gates come from the modulation vector through a zero-initialised linear layer,
    so that a new block is the identity. With experts of time and of space the second line is there
    twice, first for those of time, each with norms, scales and gates of its own.
    """

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        width, self.eps = config.width, config.norm_eps

        def norm(size: int) -> nn.RMSNorm:
            return nn.RMSNorm(size, eps=config.norm_eps)

        self.attention = Attention(config)
        #: What follows `feed_forward` and `ffn_norm` in the names of each feed-forward sublayer.
        self.kinds = ("_time", "_space") if config.both_experts else ("",)
        for kind in self.kinds:
            setattr(self, f"feed_forward{kind}", _feed_forward(config, kind))
        self.attention_norm1, self.attention_norm2 = norm(width), norm(width)
        for kind in self.kinds:
            setattr(self, f"ffn_norm{kind}1", norm(width))
            setattr(self, f"ffn_norm{kind}2", norm(width))
        if config.text_dim is not None:
            self.attention_y_norm = norm(config.text_dim)
        parts = 2 + 2 * len(self.kinds)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.modulation_dim, parts * width)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        time: Tensor,
        arrangement: Arrangement,
        choice: AttentionChoice,
        text: LayerText | None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: `[rows, tokens, width]`.
            modulation: `[batch, modulation_dim]`.
            time: `[batch, modulation_dim]`, the timestep embedding, by which experts are chosen.
            arrangement: Where the samples are in x.
            choice: Of the attention.
            text: Keys and values of this layer.

        Returns:
            As x.
        """
        parts = arrangement.spread(self.adaLN_modulation(modulation))
        scale, gate, *others = parts.chunk(2 + 2 * len(self.kinds), dim=-1)
        attended = self.attention(
            norm_modulate(x, self.attention_norm1.weight, scale, eps=self.eps),
            arrangement,
            choice,
            text,
        )
        x = gate_residual(x, attended, self.attention_norm2.weight, gate, eps=self.eps)
        for kind, scale, gate in zip(self.kinds, others[::2], others[1::2], strict=True):
            before = cast("nn.RMSNorm", getattr(self, f"ffn_norm{kind}1"))
            after = cast("nn.RMSNorm", getattr(self, f"ffn_norm{kind}2"))
            layer = getattr(self, f"feed_forward{kind}")
            hidden = norm_modulate(x, before.weight, scale, eps=self.eps)
            by_time = (time, arrangement) if isinstance(layer, TimeExperts) else ()
            x = gate_residual(x, layer(hidden, *by_time), after.weight, gate, eps=self.eps)
        return x


def _feed_forward(config: NextDiTConfig, kind: str) -> nn.Module:
    """Make the layer that a name ending stands for."""
    width, hidden, chosen = config.width, config.ffn_width, config.experts_per_token
    if config.time_experts and kind != "_space":
        return TimeExperts(
            width,
            hidden,
            experts=config.time_experts,
            chosen=chosen,
            time_dim=config.modulation_dim,
        )
    if config.space_experts:
        return SpaceExperts(width, hidden, experts=config.space_experts, chosen=chosen)
    return FeedForward(width, hidden)
