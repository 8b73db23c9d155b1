"""A step of sampling, as its caller sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

import flowsolvers
from nextdit_core.errors import UserError
from nextdit_core.modality import Modality, Size
from nextdit_core.tokens import Tokens

__all__ = ["Step", "stream"]


class Step:
    """A step's end, as `on_step` of a request sees it.

    Args:
        reached: What the solver says.
        layout: Positions and lengths of the batch.
        modality: Turns tokens into latents and media.
        sizes: Of the samples.
        path: Of the flow.

    Attributes:
        t: The time there, 0 = noise and 1 = data.
        step: Index of the step that ends, from 0.
        steps: Number of steps.
        evaluations: Velocity evaluations made so far.
    """

    def __init__(
        self,
        reached: flowsolvers.Reached[Tensor],
        layout: Tokens,
        modality: Modality,
        sizes: Sequence[Size],
        path: flowsolvers.Path,
    ) -> None:
        self._reached, self._layout, self._modality, self._sizes = reached, layout, modality, sizes
        self._path = path
        self.t, self.step = reached.t, reached.step
        self.steps, self.evaluations = reached.steps, reached.evaluations

    def stop(self) -> None:
        """End the request here; it returns the samples as they are now."""
        self._reached.stop()

    def latents(self) -> list[Tensor]:
        """Give the latent of each sample as it is now, on the CPU."""
        return self._latents(self._reached.x)

    def data(self) -> list[Tensor]:
        """Give the latent that each sample is on its way to: at no cost.

        It follows from x, t and v of the latest evaluation, as x + (1 - t)·v on the linear path; at
        t = 1 it is the sample itself.
        """
        return self.latents() if self.t == 1.0 else self._latents(self._reached.data(self._path))

    def preview(self) -> list[Any]:
        """Decode `data()`, for a look on the way; a large autoencoder takes its time."""
        return [self._modality.decode(one) for one in self.data()]

    def go_on_from(self, latents: Sequence[Tensor]) -> None:
        """Put other latents in the place of those of now.

        Args:
            latents: One of each sample, of the same sizes.

        Raises:
            UserError: Their number or a size differs.
        """
        sizes = [tuple(self._modality.size(one)) for one in latents]
        if sizes != [tuple(size) for size in self._sizes]:
            raise UserError(f"latents have sizes {sizes}; expected {list(self._sizes)}")
        tokens = torch.cat([self._modality.tokenize(one) for one in latents])
        self._reached.x = tokens.to(self._reached.x)

    def _latents(self, x: Tensor) -> list[Tensor]:
        parts = zip(self._layout.with_values(x).split(), self._sizes, strict=True)
        return [self._modality.detokenize(part.float().cpu(), size) for part, size in parts]


def stream(run: Callable[[Callable[[Step], object]], object]) -> Iterator[Step]:
    """Turn a request that calls at each step's end into an iterator over the steps.

    The request runs in a thread of its own and waits while its caller looks at a step. Leaving the
    loop stops it.

    Args:
        run: The request; it is given what to call.

    Yields:
        Each step.

    Raises:
        Exception: What the request raised.
    """
    reached: SimpleQueue[Step | BaseException | None] = SimpleQueue()
    looked_at = threading.Semaphore(0)
    left = threading.Event()

    def on_step(step: Step) -> None:
        reached.put(step)
        looked_at.acquire()
        if left.is_set():
            step.stop()

    def work() -> None:
        try:
            run(on_step)
        except BaseException as error:  # raised again where the caller is
            reached.put(error)
        else:
            reached.put(None)

    thread = threading.Thread(target=work, name="nextdit-stream", daemon=True)
    thread.start()
    try:
        while (event := reached.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
            looked_at.release()
    finally:
        left.set()
        looked_at.release()
        thread.join()
