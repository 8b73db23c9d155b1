"""The model that is timed, ours and diffusers', with one set of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nextdit_core import NextDiT, NextDiTConfig

#: Sizes of the model on which peers were measured, and of its latents.
WIDTH, LAYERS, HEADS, KV_HEADS, TEXT_DIM, PATCH, CHANNELS = 768, 8, 12, 3, 2048, 2, 4

#: Names of diffusers' layers, and ours.
NAMES = {
    "patch_embedder.proj": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder": "cap_embedder",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
    "norm1.linear": "adaLN_modulation.1",
    "norm1_context": "attention_y_norm",
    "norm1.norm": "attention_norm1",
    ".norm2.": ".attention_norm2.",
    "attn1.to_q": "attention.wq",
    "attn1.to_k": "attention.wk",
    "attn1.to_v": "attention.wv",
    "attn2.to_k": "attention.wk_y",
    "attn2.to_v": "attention.wv_y",
    "attn2.to_out.0": "attention.wo",
    "attn1.norm_q": "attention.q_norm",
    "attn1.norm_k": "attention.k_norm",
    "attn2.norm_k": "attention.ky_norm",
    "feed_forward.linear_": "feed_forward.w",
}


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
    weights: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if name == "pad_token" or ".attn2.to_q." in name or ".attn2.norm_q." in name:
            continue
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if name.endswith(".gate"):
            name = name.replace(".gate", ".attention.gate")
        if name.startswith("final_layer.linear."):
            both = tensor.unflatten(0, (PATCH, PATCH, 2 * CHANNELS))
            tensor = both[:, :, :CHANNELS].flatten(0, 2)
        weights[name] = tensor
    config = NextDiTConfig(
        token_dim=PATCH**2 * CHANNELS,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        text_dim=TEXT_DIM,
    )
    model = NextDiT(config)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def grid(rows: int, columns: int) -> Tensor:
    """Give the positions of a picture's tokens."""
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
    )


def patchify(x: Tensor) -> Tensor:
    """Cut `[batch, channels, height, width]` into tokens, `[batch * tokens, token_dim]`."""
    _, _, height, width = x.shape
    parts = x.unflatten(2, (height // PATCH, PATCH)).unflatten(4, (width // PATCH, PATCH))
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCH**2 * CHANNELS)


def unpatchify(values: Tensor, like: Tensor) -> Tensor:
    """Put tokens together again; the order within a token is that of the output."""
    batch, _, height, width = like.shape
    parts = values.view(batch, height // PATCH, width // PATCH, PATCH, PATCH, CHANNELS)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)
