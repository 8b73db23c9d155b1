"""The layouts of the class-conditional Next-DiT: Next-DiT-ImageNet, and with experts Next-DiT-MoE.

The norm before a sublayer has no weights there, and the one behind it, which does, is called
`attention_norm` and `ffn_norm`; in the text-to-image form these are `attention_norm2` and
`ffn_norm2`. The final layer shifts as well as scales, and a table of labels takes the place of
text.

Source: Alpha-VLLM/Lumina-T2X, Next-DiT-ImageNet/models/models.py and Next-DiT-MoE/models.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor

from nextdit_core.checkpoints.authors import INPUT, OUTPUT, Variant, check_patches
from nextdit_core.checkpoints.mapping import Derived, own_tensors, same
from nextdit_core.checkpoints.token_order import (
    add_sigma,
    channels_first,
    channels_last,
    drop_sigma,
)
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["check_expressible", "reading", "writing"]

NORM = re.compile(r"(layers\.\d+\.(?:attention|ffn)_norm(?:_time|_space)?)([12])\.weight")
MODULATION = re.compile(r"(layers\.\d+\.)adaLN_modulation\.1\.(weight|bias)")


def reading(config: NextDiTConfig, variant: Variant) -> dict[str, Derived]:
    """Make our tensors of theirs."""
    plan = {}
    for name in own_tensors(config):
        norm = NORM.fullmatch(name)
        if norm is None:
            plan[name] = same(name)
        else:
            source = (f"{norm.group(1)}.weight",)
            plan[name] = Derived(source, _ones if norm.group(2) == "1" else _itself)
    plan[INPUT] = Derived((INPUT,), partial(channels_last, patch_size=variant.patch_size))
    if variant.learn_sigma:
        for name in OUTPUT:
            plan[name] = Derived((name,), partial(drop_sigma, patch_size=variant.patch_size))
    return plan


def writing(config: NextDiTConfig, variant: Variant) -> dict[str, Derived]:
    """Make their tensors of ours.

    The weights of the norm before a sublayer, which theirs has not, go into the scale that follows:
    w (1 + s) = 1 + (w s + w - 1). Where they are 1, as in what was read, nothing changes.
    """
    plan = {}
    own = own_tensors(config)
    for name in own:
        norm, modulation = NORM.fullmatch(name), MODULATION.fullmatch(name)
        if modulation is not None:
            head = modulation.group(1)
            norms = [f"{head}{one}1.weight" for one in _norms(config)]
            plan[name] = Derived((name, *norms), _scaled)
        elif norm is None:
            plan[name] = same(name)
        elif norm.group(2) == "2":
            plan[f"{norm.group(1)}.weight"] = same(name)
    plan[INPUT] = Derived((INPUT,), partial(channels_first, patch_size=variant.patch_size))
    if variant.learn_sigma:
        for name in OUTPUT:
            plan[name] = Derived((name,), partial(add_sigma, patch_size=variant.patch_size))
    return plan


def _norms(config: NextDiTConfig) -> tuple[str, ...]:
    """Name the norms of a block, in the order of their parts of the modulation."""
    if config.both_experts:
        return ("attention_norm", "ffn_norm_time", "ffn_norm_space")
    return ("attention_norm", "ffn_norm")


def _scaled(modulation: Tensor, *norms: Tensor) -> Tensor:
    """Multiply the scales, every second part, by the weights of the norms before them."""
    parts = list(modulation.float().chunk(2 * len(norms)))
    for index, norm in enumerate(norms):
        scale, weight = parts[2 * index], norm.float()
        one = scale.ndim == 1  # the bias carries the constant
        parts[2 * index] = weight * scale + (weight - 1.0) if one else weight[:, None] * scale
    return torch.cat(parts).to(modulation.dtype)


def check_expressible(config: NextDiTConfig, patch_size: int) -> None:
    """Refuse a backbone that their class-conditional networks cannot be.

    Raises:
        UserError: It has text, no classes or a final layer without shift, other axes than rows and
            columns, another epsilon or base, other than 2 experts per token, or tokens that are no
            patches of this side.
    """
    experts = config.time_experts or config.space_experts
    reasons: list[tuple[bool, str]] = [
        (config.classes is None, "it has no classes"),
        (config.text_dim is not None, "it has text beside classes, which theirs has not"),
        (not config.final_shift, "its final layer does not shift, theirs does"),
        (config.axes != 2, f"its positions have {config.axes} axes, theirs rows and columns"),
        (config.rope_base != 10000.0, f"its rope_base is {config.rope_base}, theirs 10000"),
        (config.norm_eps != 1e-5, f"its norm_eps is {config.norm_eps}, theirs 1e-05"),
        (
            experts > 0 and config.experts_per_token != 2,
            f"its tokens pass through {config.experts_per_token} experts, theirs through 2",
        ),
    ]
    for wrong, why in reasons:
        if wrong:
            raise UserError(f"this backbone has no form in the class-conditional layouts: {why}")
    check_patches(config, patch_size)


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(like.shape)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
