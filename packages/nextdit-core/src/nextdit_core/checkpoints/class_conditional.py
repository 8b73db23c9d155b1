"""The layout of the class-conditional Next-DiT of Next-DiT-ImageNet.

The norm before a sublayer has no weights there, and the one behind it, which does, is called
`attention_norm` and `ffn_norm`; in the text-to-image form these are `attention_norm2` and
`ffn_norm2`. The final layer shifts as well as scales, and a table of labels takes the place of
text.

Source: Alpha-VLLM/Lumina-T2X, Next-DiT-ImageNet/models/models.py.
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor

from nextdit_core.checkpoints.authors import INPUT, OUTPUT, Variant
from nextdit_core.checkpoints.mapping import Derived, own_tensors, same
from nextdit_core.checkpoints.token_order import (
    add_sigma,
    channels_first,
    channels_last,
    drop_sigma,
)
from nextdit_core.config import NextDiTConfig

__all__ = ["reading", "writing"]

NORM = re.compile(r"(layers\.\d+\.(?:attention|ffn)_norm)([12])\.weight")


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
    """Make their tensors of ours; it serves to know their shapes, and drops the norms before."""
    plan = {}
    for name in own_tensors(config):
        norm = NORM.fullmatch(name)
        if norm is None:
            plan[name] = same(name)
        elif norm.group(2) == "2":
            plan[f"{norm.group(1)}.weight"] = same(name)
    plan[INPUT] = Derived((INPUT,), partial(channels_first, patch_size=variant.patch_size))
    if variant.learn_sigma:
        for name in OUTPUT:
            plan[name] = Derived((name,), partial(add_sigma, patch_size=variant.patch_size))
    return plan


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(like.shape)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
