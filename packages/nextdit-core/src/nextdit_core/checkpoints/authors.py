"""The authors' layout of Lumina-Next: `consolidated*` files of lumina_next_t2i and its mini form.

Names are ours, as ours are theirs. What differs: the order of the numbers in an input token, a
pad token, and a second half of the output that is thrown away (see `token_order`). Neither is
needed here: reading drops them, writing puts zeros, which change no output of theirs.

Source: Alpha-VLLM/Lumina-T2X.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nextdit_core.checkpoints.feed_forwards import ExpertsBy, expert_fields, first_expert
from nextdit_core.checkpoints.mapping import Derived, own_tensors, same
from nextdit_core.checkpoints.token_order import (
    add_sigma,
    channels_first,
    channels_last,
    drop_sigma,
)
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["Variant", "check_expressible", "infer_config", "layer_count", "reading", "writing"]

INPUT = "x_embedder.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
PAD = "pad_token"
TABLE = "y_embedder.embedding_table.weight"
#: Every release has 32 heads; the weights of those without text do not tell.
RELEASED_WIDTHS = (1536, 2304, 3072, 4096)


@dataclass(frozen=True)
class Variant:
    """What a checkpoint of theirs says beyond our sizes.

    Args:
        patch_size: Side of a patch.
        learn_sigma: The output has the second half.
        pad_token: There is one.
        sample_size: Side of the latents that it was trained on, from which diffusers' pipeline
            extrapolates; 128 is the releases'.
    """

    patch_size: int = 2
    learn_sigma: bool = True
    pad_token: bool = True
    sample_size: int = 128

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], patch_size: int) -> Variant:
        """Read it from the shapes, in their names, and from what no shape tells."""
        rows, columns = shapes.get(OUTPUT[0], (0,))[0], shapes.get(INPUT, (0, 0))[-1]
        return cls(patch_size, rows != columns, PAD in shapes)

    def left_out(self, config: NextDiTConfig) -> tuple[str, ...]:
        """Say what reading drops."""
        words = []
        if self.pad_token:
            words.append(f"pad_token ({config.width} numbers): nothing is padded here")
        if self.learn_sigma:
            count = config.token_dim * (config.width + 1)
            words.append(
                f"the second half of final_layer.linear ({count:,} numbers), which the authors' "
                f"forward throws away"
            )
        return tuple(words)


def reading(config: NextDiTConfig, variant: Variant) -> dict[str, Derived]:
    """Make our tensors of theirs."""
    plan = {name: same(name) for name in own_tensors(config)}
    plan[INPUT] = Derived((INPUT,), partial(channels_last, patch_size=variant.patch_size))
    if variant.learn_sigma:
        for name in OUTPUT:
            plan[name] = Derived((name,), partial(drop_sigma, patch_size=variant.patch_size))
    return plan


def writing(config: NextDiTConfig, variant: Variant) -> dict[str, Derived]:
    """Make their tensors of ours."""
    check_expressible(config, variant.patch_size)
    pad = {PAD: Derived(("x_embedder.bias",), _zeros)} if variant.pad_token else {}
    plan = pad | {name: same(name) for name in own_tensors(config)}
    plan[INPUT] = Derived((INPUT,), partial(channels_first, patch_size=variant.patch_size))
    if variant.learn_sigma:
        for name in OUTPUT:
            plan[name] = Derived((name,), partial(add_sigma, patch_size=variant.patch_size))
    return plan


def _zeros(like: Tensor) -> Tensor:
    return like.new_zeros(like.shape)  # zeros_like imports for seconds on the meta device


def check_expressible(config: NextDiTConfig, patch_size: int) -> None:
    """Refuse a backbone that their network cannot be.

    Raises:
        UserError: It has no text, other axes than rows and columns, another epsilon or base, or
            tokens that are no patches of this side.
    """
    experts = config.time_experts or config.space_experts
    reasons: list[tuple[bool, str]] = [
        (
            experts > 0,
            "its feed-forward layers are experts, and theirs are plain (the authors' mixtures of "
            "experts are class-conditional, without text)",
        ),
        (config.text_dim is None, "it has no text, which theirs always has"),
        (config.classes is not None, "it has classes, which theirs has not beside text"),
        (config.final_shift, "its final layer shifts, theirs does not"),
        (config.axes != 2, f"its positions have {config.axes} axes, theirs rows and columns"),
        (config.rope_base != 10000.0, f"its rope_base is {config.rope_base}, theirs 10000"),
        (
            config.qk_norm and config.norm_eps != 1e-5,
            f"its norm_eps is {config.norm_eps}, and their QK-norm always has 1e-05",
        ),
    ]
    for wrong, why in reasons:
        if wrong:
            raise UserError(f"this backbone has no form in Lumina-Next's layouts: {why}")
    check_patches(config, patch_size)


def check_patches(config: NextDiTConfig, patch_size: int) -> None:
    """Refuse tokens that are no square patches of this side.

    Raises:
        UserError: They are not.
    """
    if patch_size < 1 or config.token_dim % patch_size**2:
        raise UserError(
            f"tokens of {config.token_dim} numbers are no {patch_size}x{patch_size} patches; give "
            f"patch_size"
        )


def layer_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the layers that any tensor belongs to."""
    return len({name.split(".")[1] for name in shapes if name.startswith("layers.")})


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    heads: int | None = None,
    lacks: Callable[[str], UserError] | None = None,
    experts_by: ExpertsBy | None = None,
) -> NextDiTConfig:
    """Read the sizes from the shapes, in the authors' names.

    Args:
        shapes: By name.
        heads: Query heads, where no gate tells them and the width is of no release.
        lacks: Makes the error for a tensor that is missing.
        experts_by: By what experts are chosen, where no router tells.

    Returns:
        The config; what shapes do not tell is as released (norm_eps 1e-5, rope_base 1e4).

    Raises:
        UserError: A tensor that tells a size is missing, sizes do not fit one another, or what was
            said does not fit them.
    """

    def size(name: str, axis: int) -> int:
        shape = shapes.get(name)
        if shape is None or len(shape) <= axis or min(shape) < 1:
            raise lacks(name) if lacks else UserError(f"there is no usable tensor {name}")
        return shape[axis]

    first = "layers.0.attention"
    width, token_dim = size(INPUT, 0), size(INPUT, 1)
    text = f"{first}.gate" in shapes
    keys = size(f"{first}.wk.weight", 0)
    heads = _heads(width, keys, heads, size(f"{first}.gate", 0) if text else None)
    kv_heads = keys // (width // heads)
    feed_forward = first_expert(shapes)
    config = NextDiTConfig(
        token_dim=token_dim,
        width=width,
        layers=layer_count(shapes),
        heads=heads,
        kv_heads=None if kv_heads == heads else kv_heads,
        text_dim=size(f"{first}.wk_y.weight", 1) if text else None,
        qk_norm=f"{first}.q_norm.weight" in shapes,
        classes=size(TABLE, 0) - 1 if TABLE in shapes else None,
        final_shift=size("final_layer.adaLN_modulation.1.weight", 0) == 2 * width,
        **expert_fields(shapes, width, min(width, 1024), experts_by),
    )
    return _with_ffn(config, size(f"{feed_forward}.w1.weight", 0))


def _heads(width: int, keys: int, said: int | None, gate: int | None) -> int:
    """Find the number of query heads: by the gate's length, by what is said, or by the release."""
    fitting = [
        count
        for count in range(1, width // 4 + 1)
        if width % count == 0 and width // count % 4 == 0 and keys % (width // count) == 0
    ]
    if said is not None and gate is not None and said != gate:
        raise UserError(
            f"heads is {said}, and the gate of the text attention has {gate}; leave out heads"
        )
    heads = gate if gate is not None else said
    if heads is None and width in RELEASED_WIDTHS:
        heads = 32
    choices = ", ".join(map(str, fitting)) or "none"
    if heads is None:
        raise UserError(
            f"no tensor tells the number of heads, and width {width} is of no release; give heads "
            f"(--heads on the command line). Those that fit the shapes: {choices}"
        )
    if heads not in fitting:
        raise UserError(
            f"{heads} heads do not fit width {width} and {keys} key channels; those that do: "
            f"{choices}. Give other heads, or check that the files belong together"
        )
    return heads


def _with_ffn(config: NextDiTConfig, hidden: int) -> NextDiTConfig:
    """Find the rounding, or else the multiplier, that gives a feed-forward width."""
    values = config.to_dict()
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        tried = NextDiTConfig.from_dict(values | {"multiple_of": multiple})
        if tried.ffn_width == hidden:
            return tried
    plain = int(2 * (4 * config.width) / 3)
    multiplier = (hidden + 0.5) / plain
    return NextDiTConfig.from_dict(values | {"multiple_of": 1, "ffn_dim_multiplier": multiplier})


def halves_equal(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors; on the `meta` device there is nothing to compare."""
    return first.is_meta or torch.equal(first, second)
