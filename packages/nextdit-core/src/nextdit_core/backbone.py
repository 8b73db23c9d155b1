"""Next-DiT: tokens with positions in, velocity of the tokens out.

Source: Lumina-Next (arXiv 2406.18583) §2. Module names follow the released weights.

Convention: t = 0 is noise, t = 1 is data; the network takes t in [0, 1] unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

import rope3d
from nextdit_core.block_operations import gate_residual, norm_modulate, norm_rotate, swiglu
from nextdit_core.checkpoints.pretrained import Pretrained
from nextdit_core.conditioning import Conditioning
from nextdit_core.config import NextDiTConfig
from nextdit_core.context_drop import Pooling
from nextdit_core.tokens import Tokens

#: Softmax scale of the self attention: a number, by token count, or 1/sqrt(head_dim).
Scale = float | Literal["proportional"] | None

__all__ = ["FinalLayer", "NextDiT", "PreparedConditioning", "backbone_rope"]


@dataclass(frozen=True)
class PreparedConditioning:
    """Everything of a request that depends neither on t nor on x, computed once.

    Args:
        vector: `[batch, modulation_dim]` added to the timestep embedding, or None.
        text_keys: Per layer `[batch, text_tokens, kv_heads, head_dim]`, normed.
        text_values: Per layer, same shape.
        mask: `[batch, text_tokens]` bool, or None without text.
    """

    vector: Tensor | None
    text_keys: tuple[Tensor, ...] = ()
    text_values: tuple[Tensor, ...] = ()
    mask: Tensor | None = None

    def first(self, count: int) -> PreparedConditioning:
        """Take the first samples of a batch."""
        return PreparedConditioning(
            None if self.vector is None else self.vector[:count],
            tuple(keys[:count] for keys in self.text_keys),
            tuple(values[:count] for values in self.text_values),
            None if self.mask is None else self.mask[:count],
        )


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


class Attention(nn.Module):
    """Self attention with rotary q and k, plus gated attention to text keys.

    out = wo( self + tanh(gate) · cross ), the gate per head and zero at the start; the text
    keys are not rotated and are attended by the same rotated queries.
    """

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.keys_heads
        self.head_dim = config.head_dim
        width, kv_width = config.width, self.kv_heads * config.head_dim

        def norm(size: int) -> nn.Module:
            return nn.LayerNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_width, bias=False)
        self.wv = nn.Linear(width, kv_width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = norm(width), norm(kv_width)
        if config.text_dim is not None:
            self.wk_y = nn.Linear(config.text_dim, kv_width, bias=False)
            self.wv_y = nn.Linear(config.text_dim, kv_width, bias=False)
            self.ky_norm = norm(kv_width)
            self.gate = nn.Parameter(torch.zeros(self.heads))

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Project `[batch, text_tokens, text_dim]` to keys and values of this layer."""
        shape = (*text.shape[:2], self.kv_heads, self.head_dim)
        keys = self.ky_norm(self.wk_y(text)).view(shape)
        return keys, self.wv_y(text).view(shape)

    def forward(
        self,
        x: Tensor,
        rotation: rope3d.Rotation,
        lengths: tuple[int, ...] | None,
        scale: Scale,
        trained_tokens: int | None,
        text: tuple[Tensor, Tensor, Tensor] | None,
        pooling: Pooling | None,
    ) -> Tensor:
        """Attend within each sample; see `NextDiT.forward` for the two layouts of `x`."""
        batch, tokens, _ = x.shape
        q = self.wq(x).view(batch, tokens, self.heads, self.head_dim)
        k = self.wk(x).view(batch, tokens, self.kv_heads, self.head_dim)
        v = self.wv(x).view(batch, tokens, self.kv_heads, self.head_dim)
        q, k = self._norm_rotate(q, k, rotation)
        second = None
        if text is not None:
            keys, values, mask = text
            second = rope3d.GatedText(keys, values, self.gate, mask=mask)
        key_lengths = None
        if pooling is not None:
            q, k, v = q.flatten(0, 1), pooling(k.flatten(0, 1)), pooling(v.flatten(0, 1))
            lengths = lengths or (tokens,) * batch
            key_lengths = pooling.lengths
            if len(set(lengths)) == len(set(key_lengths)) == 1:  # dense attention is quicker
                q, k, v = (part.unflatten(0, (len(lengths), -1)) for part in (q, k, v))
                lengths = key_lengths = None
        elif lengths is not None:
            q, k, v = q[0], k[0], v[0]
        out = rope3d.attention(
            q,
            k,
            v,
            lengths=lengths,
            key_lengths=key_lengths,
            scale=scale,
            trained_tokens=trained_tokens,
            text=second,
        )
        return self.wo(out.reshape(batch, tokens, -1))

    def _norm_rotate(
        self, q: Tensor, k: Tensor, rotation: rope3d.Rotation
    ) -> tuple[Tensor, Tensor]:
        """Normalise over all heads of a token where the configuration says so, and rotate."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if not (isinstance(q_norm, nn.LayerNorm) and isinstance(k_norm, nn.LayerNorm)):
            return rope3d.rotate(q, k, rotation)
        norms = (q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias)
        return norm_rotate(q, k, rotation, *norms, eps=q_norm.eps)


class FeedForward(nn.Module):
    """SwiGLU: w2( silu(w1 x) · w3 x ), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """One sandwich-normed block.

    x ← x + tanh(gate_a) · RMS2( Attn( RMS1(x) · (1 + scale_a) ) )
    x ← x + tanh(gate_f) · RMS2( FFN( RMS1(x) · (1 + scale_f) ) )

    Scales and gates come from the modulation vector through a zero-initialised linear layer,
    so that a new block is the identity.
    """

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        width, self.eps = config.width, config.norm_eps

        def norm(size: int) -> nn.RMSNorm:
            return nn.RMSNorm(size, eps=config.norm_eps)

        self.attention = Attention(config)
        self.feed_forward = FeedForward(width, config.ffn_width)
        self.attention_norm1, self.attention_norm2 = norm(width), norm(width)
        self.ffn_norm1, self.ffn_norm2 = norm(width), norm(width)
        if config.text_dim is not None:
            self.attention_y_norm = norm(config.text_dim)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.modulation_dim, 4 * width)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotation: rope3d.Rotation,
        lengths: tuple[int, ...] | None,
        scale: Scale,
        trained_tokens: int | None,
        text: tuple[Tensor, Tensor, Tensor] | None,
        pooling: Pooling | None,
    ) -> Tensor:
        """Apply the block; `modulation` is `[batch, modulation_dim]`."""
        parts = _per_token(self.adaLN_modulation(modulation), lengths).chunk(4, dim=-1)
        scale_a, gate_a, scale_f, gate_f = parts
        attended = self.attention(
            norm_modulate(x, self.attention_norm1.weight, scale_a, eps=self.eps),
            rotation,
            lengths,
            scale,
            trained_tokens,
            text,
            pooling,
        )
        x = gate_residual(x, attended, self.attention_norm2.weight, gate_a, eps=self.eps)
        hidden = self.feed_forward(norm_modulate(x, self.ffn_norm1.weight, scale_f, eps=self.eps))
        return gate_residual(x, hidden, self.ffn_norm2.weight, gate_f, eps=self.eps)


class ClassEmbedder(nn.Module):
    """One vector per class, and one for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Look up `[batch]` labels as `[batch, width]`."""
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """Norm, scale (and shift) by the modulation vector, and project to one token's velocity.

    Args:
        config: Of the trunk.
        token_dim: Numbers in one token, where they are not `config.token_dim`.
    """

    def __init__(self, config: NextDiTConfig, token_dim: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.token_dim if token_dim is None else token_dim)
        self.shift = config.final_shift
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.modulation_dim, (1 + self.shift) * config.width)
        )

    def forward(self, hidden: Tensor, modulation: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Give the velocity of tokens.

        Args:
            hidden: `[total_tokens, width]`, as `NextDiT.trunk` gives it.
            modulation: `[batch, modulation_dim]`.
            lengths: Tokens of each sample.

        Returns:
            `[total_tokens, token_dim]`.
        """
        equal = len(set(lengths)) == 1
        x = hidden.view(len(lengths), lengths[0], -1) if equal else hidden[None]
        scale = _per_token(self.adaLN_modulation(modulation), None if equal else lengths)
        if self.shift:
            shift, scale = scale.chunk(2, dim=-1)
            x = norm_modulate(x, None, scale, eps=1e-6, centred=True) + shift
        else:
            x = norm_modulate(x, None, scale, eps=1e-6, centred=True)
        return self.linear(x).flatten(0, 1)


def _per_token(vector: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """Spread one vector per sample over the sample's tokens."""
    if lengths is None:
        return vector[:, None]
    repeats = torch.tensor(lengths, device=vector.device)
    return vector.repeat_interleave(repeats, dim=0, output_size=sum(lengths))[None]


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
        N(0, 0.02), as the class table is; modulation, caption projection, gates and the output
        start at zero.

        Args:
            generator: Where the randomness comes from; the global one when None.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
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
        return PreparedConditioning(vector, keys, values, condition.mask)

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
        rope: rope3d.Rope | rope3d.TimedRope | None = None,
        scale: Scale = None,
        trained_tokens: int | None = None,
        pooling: Pooling | None = None,
    ) -> Tensor:
        """Predict the velocity of every token.

        Samples of one length are computed as a dense batch, `[batch, tokens, width]`; of
        different lengths as one packed row, `[1, total_tokens, width]`, without padding.

        Args:
            tokens: The noisy samples.
            t: `[batch]` in [0, 1], 0 = noise.
            condition: As given, or as returned by `prepare`.
            rope: Another rotary layout for this call, over three position columns, such as
                `model.rope.extrapolate("time-aware", scale=(1, 2, 2))`; it may follow t.
            scale: Softmax scale of the self attention; "proportional" needs
                `trained_tokens`; None is 1/sqrt(head_dim).
            trained_tokens: Tokens per sample at training, for "proportional".
            pooling: Average keys and values of the self attention, as `ContextDrop` finds it.

        Returns:
            `[total_tokens, token_dim]`, the velocity.

        Raises:
            ValueError: `t` or `condition` does not fit the batch.
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
        )
        return self.final_layer(hidden, modulation, tokens.lengths)

    def trunk(
        self,
        tokens: Tokens,
        t: Tensor,
        condition: Conditioning | PreparedConditioning | None = None,
        *,
        rope: rope3d.Rope | rope3d.TimedRope | None = None,
        scale: Scale = None,
        trained_tokens: int | None = None,
        pooling: Pooling | None = None,
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

        Returns:
            Hidden states `[total_tokens, width]`, and the modulation vector of each sample,
            `[batch, modulation_dim]`, which a `FinalLayer` takes both.

        Raises:
            ValueError: `t` or `condition` does not fit the batch.
        """
        if t.shape != (tokens.batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected [{tokens.batch}]")
        if not isinstance(condition, PreparedConditioning):
            condition = self.prepare(condition)
        if condition.mask is not None and condition.mask.shape[0] != tokens.batch:
            raise ValueError(
                f"condition holds {condition.mask.shape[0]} samples and tokens {tokens.batch}"
            )
        modulation = self.t_embedder(t)
        if condition.vector is not None:
            modulation = modulation + condition.vector
        length = tokens.equal_length
        shape = (1, len(tokens.values)) if length is None else (tokens.batch, length)
        lengths = tokens.lengths if length is None else None
        x = tokens.values.view(*shape, -1)
        positions = tokens.positions.view(*shape, 3)
        times = t if lengths is None else _per_token(t[:, None], lengths)[..., 0]
        rotation = (rope or self.rope).rotation(positions, times)
        for index, block in enumerate(self.blocks):
            text = None
            if condition.mask is not None:
                text = (condition.text_keys[index], condition.text_values[index], condition.mask)
            x = block(x, modulation, rotation, lengths, scale, trained_tokens, text, pooling)
        return x.flatten(0, 1), modulation

    def extra_repr(self) -> str:
        """Name the sizes in `print(model)`."""
        return str(self.config)
