"""Flow matching on the straight path from noise to data.

x_t = t·x1 + (1 − t)·x0, and the velocity to learn is x1 − x0.

Source: Lumina-Next (arXiv 2406.18583) §2; Lipman et al. (arXiv 2210.02747), linear path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextdit_core.dataset import TokenDataset
from nextdit_core.flow_model import FlowModel
from nextdit_core.tokens import Tokens
from nextdit_core.training.draws import Draw

__all__ = ["batch_loss"]


def batch_loss(
    model: FlowModel | torch.nn.Module,
    data: TokenDataset,
    indices: Sequence[int],
    draws: Sequence[Draw],
    total_tokens: int,
    device: torch.device,
) -> Tensor:
    """Sum the squared velocity error of some samples, as a share of a global batch.

    Args:
        model: Called as `model(tokens, t, prompts)`.
        data: Where the samples are.
        indices: The samples of this rank.
        draws: What is random about each of them, in the same order.
        total_tokens: Tokens in the whole global batch, over all ranks.
        device: Where to compute.

    Returns:
        Scalar: squared error summed over tokens, averaged over token_dim, divided by
        `total_tokens`. Summed over the ranks it is the batch's mean squared error.
    """
    clean = torch.cat([data.values[i] for i in indices]).to(device)
    noise = torch.cat([draw.noise for draw in draws]).to(device)
    lengths = tuple(len(data.values[i]) for i in indices)
    t = torch.tensor([draw.t for draw in draws], dtype=torch.float32)
    per_token = t.repeat_interleave(torch.tensor(lengths))[:, None].to(device)
    tokens = Tokens(
        per_token * clean + (1 - per_token) * noise,
        torch.cat([data.positions[i] for i in indices]).to(device),
        lengths,
    )
    prompts = [
        "" if draw.drop_caption else data.captions[i]
        for i, draw in zip(indices, draws, strict=True)
    ]
    velocity = model(tokens, t.to(device), prompts)
    error = (velocity.float() - (clean - noise)).square()
    return error.mean(-1).sum() / total_tokens
