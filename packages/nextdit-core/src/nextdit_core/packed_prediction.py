"""A backbone on packed tokens, as a solver calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import flowsolvers
import rope3d
from nextdit_core.arrangement import arrange
from nextdit_core.backbone import NextDiT
from nextdit_core.context_drop import ContextDrop
from nextdit_core.prepared_conditioning import PreparedConditioning
from nextdit_core.tokens import Tokens

__all__ = ["PackedPrediction"]


class PackedPrediction:
    """What the backbone predicts of packed tokens under one condition.

    It changes nothing in the backbone, so that several can share one, also in threads.

    Args:
        backbone: The network.
        prepared: The condition, as `NextDiT.prepare` gives it.
        layout: Positions and lengths; its values are not looked at.
        drop: By how much keys and values are pooled, by the time.
        options: Other keyword arguments of `NextDiT.forward`.
    """

    takes_context = True

    def __init__(
        self,
        backbone: NextDiT,
        prepared: PreparedConditioning,
        layout: Tokens,
        drop: ContextDrop,
        options: Mapping[str, Any],
    ) -> None:
        self.backbone, self.layout = backbone, layout
        # Samples of different lengths are packed, and then their text is too, once.
        packs = layout.equal_length is None and options.get("pad_to") is None
        self.prepared = prepared.in_one_row if packs else prepared
        self.drop = drop
        # Angles that do not follow the time are the same in every step.
        rope = options.get("rope") or backbone.rope
        if isinstance(rope, rope3d.Rope):
            rows = arrange(layout, pack=self.prepared.packed, pad_to=options.get("pad_to"))
            rope = rope.rotation(rows.place(layout.positions))
        self.options = {**options, "rope": rope}
        self.poolings = drop.poolings(layout, backbone.config.axes)

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which what is pooled changes."""
        return tuple(until for until, _ in self.drop.schedule)

    def __call__(
        self, t: Tensor, x: Tensor, *, context: flowsolvers.Context | None = None
    ) -> Tensor:
        """Return the prediction, `[total_tokens, token_dim]`."""
        pooling = None
        if self.drop.schedule:
            now = t.item() if context is None else _now(context)
            pooling = self.poolings[self.drop.factor(now, self.backbone.config.axes)]
        return self.backbone(
            self.layout.with_values(x),
            t.float().expand(self.layout.batch),
            self.prepared,
            pooling=pooling,
            **self.options,
        )


def _now(context: flowsolvers.Context) -> float:
    """Give the time; at the end of a step, one that is still inside it."""
    start, end = context.t_start, context.t_next
    if start is not None and end is not None and context.t == end:
        return context.t - 1e-6 * (end - start)
    return context.t
