"""Floating-point operations that a training step of a backbone needs, counted from its shapes.

A linear layer of N weights takes 2·N operations for each vector that it is given, 2·N more for the
gradient of its input and 2·N for that of its weights: 6·N. Attention takes 4·D for each pair of a
query and a key over all heads of width D together, 12·D with the backward pass. What is computed
again to save memory does not count, nor do norms, gates and other elementwise work.

Source: Kaplan et al., arXiv 2001.08361, §2.1, and Chowdhery et al., PaLM, arXiv 2204.02311,
appendix B, without their simplifications.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from nextdit_core.backbone import NextDiT
from nextdit_core.conditioning import Conditioning
from nextdit_core.tokens import Tokens

__all__ = ["FlopMeter", "TrainingFlops"]

#: Linear layers that see one vector for each sample, and those that see text, by name.
_OF_SAMPLE = {"t_embedder", "cap_embedder", "adaLN_modulation"}
_OF_TEXT = {"wk_y", "wv_y"}


@dataclass(frozen=True)
class TrainingFlops:
    """The operations of forward and backward passes, as a function of lengths.

    Args:
        token: For each token.
        text_token: For each token of text.
        sample: For each sample.
        pair: For each pair of a query and a key.
    """

    token: int
    text_token: int
    sample: int
    pair: int

    @classmethod
    def of(cls, backbone: NextDiT, *, text_learns: bool = False) -> TrainingFlops:
        """Count the linear layers of a backbone; frozen ones have no gradient of their weights.

        Args:
            backbone: The network, perhaps with adapters in its linear layers.
            text_learns: Whether the text features take a gradient.

        Returns:
            The counts.
        """
        counts = {"token": 0, "text_token": 0, "sample": 0}
        for name, module in backbone.named_modules():
            if isinstance(module, nn.Linear):
                parts = set(name.split("."))
                kind = "token"
                if parts & _OF_SAMPLE:
                    kind = "sample"
                elif parts & _OF_TEXT:
                    kind = "text_token"
                passes = 1 + module.weight.requires_grad
                passes += _input_learns(backbone, name, kind, text_learns=text_learns)
                counts[kind] += 2 * module.weight.numel() * passes
        config = backbone.config
        return cls(**counts, pair=12 * config.width * config.layers)

    def __call__(self, lengths: Sequence[int], text_lengths: Sequence[int] = ()) -> int:
        """Count a step.

        Args:
            lengths: Tokens of each sample; a token attends to those of its own sample.
            text_lengths: Tokens of each sample's text; none without text.

        Returns:
            The operations.
        """
        pairs = sum(length * length for length in lengths)
        if text_lengths:
            pairs += sum(a * b for a, b in zip(lengths, text_lengths, strict=True))
        return (
            self.token * sum(lengths)
            + self.text_token * sum(text_lengths)
            + self.sample * len(lengths)
            + self.pair * pairs
        )


def _input_learns(backbone: NextDiT, name: str, kind: str, *, text_learns: bool) -> bool:
    """Tell whether the input of a linear layer takes a gradient: whether one before it learns."""
    parts = name.split(".")

    def learns(*modules: nn.Module) -> bool:
        return any(one.requires_grad for module in modules for one in module.parameters())

    if "lora_B" in parts:
        return True
    if name.startswith(("x_embedder", "t_embedder.mlp.0")):
        return False
    if kind == "text_token":
        layer = backbone.blocks[int(parts[1])]
        return text_learns or learns(layer.attention_y_norm)
    if name.startswith("cap_embedder"):
        return text_learns or learns(backbone.cap_embedder[0])
    before: list[nn.Module] = [backbone.t_embedder]
    if backbone.config.text_dim is not None:
        before.append(backbone.cap_embedder)
    if backbone.config.classes is not None:
        before.append(backbone.y_embedder)
    if name.startswith("t_embedder"):
        return learns(backbone.t_embedder.mlp[0])
    if kind == "sample":
        return learns(*before) or text_learns
    if parts[:2] == ["layers", "0"] and parts[3] in ("wq", "wk", "wv"):
        first = backbone.blocks[0]
        before += [backbone.x_embedder, first.attention_norm1, first.adaLN_modulation]
        return learns(*before) or text_learns
    return True


class FlopMeter:
    """Add up the operations of a backbone's training steps, from the shapes that it is called with.

    The numbers are the host's: nothing waits for a device.

    Args:
        backbone: A hook is put on it, which `remove` takes off.
        text_learns: Whether the text features take a gradient.
    """

    def __init__(self, backbone: NextDiT, *, text_learns: bool = False) -> None:
        self.flops = TrainingFlops.of(backbone, text_learns=text_learns)
        self.total = 0
        self._handle: RemovableHandle = backbone.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens: Tokens = args[0]
        condition = args[2] if len(args) > 2 else None
        text: Sequence[int] = ()
        if isinstance(condition, Conditioning):
            width = condition.text.shape[1]
            text = condition.host_lengths or (width,) * tokens.batch
        self.total += self.flops(tokens.lengths, text)

    def take(self) -> int:
        """Give what was added up, and begin anew."""
        total, self.total = self.total, 0
        return total

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
