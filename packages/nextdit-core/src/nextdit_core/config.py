"""The numbers that define one Next-DiT backbone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nextdit_core.errors import UserError, unknown_name

__all__ = ["SIZES", "NextDiTConfig"]

#: Sizes by name. All but the first are those of the Lumina papers and releases.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"width": 96, "layers": 3, "heads": 4, "kv_heads": 2, "multiple_of": 32},
    "86m": {"width": 768, "layers": 12, "heads": 12},  # ViT-B's, for recognition
    "600m": {"width": 1536, "layers": 16, "heads": 32},
    # Next-DiT-MoE, each named by the dense model whose attention it has.
    "600m-moe-time": {"width": 1536, "layers": 16, "heads": 32, "time_experts": 8},
    "600m-moe-space": {"width": 1536, "layers": 16, "heads": 32, "space_experts": 8},
    "600m-moe-both": {
        **{"width": 1536, "layers": 16, "heads": 32},
        **{"time_experts": 4, "space_experts": 4},
    },
    "2b": {"width": 2304, "layers": 24, "heads": 32},
    "2b-gqa": {"width": 2304, "layers": 24, "heads": 32, "kv_heads": 8},  # Lumina-Next-T2I, -SFT
    "3b": {"width": 3072, "layers": 32, "heads": 32},
    "5b": {"width": 3072, "layers": 32, "heads": 32},  # as "3b"; "5B" with a 4096 wide text
    "7b": {"width": 4096, "layers": 32, "heads": 32},
}


@dataclass(frozen=True)
class NextDiTConfig:
    """Sizes of a Next-DiT backbone.

    Args:
        token_dim: Numbers in one token, on input and output.
        axes: Position axes that the modality uses: 1 (sequences; column 0 of the
            positions), 2 (images; columns 1 and 2) or 3 (views or video).
        width: Hidden width D.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`. None means as many as `heads`.
        text_dim: Width of the text features; None for a backbone without text.
        multiple_of: The feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: Extra factor on the feed-forward width, or None.
        norm_eps: Epsilon of RMSNorm and of the QK-norm.
        qk_norm: LayerNorm over the whole q and k projections before the split in heads.
        rope_base: Base of the rotary frequencies.
        classes: Number of classes of a class-conditional backbone, or None; one label more
            stands for no class.
        final_shift: The final layer shifts, besides scaling (Next-DiT-ImageNet).
        time_experts: Feed-forward layers of which the timestep chooses some; 0 for none.
        space_experts: Feed-forward layers of which each token chooses some; 0 for none. With both
            kinds a block has a feed-forward layer of each, first time, then space.
        experts_per_token: How many experts of a kind a token passes through.
        patch_size: Side of the patch that a token is, which decides the order of its numbers in the
            layouts of others; None where it is not known. Nothing here computes with it.
        sample_size: Side of the latents that it was trained on, from which diffusers' pipeline
            extrapolates; None where it is not known. Nothing here computes with it.

    Raises:
        UserError: A size does not fit the others.

    Source: Lumina-Next (arXiv 2406.18583) §2; sizes as released.

    >>> NextDiTConfig(token_dim=16, width=2304, layers=24, heads=32, kv_heads=8).ffn_width
    6144
    """

    token_dim: int
    axes: int = 2
    width: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int | None = None
    text_dim: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_base: float = 10000.0
    classes: int | None = None
    final_shift: bool = False
    time_experts: int = 0
    space_experts: int = 0
    experts_per_token: int = 2
    patch_size: int | None = None
    sample_size: int | None = None

    def __post_init__(self) -> None:
        """Check the sizes against one another."""
        sizes = ("token_dim", "width", "layers", "heads", "multiple_of")
        optional = ("kv_heads", "text_dim", "classes", "patch_size", "sample_size")
        for name in (*sizes, *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} is {value}; expected at least 1")
        self._check_experts()
        if self.width % self.heads:
            raise UserError(
                f"model.width {self.width} is not a multiple of model.heads {self.heads}; "
                f"change one of them"
            )
        if self.heads % self.keys_heads:
            raise UserError(
                f"model.heads {self.heads} is not a multiple of model.kv_heads "
                f"{self.keys_heads}; change one of them"
            )
        if self.axes not in (1, 2, 3):
            raise UserError(f"model.axes is {self.axes}; expected 1, 2 or 3")
        per_axis = {1: 2, 2: 4, 3: 6}[self.axes]
        if self.head_dim % per_axis:
            raise UserError(
                f"head_dim {self.head_dim} (model.width / model.heads) is not a multiple of "
                f"{per_axis}, which rotary embedding over {self.axes} axes needs"
            )

    def _check_experts(self) -> None:
        chosen = self.experts_per_token
        for name in ("time_experts", "space_experts"):
            count = getattr(self, name)
            if count < 0 or (count and not 1 <= chosen <= count):
                raise UserError(
                    f"model.{name} is {count} and model.experts_per_token {chosen}; expected 0, or "
                    f"at least as many experts as a token passes through, of which there is one"
                )

    @classmethod
    def named(
        cls,
        size: str,
        *,
        token_dim: int,
        text_dim: int | None = None,
        axes: int = 2,
        **changes: Any,
    ) -> NextDiTConfig:
        """Take the sizes that the papers and releases name.

        Args:
            size: "tiny" (for tests), "86m", "600m", "2b", "2b-gqa" (the released text-to-image
                model), "3b", "5b" or "7b"; or with experts "600m-moe-time", "600m-moe-space" or
                "600m-moe-both".
            token_dim: Numbers in one token, on input and output.
            text_dim: Width of the text features; None for a backbone without text.
            axes: Position axes that the modality uses.
            changes: Further fields, which win over those of the name.

        Returns:
            The config.

        Raises:
            UserError: No size has this name, or a size does not fit.

        Convention: The names are the authors' and do not count parameters: "3b" has 4.0 and "7b"
            7.0 thousand million in the class-conditional form, and "5b" is "3b" with the text of
            a larger language model.

        Source: Alpha-VLLM/Lumina-T2X, the constructors of Next-DiT-ImageNet, Next-DiT-MoE,
            lumina_next_t2i and lumina_t2i; "86m": arXiv 2406.18583, image recognition.

        >>> NextDiTConfig.named("2b-gqa", token_dim=16, text_dim=2048).head_dim
        72
        """
        if size not in SIZES:
            raise unknown_name("backbone size", size, SIZES)
        fields = {**SIZES[size], "token_dim": token_dim, "text_dim": text_dim, "axes": axes}
        return cls.from_dict(fields | changes)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def both_experts(self) -> bool:
        """Whether a block has two feed-forward layers, of time and of space."""
        return bool(self.time_experts and self.space_experts)

    @property
    def keys_heads(self) -> int:
        """Key and value heads, with the default resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def modulation_dim(self) -> int:
        """Width of the vector that modulates every block: min(D, 1024)."""
        return min(self.width, 1024)

    @property
    def ffn_width(self) -> int:
        """Hidden width of SwiGLU: 2/3 of 4D, times the multiplier, rounded up."""
        hidden = int(2 * (4 * self.width) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NextDiTConfig:
        """Build a config from `to_dict`'s values.

        Raises:
            UserError: A key is unknown or a size does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise unknown_name("backbone config key", key, names)
            if not _has_kind(cls.__annotations__[key], values[key]):
                raise UserError(
                    f"model.{key} is {values[key]!r}; expected {cls.__annotations__[key]}"
                )
        if "token_dim" not in values:
            raise UserError("the backbone's sizes lack token_dim; they were changed or are damaged")
        return cls(**values)


def _has_kind(annotation: str, value: object) -> bool:
    """Tell whether a value from a file is of a field's type; a whole number is a float too."""
    kinds = annotation.split(" | ")
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") in kinds
    if isinstance(value, int):
        return "int" in kinds or "float" in kinds
    return isinstance(value, float) and "float" in kinds and math.isfinite(value)
