"""A backbone and the text encoder that it was trained with, as one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nextdit_core.backbone import NextDiT
from nextdit_core.tokens import Tokens

__all__ = ["FlowModel"]


class FlowModel(nn.Module):
    """Prompts and noisy tokens in, velocity out: what is trained, averaged and saved.

    Args:
        backbone: The velocity network.
        text_encoder: Satisfies `TextEncoder`; None for an unconditional backbone.
    """

    def __init__(self, backbone: NextDiT, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder

    def forward(self, tokens: Tokens, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """Predict the velocity, `[total_tokens, token_dim]`, at times t `[batch]`."""
        condition = self.text_encoder(prompts) if self.text_encoder is not None else None
        return self.backbone(tokens, t, condition)
