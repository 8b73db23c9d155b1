"""How a request is guided: the scale, the rule, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

import flowsolvers
from flowsolvers import Context, Velocity
from nextdit_core.errors import UserError

__all__ = ["Guidance"]

#: A rule of guidance, as `flowsolvers.guided` takes it.
Rule = Callable[[Tensor, Tensor, "float | Tensor", Context | None], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Guidance away from the empty or the negative prompt.

    Args:
        scale: 1 is no guidance, and the model is then called once an evaluation; or a function of
            t, which is then called with a float in [0, 1], 0 = noise.
        rule: "cfg", "cfg-zero*", "apg", "renorm", "renorm-clip", or a function as
            `flowsolvers.guided` takes it, such as `flowsolvers.APG(eta=0.1)`.
        interval: First and last time of guidance in [0, 1], 0 = noise; outside, the model is
            called once. (0, 0.25) is Lumina-2's truncation.
        zero_until: Before this time the sample stands still, as in CFG-Zero*.
        channels: Guide these channels of the latent only, the others being those under the
            condition; (0, 1, 2) of 4 is how Lumina-Next is guided. None guides all.

    Raises:
        UserError: A number is out of range, or the rule is unknown.

    >>> Guidance(4.0, "cfg-zero*", interval=(0.1, 0.9)).guides
    True
    """

    scale: float | Callable[[float], float] = 4.0
    rule: str | Rule = "cfg"
    interval: tuple[float, float] = (0.0, 1.0)
    zero_until: float = 0.0
    channels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the numbers and the rule."""
        if self.channels is not None:
            if not self.channels or min(self.channels) < 0:
                raise UserError(
                    f"guidance channels are {self.channels!r}; expected some, counted from 0, or "
                    f"None for all"
                )
            object.__setattr__(self, "channels", tuple(self.channels))
        try:
            self._guided(_still, self.rule)
        except (TypeError, ValueError) as error:
            raise UserError(f"guidance: {error}") from error

    @property
    def guides(self) -> bool:
        """Whether anything is done."""
        return self.scale != 1.0

    def velocity(
        self,
        pair: Velocity,
        alone: Velocity,
        lengths: Sequence[int],
        token_dim: int,
        latent_channels: int,
    ) -> Velocity:
        """Guide the velocity of packed tokens.

        Args:
            pair: Takes the tokens twice, first under the condition.
            alone: Takes them once, under the condition.
            lengths: Tokens of each sample.
            token_dim: Numbers in a token.
            latent_channels: Channels of a latent; number i of a token is of i % latent_channels.

        Returns:
            The guided velocity.

        Raises:
            UserError: The latent lacks a channel that is to be guided.
        """
        numbers = None
        if self.channels is not None:
            if max(self.channels) >= latent_channels:
                raise UserError(
                    f"guidance channels are {self.channels}; latents have {latent_channels}: "
                    f"expected 0 to {latent_channels - 1}"
                )
            numbers = [i for i in range(token_dim) if i % latent_channels in self.channels]
        rule = flowsolvers.guidance_rule(self.rule) if isinstance(self.rule, str) else self.rule
        if self.rule == "cfg":  # each number by itself
            return self._guided(pair, rule, alone, numbers)
        return self._guided(pair, _EachSample(rule, lengths), alone, numbers)

    def _guided(
        self,
        pair: Velocity,
        rule: str | Rule,
        alone: Velocity | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Velocity:
        return flowsolvers.guided_batch(
            pair,
            scale=self.scale,
            interval=self.interval,
            rule=rule,
            zero_until=self.zero_until,
            cond=alone,
            channels=numbers,
            dim=-1,
        )


class _EachSample:
    """A rule that takes norms over a sample, on packed tokens: one rule for each sample."""

    def __init__(self, rule: Rule, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.rules = [deepcopy(rule) for _ in lengths]  # a momentum remembers its own sample

    def __call__(
        self, c: Tensor, u: Tensor, scale: float | Tensor, context: Context | None
    ) -> Tensor:
        parts = zip(self.rules, c.split(self.lengths), u.split(self.lengths), strict=True)
        return torch.cat([rule(a[None], b[None], scale, context)[0] for rule, a, b in parts])

    def reset(self) -> None:
        """Forget an earlier solve."""
        for rule in self.rules:
            reset = getattr(rule, "reset", None)
            if reset is not None:
                reset()


def _still(t: Tensor, x: Tensor) -> Tensor:
    return x
