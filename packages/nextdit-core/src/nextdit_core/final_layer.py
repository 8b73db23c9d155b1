"""The last layer: from hidden states to the velocity of a token."""

from __future__ import annotations

from torch import Tensor, nn

from nextdit_core.arrangement import owners
from nextdit_core.block_operations import norm_modulate
from nextdit_core.config import NextDiTConfig

__all__ = ["FinalLayer"]


class FinalLayer(nn.Module):
    """Norm, scale (and shift) by the modulation vector, and project to one token's velocity.

    Args:
        config: Of the trunk.
        token_dim: Numbers in one token, where they are not `config.token_dim`.
    """

    def __init__(self, config: NextDiTConfig, token_dim: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.token_dim if token_dim is None else token_dim)
        self.shift = config.final_shift
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.modulation_dim, (1 + self.shift) * config.width)
        )

    def forward(self, hidden: Tensor, modulation: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Give the velocity of tokens.

        Args:
            hidden: `[total_tokens, width]`, as `NextDiT.trunk` gives it.
            modulation: `[batch, modulation_dim]`.
            lengths: Tokens of each sample.

        Returns:
            `[total_tokens, token_dim]`.
        """
        scale = self.adaLN_modulation(modulation)
        if len(set(lengths)) == 1:
            x, scale = hidden.view(len(lengths), lengths[0], -1), scale[:, None]
        else:
            x, scale = hidden[None], scale.index_select(0, owners(lengths, hidden.device))[None]
        if self.shift:
            shift, scale = scale.chunk(2, dim=-1)
            x = norm_modulate(x, None, scale, eps=1e-6, centred=True) + shift
        else:
            x = norm_modulate(x, None, scale, eps=1e-6, centred=True)
        return self.linear(x).flatten(0, 1)
