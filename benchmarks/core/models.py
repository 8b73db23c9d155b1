"""The model that is timed, ours and diffusers', with one set of weights."""

from __future__ import annotations

import math
import tempfile

import torch
from torch import Tensor, nn

from nextdit_core import NextDiT

#: Sizes of the model on which peers were measured, and of its latents.
WIDTH, LAYERS, HEADS, KV_HEADS, TEXT_DIM, PATCH, CHANNELS = 768, 8, 12, 3, 2048, 2, 4


def diffusers_model(seed: int = 0) -> nn.Module:
    """Make diffusers' model with random weights, none of them zero."""
    import diffusers

    model = diffusers.LuminaNextDiT2DModel(
        sample_size=64,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_kv_heads=KV_HEADS,
        multiple_of=256,
        cross_attention_dim=TEXT_DIM,
        learn_sigma=True,
    ).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=random) * size)
        for block in model.layers:
            block.attn2.to_q.load_state_dict(block.attn1.to_q.state_dict())
            block.attn2.norm_q.load_state_dict(block.attn1.norm_q.state_dict())
    return model.requires_grad_(False)


def our_model(theirs: nn.Module) -> NextDiT:
    """Give ours the weights of diffusers'."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return NextDiT.from_pretrained(folder).requires_grad_(False)


def grid(rows: int, columns: int) -> Tensor:
    """Give the positions of a picture's tokens."""
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
    )


def patchify(x: Tensor) -> Tensor:
    """Cut `[batch, channels, height, width]` into tokens, `[batch * tokens, token_dim]`."""
    _, _, height, width = x.shape
    parts = x.unflatten(2, (height // PATCH, PATCH)).unflatten(4, (width // PATCH, PATCH))
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(-1, PATCH**2 * CHANNELS)


def unpatchify(values: Tensor, like: Tensor) -> Tensor:
    """Put tokens together again."""
    batch, _, height, width = like.shape
    parts = values.view(batch, height // PATCH, width // PATCH, PATCH, PATCH, CHANNELS)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)
