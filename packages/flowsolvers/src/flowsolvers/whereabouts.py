"""Where in an adaptive solve each evaluation stands."""

from __future__ import annotations

from flowsolvers.context import Context, model_rows
from flowsolvers.embedded import State

__all__ = ["Whereabouts"]


class Whereabouts:
    """Follows a march, as its watch, and makes the context of each evaluation.

    Args:
        velocity: What is evaluated, for counting its model rows.
        start: Time at which the march starts.
    """

    def __init__(self, velocity: object, start: float) -> None:
        self._velocity = velocity
        self._t, self._t_next = start, None
        self._step = self._stage = self._evaluation = 0
        #: How often the rows of the state went through a model.
        self.rows = 0

    _t_next: float | None

    def __call__(self, event: str, t: float, t_next: float, x: State) -> None:
        """Note that an attempt begins or was accepted."""
        if event == "step":
            self._t, self._t_next, self._stage = t, t_next, 1
        elif event == "accept":
            self._t, self._t_next, self._stage = t_next, None, 0
            self._step += 1

    def context(self, t: float) -> Context:
        """Return the context of the next evaluation, which is at t."""
        found = Context(
            t=t,
            t_next=self._t_next,
            step=self._step,
            steps=None,
            stage=self._stage,
            evaluation=self._evaluation,
            evaluations=None,
            is_last=None,
            t_start=self._t,
        )
        self._evaluation += 1
        self._stage += self._t_next is not None
        self.rows += model_rows(self._velocity, found)
        return found
