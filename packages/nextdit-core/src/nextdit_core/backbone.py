"""Next-DiT: tokens with positions in, velocity of the tokens out.

Source: Lumina-Next (arXiv 2406.18583) §2. Module names follow the released weights.

Convention: t = 0 is noise, t = 1 is data; the network takes t in [0, 1] unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

import rope3d
from nextdit_core.arrangement import arrange
from nextdit_core.attention import AttentionChoice, Scale
from nextdit_core.block import Block
from nextdit_core.checkpoints.pretrained import Pretrained
from nextdit_core.conditioning import Conditioning
from nextdit_core.config import NextDiTConfig
from nextdit_core.context_drop import Pooling
from nextdit_core.experts import Experts
from nextdit_core.final_layer import FinalLayer
from nextdit_core.prepared_conditioning import PreparedConditioning
from nextdit_core.tokens import Tokens

__all__ = ["NextDiT", "backbone_rope"]


def backbone_rope(config: NextDiTConfig) -> rope3d.Rope:
    """Choose the rotary layout of a backbone, over 3-column (time or view, row, column) positions.

    Args:
        config: One axis: plain rotary on column 0. Two: the released interleaving of rows
            and columns. Three: the paper's thirds.

    Returns:
        The layout.
    """
    dim, base = config.head_dim, config.rope_base
    if config.axes == 1:
        return rope3d.axial((dim,), base=base).on_axes(3, (0,))
    if config.axes == 2:
        return rope3d.lumina(dim, base=base).on_axes(3, (1, 2))
    return rope3d.paper(dim, base=base)


def _linear(layers: nn.Sequential, index: int) -> nn.Linear:
    """Take a linear layer out of a sequence; the released weights number them."""
    return cast("nn.Linear", layers[index])


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, cosine first, through a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed `[batch]` times in [0, 1] as `[batch, width]`."""
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(_linear(self.mlp, 0).weight.dtype))


class ClassEmbedder(nn.Module):
    """One vector per class, and one for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Look up `[batch]` labels as `[batch, width]`."""
        return self.embedding_table(labels)


class NextDiT(Pretrained, nn.Module):
    """The Next-DiT backbone.

    Args:
        config: The sizes.

    Source: Lumina-Next (arXiv 2406.18583) §2; initialisation as in the released code.

    >>> config = NextDiTConfig(token_dim=4, width=32, layers=1, heads=2)
    >>> grid = torch.zeros(6, 3)
    >>> noise = Tokens(torch.randn(6, 4), grid, (6,))
    >>> NextDiT(config)(noise, torch.tensor([0.5])).shape
    torch.Size([6, 4])
    """

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = backbone_rope(config)
        self.x_embedder = nn.Linear(config.token_dim, config.width)
        self.t_embedder = TimestepEmbedder(config.modulation_dim)
        if config.text_dim is not None:
            self.cap_embedder = nn.Sequential(
                nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, config.modulation_dim)
            )
        if config.classes is not None:
            self.y_embedder = ClassEmbedder(config.classes, config.modulation_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)
        self.reset_parameters()

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, in order."""
        return cast("Sequence[Block]", self.layers)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights.

        Attention, feed-forward and patch weights are Xavier-uniform; the timestep MLP is
        N(0, 0.02), as the class table is; the routers of experts are uniform within
        1/sqrt(inputs); modulation, caption projection, gates and the output start at zero.

        Args:
            generator: Where the randomness comes from; the global one when None.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Experts):
                edge = module.gate.in_features**-0.5
                nn.init.uniform_(module.gate.weight, -edge, edge, generator=generator)
        for index in (0, 2):
            weight = _linear(self.t_embedder.mlp, index).weight
            nn.init.normal_(weight, std=0.02, generator=generator)
        if self.config.classes is not None:
            table = self.y_embedder.embedding_table.weight
            nn.init.normal_(table, std=0.02, generator=generator)
        zeros = [self.final_layer.linear, _linear(self.final_layer.adaLN_modulation, 1)]
        for block in self.blocks:
            zeros.append(_linear(block.adaLN_modulation, 1))
            if self.config.text_dim is not None:
                nn.init.zeros_(block.attention.gate)
        if self.config.text_dim is not None:
            zeros.append(_linear(self.cap_embedder, 1))
        for linear in zeros:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def prepare(self, condition: Conditioning | None) -> PreparedConditioning:
        """Compute once what depends neither on t nor on x.

        Args:
            condition: Text features of `text_dim`, or None where the backbone has no text.

        Returns:
            What `forward` accepts in place of `condition`, for every step of a request.

        Raises:
            ValueError: Text was given to a backbone without text, or the other way round,
                or its width is not `text_dim`.
        """
        expected = self.config.text_dim
        if condition is None:
            if expected is not None:
                raise ValueError(
                    f"this backbone takes text of width {expected}; give it a Conditioning "
                    f"(the encoded empty prompt for no text)"
                )
            if self.config.classes is not None:
                raise ValueError(
                    f"this backbone takes one of {self.config.classes} classes; give it "
                    f"prepare_classes(labels), where {self.config.classes} stands for none"
                )
            return PreparedConditioning(None)
        if expected is None:
            return PreparedConditioning(condition.extra)
        if condition.text.shape[-1] != expected:
            raise ValueError(
                f"text features have width {condition.text.shape[-1]}; this backbone takes "
                f"{expected}"
            )
        text = condition.text.to(self.x_embedder.weight.dtype)
        pooled = condition.pooled().to(text.dtype)
        vector = self.cap_embedder(pooled)
        if condition.extra is not None:
            vector = vector + condition.extra
        pairs = [
            block.attention.text_keys_values(block.attention_y_norm(text)) for block in self.blocks
        ]
        keys, values = zip(*pairs, strict=True)
        known = condition.host_lengths
        full = known is not None and min(known) == text.shape[1]
        mask = None if full else condition.mask
        return PreparedConditioning(vector, keys, values, mask, known)

    def prepare_classes(self, labels: Tensor) -> PreparedConditioning:
        """Compute once what the classes of a batch contribute.

        Args:
            labels: `[batch]` int64, each in [0, classes]; `classes` stands for none.

        Returns:
            What `forward` accepts as `condition`.

        Raises:
            ValueError: The backbone takes no classes, or the labels are no vector.

        Source: Next-DiT-ImageNet of Alpha-VLLM/Lumina-T2X, where the table is added to t.
        """
        if self.config.classes is None:
            raise ValueError("this backbone takes no classes; its config has classes=None")
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected "
                f"[batch] int64"
            )
        return PreparedConditioning(self.y_embedder(labels))

    def forward(
        self,
        tokens: Tokens,
        t: Tensor,
        condition: Conditioning | PreparedConditioning | None = None,
        *,
        rope: rope3d.Rope | rope3d.TimedRope | rope3d.Rotation | None = None,
        scale: Scale = None,
        trained_tokens: int | None = None,
        pooling: Pooling | None = None,
        pad_to: int | None = None,
    ) -> Tensor:
        """Predict the velocity of every token.

        Samples of one length are computed as a dense batch, `[batch, tokens, width]`; of
        different lengths as one packed row, `[1, total_tokens, width]`, without padding.

        Args:
            tokens: The noisy samples.
            t: `[batch]` in [0, 1], 0 = noise.
            condition: As given, or as returned by `prepare`.
            rope: Another rotary layout for this call, over three position columns, such as
                `model.rope.extrapolate("time-aware", scale=(1, 2, 2))`; it may follow t. Or the
                rotation itself, of the samples as they lie in rows (`nextdit_core.arrangement`).
            scale: Softmax scale of the self attention; "proportional" needs
                `trained_tokens`; None is 1/sqrt(head_dim).
            trained_tokens: Tokens per sample at training, for "proportional".
            pooling: Average keys and values of the self attention, as `ContextDrop` finds it.
            pad_to: Compute samples of any lengths as `[batch, pad_to, width]` with masked padding,
                as the authors do with a list. The result is that of packed samples and takes
                longer; batches of all sizes then have one shape.

        Returns:
            `[total_tokens, token_dim]`, the velocity.

        Raises:
            ValueError: `t` or `condition` does not fit the batch, or a sample has more than
                `pad_to` tokens.
        """
        values = self.x_embedder(tokens.values.to(self.x_embedder.weight.dtype))
        hidden, modulation = self.trunk(
            tokens.with_values(values),
            t,
            condition,
            rope=rope,
            scale=scale,
            trained_tokens=trained_tokens,
            pooling=pooling,
            pad_to=pad_to,
        )
        return self.final_layer(hidden, modulation, tokens.lengths)

    def trunk(
        self,
        tokens: Tokens,
        t: Tensor,
        condition: Conditioning | PreparedConditioning | None = None,
        *,
        rope: rope3d.Rope | rope3d.TimedRope | rope3d.Rotation | None = None,
        scale: Scale = None,
        trained_tokens: int | None = None,
        pooling: Pooling | None = None,
        pad_to: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks alone, on tokens that are embedded already.

        With an embedding and a `FinalLayer` of its own for each of several kinds of token, they
        share one trunk, also in one batch.

        Args:
            tokens: Their values are `[total_tokens, width]`.
            t: As in `forward`; so are the others.
            condition: The text.
            rope: Another rotary layout.
            scale: Of the self attention.
            trained_tokens: Tokens per sample at training.
            pooling: Of keys and values.
            pad_to: Tokens of a row with padding.

        Returns:
            Hidden states `[total_tokens, width]`, and the modulation vector of each sample,
            `[batch, modulation_dim]`, which a `FinalLayer` takes both.

        Raises:
            ValueError: `t` or `condition` does not fit the batch, or a sample has more than
                `pad_to` tokens.
        """
        if t.shape != (tokens.batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected [{tokens.batch}]")
        if not isinstance(condition, PreparedConditioning):
            condition = self.prepare(condition)
        if condition.batch not in (None, tokens.batch):
            raise ValueError(f"condition holds {condition.batch} samples and tokens {tokens.batch}")
        if pad_to is not None and pooling is not None:
            raise ValueError("pooling has no padded form; leave out pad_to or pooling")
        arrangement = arrange(tokens, pack=condition.packed, pad_to=pad_to)
        if arrangement.lengths is not None:
            condition = condition.in_one_row
        elif condition.packed:
            raise ValueError("padded rows need their text in rows too, as `prepare` gives it")
        time = self.t_embedder(t)
        modulation = time if condition.vector is None else time + condition.vector
        rotation = rope
        if not isinstance(rotation, rope3d.Rotation):
            times = t if arrangement.lengths is None else arrangement.spread(t[:, None])[..., 0]
            rotation = (rotation or self.rope).rotation(arrangement.place(tokens.positions), times)
        choice = AttentionChoice(rotation, scale, trained_tokens, pooling)
        x = arrangement.place(tokens.values)
        for index, block in enumerate(self.blocks):
            x = block(x, modulation, time, arrangement, choice, condition.layer(index))
        return arrangement.take(x), modulation

    def extra_repr(self) -> str:
        """Name the sizes in `print(model)`."""
        return str(self.config)
