"""Mixture of experts: several feed-forward layers, of which each token passes through a few.

y = sum over the k largest logits of softmax(those k)_i · expert_i(x)

Experts of time choose by the timestep embedding, so that all tokens of a sample have the same ones;
experts of space choose by the token. No token is dropped, and no loss balances the experts unless
one is added to the objective (see `Routing.balance`).

How the chosen tokens meet their experts depends on where they are:

- In bfloat16 on CUDA from compute capability 9.0 on, and compiled: the tokens are sorted by expert,
  and one grouped matrix product for each of w1, w3 and w2 serves all experts. Their weights are
  stacked, which copies them; nothing is read back to the host (compiled on other devices PyTorch's
  fallback reads the counts).
- Elsewhere in eager mode: the same order, and each expert is called on its own tokens. How many
  these are is read once per layer, which on the CPU waits for nothing.
- Compiled where there is no grouped product (other number formats, weights that an adapter or a
  quantisation has wrapped): each expert is called on all tokens, for the sake of one whole graph.

Source: Next-DiT-MoE of Alpha-VLLM/Lumina-T2X (models.py, models1.py and models2.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from nextdit_core.arrangement import Arrangement
from nextdit_core.block_operations import swiglu
from nextdit_core.feed_forward import FeedForward

__all__ = ["Experts", "Routing", "SpaceExperts", "TimeExperts", "watch_routing"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What one router chose.

    Args:
        logits: `[choices, experts]`; a choice is made for each sample by experts of time, and for
            each token by experts of space.
        selected: `[choices, k]` int64, the chosen experts.
        weights: `[choices, k]`, how much each counts; they sum to 1.
    """

    logits: Tensor
    selected: Tensor
    weights: Tensor

    @property
    def load(self) -> Tensor:
        """Give the share of all choices that fell on each expert: `[experts]`, sums to 1."""
        count = self.logits.shape[-1]
        chosen = self.selected.new_zeros(count, dtype=torch.float32)
        ones = torch.ones(self.selected.numel(), device=chosen.device)
        return chosen.index_add(0, self.selected.flatten(), ones) / max(1, self.selected.numel())

    @property
    def importance(self) -> Tensor:
        """Give the mean probability of each expert, before any are left out: `[experts]`."""
        return self.logits.float().softmax(-1).mean(0)

    @property
    def balance(self) -> Tensor:
        """Give a loss that is 1 where all experts are chosen equally often, and more elsewhere.

        experts · sum over experts of load · importance; its gradient goes through the importance.
        The authors train without.

        Source: Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4.
        """
        return len(self.load) * (self.load * self.importance).sum()


_WATCHED: ContextVar[list[Routing] | None] = ContextVar("watched", default=None)


@contextmanager
def watch_routing() -> Iterator[list[Routing]]:
    """Collect what every router chooses while this is open, in this thread.

    Nothing is written into a model, and nothing waits for a device. A compiled block is not seen,
    and one whose activations are computed again in the backward pass is seen twice.

    Yields:
        The list that is being filled: for each forward, one entry per router in the order of the
        layers, and in a layer with both kinds first time, then space.

    >>> layer = SpaceExperts(8, 16, experts=4, chosen=2)
    >>> with watch_routing() as seen:
    ...     layer(torch.randn(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    >>> seen[0].selected.shape
    torch.Size([5, 2])
    """
    seen: list[Routing] = []
    token = _WATCHED.set(seen)
    try:
        yield seen
    finally:
        _WATCHED.reset(token)


class Experts(nn.Module):
    """Feed-forward layers, and the router that chooses among them.

    Args:
        width: Of a token.
        hidden: Of each expert.
        experts: How many there are.
        chosen: How many of them each token passes through.
        seen: Width of what the router sees.
    """

    def __init__(self, width: int, hidden: int, *, experts: int, chosen: int, seen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.experts = nn.ModuleList(FeedForward(width, hidden) for _ in range(experts))
        self.gate = nn.Linear(seen, experts, bias=False)

    def route(self, seen: Tensor) -> Routing:
        """Choose for each row of `[choices, seen]`."""
        logits = self.gate(seen)
        top, selected = logits.topk(self.chosen, dim=-1)
        weights = top.softmax(-1, dtype=torch.promote_types(top.dtype, torch.float32))
        routing = Routing(logits, selected, weights.to(seen.dtype))
        if not torch.compiler.is_compiling():
            watched = _WATCHED.get()
            if watched is not None:
                watched.append(routing)
        return routing

    def apply_chosen(self, x: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """Send every token through its experts and add up what they give.

        Args:
            x: `[tokens, width]`.
            selected: `[tokens, k]` int64.
            weights: `[tokens, k]`.

        Returns:
            `[tokens, width]`.
        """
        if torch.compiler.is_compiling() or _has_grouped_product(x.device):
            dtype = x.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            if self._stackable(dtype):
                return self._sorted(x.to(dtype), selected, weights, grouped=True)
            if torch.compiler.is_compiling():
                return self._all(x, selected, weights)
        return self._sorted(x, selected, weights, grouped=False)

    @property
    def layers(self) -> Sequence[FeedForward]:
        """The experts, in order."""
        return cast("Sequence[FeedForward]", self.experts)

    def _stackable(self, dtype: torch.dtype) -> bool:
        """Tell whether the weights are plain ones that a grouped product takes."""
        if dtype != torch.bfloat16:
            return False
        linears = [linear for one in self.layers for linear in (one.w1, one.w2, one.w3)]
        return all(
            type(linear) is nn.Linear
            and type(linear.weight) is nn.Parameter
            and linear.weight.shape[0] % 8 == linear.weight.shape[1] % 8 == 0  # 16 bytes
            for linear in linears
        )

    def _sorted(self, x: Tensor, selected: Tensor, weights: Tensor, *, grouped: bool) -> Tensor:
        """Put the tokens of each expert side by side, and back."""
        chosen = selected.flatten()
        order = chosen.argsort(stable=True)
        picked = x.index_select(0, order // self.chosen)
        experts = torch.arange(len(self.layers), device=x.device)
        ends = torch.searchsorted(chosen[order], experts, right=True)
        out = self._grouped(picked, ends) if grouped else self._each(picked, ends)
        # The way back is a permutation, so that sums over k have one order on every device.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        parts = out.index_select(0, back).unflatten(0, selected.shape)
        return (parts * weights[..., None].to(parts.dtype)).sum(1)

    def _grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        offsets = ends.to(torch.int32)

        def product(x: Tensor, weights: list[Tensor]) -> Tensor:
            stacked = torch.stack([weight.to(x.dtype) for weight in weights])
            return grouped_mm(x, stacked.transpose(1, 2), offs=offsets)

        gate = product(x, [one.w1.weight for one in self.layers])
        up = product(x, [one.w3.weight for one in self.layers])
        return product(swiglu(gate, up), [one.w2.weight for one in self.layers])

    def _each(self, x: Tensor, ends: Tensor) -> Tensor:
        """Call each expert on its tokens; also on none, so that its gradient is there."""
        begins = [0, *ends.tolist()]  # the one place where a device is waited for
        return torch.cat(
            [
                expert(x[begin:end])
                for expert, begin, end in zip(self.layers, begins, begins[1:], strict=False)
            ]
        )

    def _all(self, x: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """Call each expert on all tokens, with weight 0 where it was not chosen."""
        shares = weights.new_zeros(len(x), len(self.layers)).scatter(1, selected, weights)
        parts = [expert(x) for expert in self.layers]
        total = shares[:, :1] * parts[0]
        for index, part in enumerate(parts[1:], 1):
            total = total + shares[:, index : index + 1] * part
        return total


def _has_grouped_product(device: torch.device) -> bool:
    """Tell whether a device has a kernel for it; PyTorch's fallback reads the counts itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 9
    return device.type not in ("cpu", "mps")


class TimeExperts(Experts):
    """Experts that are chosen by the timestep embedding, for all tokens of a sample alike.

    Args:
        width: Of a token.
        hidden: Of each expert.
        experts: How many there are.
        chosen: How many of them a sample passes through.
        time_dim: Width of the timestep embedding.

    Source: Next-DiT-MoE, `TimeMoeLayer`.
    """

    def __init__(
        self, width: int, hidden: int, *, experts: int, chosen: int, time_dim: int
    ) -> None:
        super().__init__(width, hidden, experts=experts, chosen=chosen, seen=time_dim)

    def forward(self, x: Tensor, time: Tensor, arrangement: Arrangement) -> Tensor:
        """Map `[rows, tokens, width]` to the same shape, by `[batch, time_dim]`."""
        routing = self.route(time)
        shape = (*x.shape[:2], self.chosen)
        selected = arrangement.spread(routing.selected).expand(shape).flatten(0, 1)
        weights = arrangement.spread(routing.weights).expand(shape).flatten(0, 1)
        return self.apply_chosen(x.flatten(0, 1), selected, weights).view_as(x)


class SpaceExperts(Experts):
    """Experts that are chosen by the token.

    Args:
        width: Of a token.
        hidden: Of each expert.
        experts: How many there are.
        chosen: How many of them a token passes through.

    Source: Next-DiT-MoE, `SpaceMoeLayer`.
    """

    def __init__(self, width: int, hidden: int, *, experts: int, chosen: int) -> None:
        super().__init__(width, hidden, experts=experts, chosen=chosen, seen=width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[rows, tokens, width]` to the same shape."""
        flat = x.flatten(0, 1)
        routing = self.route(flat)
        return self.apply_chosen(flat, routing.selected, routing.weights).view_as(x)
