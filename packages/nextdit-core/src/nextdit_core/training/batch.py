"""Some samples of a step on their way from noise to data, and the loss of a model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextdit_core.dataset import TokenDataset
from nextdit_core.objective import FlowMatching
from nextdit_core.tokens import Tokens
from nextdit_core.training.draws import Draw

__all__ = ["TrainingBatch", "batch_loss", "make_batch"]


@dataclass(frozen=True)
class TrainingBatch:
    """What a model is called with, and what its answer is compared with.

    Args:
        tokens: x_t.
        t: `[batch]` in [0, 1], 0 = noise.
        prompts: One for each sample; a dropped caption is the empty one.
        data: `[total_tokens, token_dim]`.
        noise: Of the same shape.
        token_t: `[total_tokens, 1]`, the time of each token.
    """

    tokens: Tokens
    t: Tensor
    prompts: list[str]
    data: Tensor
    noise: Tensor
    token_t: Tensor


def make_batch(
    objective: FlowMatching,
    data: TokenDataset,
    indices: Sequence[int],
    draws: Sequence[Draw],
    device: torch.device,
) -> TrainingBatch:
    """Mix data and noise of some samples.

    Args:
        objective: Has the path, and the times that are trained.
        data: Where the samples are.
        indices: The samples.
        draws: What is random about each of them, in the same order.
        device: Where the batch goes.

    Returns:
        The batch.
    """
    clean = _send(torch.cat([data.values[i] for i in indices]), device)
    noise = _send(torch.cat([draw.noise for draw in draws]), device)
    lengths = tuple(len(data.values[i]) for i in indices)
    t = torch.tensor([objective.time(draw.t) for draw in draws], dtype=torch.float32)
    token_t = _send(t.repeat_interleave(torch.tensor(lengths))[:, None], device)
    tokens = Tokens(
        objective.curve.interpolate(clean, noise, token_t),
        _send(torch.cat([data.positions[i] for i in indices]), device),
        lengths,
    )
    prompts = [
        "" if draw.drop_caption else data.captions[i]
        for i, draw in zip(indices, draws, strict=True)
    ]
    return TrainingBatch(tokens, _send(t, device), prompts, clean, noise, token_t)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for what it computes meanwhile."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def batch_loss(
    model: torch.nn.Module, objective: FlowMatching, batch: TrainingBatch, total_tokens: int
) -> Tensor:
    """Sum the weighted squared error of some samples, as a share of a global batch.

    Args:
        model: Called as `model(tokens, t, prompts)`.
        objective: What it is to predict.
        batch: The samples of this rank.
        total_tokens: Tokens in the whole global batch, over all ranks.

    Returns:
        Scalar: squared error summed over tokens, averaged over token_dim, divided by
        `total_tokens`. Summed over the ranks it is the batch's mean squared error.
    """
    predicted = model(batch.tokens, batch.t, batch.prompts).float()
    error = objective.loss(predicted, batch.data, batch.noise, batch.token_t)
    return error.mean(-1).sum() / total_tokens
