"""The layout of diffusers' `LuminaNextDiT2DModel`.

The authors' tensors under other names. Queries and their norm are stored twice, for attention to
the picture and to the text; they are one here. Training in diffusers lets the twins drift apart,
and then no single query projection computes what the two do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nextdit_core.checkpoints import authors
from nextdit_core.checkpoints.authors import Variant, halves_equal
from nextdit_core.checkpoints.mapping import Derived
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["CLASS", "authors_shapes", "config_values", "read_config", "reading", "writing"]

CLASS = "LuminaNextDiT2DModel"

#: Beginnings of names, theirs by the authors'; a pair for what diffusers stores twice.
NAMES: dict[str, tuple[str, ...]] = {
    "pad_token": ("pad_token",),
    "x_embedder": ("patch_embedder.proj",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "cap_embedder": ("time_caption_embed.caption_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "attention.gate": ("gate",),
    "attention.wq": ("attn1.to_q", "attn2.to_q"),
    "attention.q_norm": ("attn1.norm_q", "attn2.norm_q"),
    "attention.wk": ("attn1.to_k",),
    "attention.wv": ("attn1.to_v",),
    "attention.k_norm": ("attn1.norm_k",),
    "attention.wk_y": ("attn2.to_k",),
    "attention.wv_y": ("attn2.to_v",),
    "attention.ky_norm": ("attn2.norm_k",),
    "attention.wo": ("attn2.to_out.0",),
    "attention_norm1": ("norm1.norm",),
    "attention_norm2": ("norm2",),
    "attention_y_norm": ("norm1_context",),
    "ffn_norm1": ("ffn_norm1",),
    "ffn_norm2": ("ffn_norm2",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}


def diffusers_names(name: str) -> tuple[str, ...]:
    """Give the one or two names that diffusers has for one of the authors'."""
    layer = re.match(r"layers\.\d+\.", name)
    head = layer.group(0) if layer else ""
    table = LAYER_NAMES if layer else NAMES
    rest = name.removeprefix(head)
    stem = rest
    while stem not in table:
        stem, dot, _ = stem.rpartition(".")
        if not dot:
            raise KeyError(name)
    return tuple(head + other + rest.removeprefix(stem) for other in table[stem])


def authors_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Give shapes under the authors' names; names that nothing answers to are left out."""
    back: dict[str, str] = {}
    for stem, others in (NAMES | LAYER_NAMES).items():
        back[others[0]] = stem
    found = {}
    for name, shape in shapes.items():
        layer = re.match(r"layers\.\d+\.", name)
        head = layer.group(0) if layer else ""
        rest = name.removeprefix(head)
        stem = rest
        while stem and stem not in back:
            stem = stem.rpartition(".")[0]
        if stem:
            found[head + back[stem] + rest.removeprefix(stem)] = shape
    return found


def reading(config: NextDiTConfig, variant: Variant) -> dict[str, Derived]:
    """Make our tensors of theirs.

    Raises:
        UserError: By a `make`: the twins differ.
    """
    plan = {}
    for name, derived in authors.reading(config, variant).items():
        (source,) = derived.sources
        sources = diffusers_names(source)
        plan[name] = Derived(sources, _merged(derived, sources) if sources[1:] else derived.make)
    return plan


def _merged(derived: Derived, sources: tuple[str, ...]) -> Any:
    def make(first: Tensor, second: Tensor) -> Tensor:
        if not halves_equal(first, second):
            away = (first.float() - second.float()).abs().max()
            raise UserError(
                f"{sources[0]} and {sources[1]} differ by up to {away:.3g}. Next-DiT has one "
                f"query projection; diffusers stores it twice and trains the copies apart, so this "
                f"fine-tuned model is no Next-DiT any more and cannot be read without changing "
                f"what it computes. Fine-tune the backbone of this package, or tie the copies"
            )
        return derived.make(first)

    return make


def writing(config: NextDiTConfig, variant: Variant) -> dict[str, Derived]:
    """Make their tensors of ours."""
    plan: dict[str, Derived] = {}
    for name, derived in authors.writing(config, variant).items():
        first, *twins = diffusers_names(name)
        # Files do not share memory between tensors, so a twin is a copy.
        plan |= {first: derived, **{twin: Derived(derived.sources, torch.clone) for twin in twins}}
    return plan


def read_config(values: Mapping[str, Any]) -> tuple[NextDiTConfig, int]:
    """Read the sizes and the patch size from diffusers' config.json.

    Raises:
        UserError: Something is missing or does not fit.
    """
    try:
        patch_size, channels = values["patch_size"], values["in_channels"]
        if not (isinstance(patch_size, int) and isinstance(channels, int)):
            raise UserError("patch_size and in_channels of config.json are not whole numbers")
        config = NextDiTConfig.from_dict(
            {
                "token_dim": patch_size**2 * channels if 0 < patch_size < 1024 else 0,
                "axes": 2,
                "width": values["hidden_size"],
                "layers": values["num_layers"],
                "heads": values["num_attention_heads"],
                "kv_heads": values.get("num_kv_heads"),
                "text_dim": values["cross_attention_dim"],
                "multiple_of": values["multiple_of"],
                "ffn_dim_multiplier": values.get("ffn_dim_multiplier"),
                "norm_eps": values["norm_eps"],
                "qk_norm": values["qk_norm"],
            }
        )
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; it was changed or is damaged") from error
    authors.check_expressible(config, patch_size)
    return config, patch_size


def config_values(config: NextDiTConfig, variant: Variant) -> dict[str, Any]:
    """Give diffusers' config.json of a backbone."""
    return {
        "_class_name": CLASS,
        "cross_attention_dim": config.text_dim,
        "ffn_dim_multiplier": config.ffn_dim_multiplier,
        "hidden_size": config.width,
        "in_channels": config.token_dim // variant.patch_size**2,
        "learn_sigma": variant.learn_sigma,
        "multiple_of": config.multiple_of,
        "norm_eps": config.norm_eps,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.keys_heads,
        "num_layers": config.layers,
        "patch_size": variant.patch_size,
        "qk_norm": config.qk_norm,
        "sample_size": variant.sample_size,
        "scaling_factor": 1.0,
    }
