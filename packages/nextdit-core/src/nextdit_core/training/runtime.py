"""The little that the training loop knows of where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from nextdit_core.recipe import Recipe

__all__ = ["Engine", "Runtime"]


class Runtime(Protocol):
    """One worker's surroundings, supplied by an engine.

    Where `world_size` is above 1, the default torch.distributed process group is ready.

    Attributes:
        rank: This worker's number, from 0.
        world_size: How many workers there are.
    """

    rank: int
    world_size: int

    @property
    def device(self) -> torch.device:
        """Where this worker computes."""
        ...

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Tell the engine how far training is; every rank calls it equally often.

        Args:
            metrics: "step", "loss", and the rates that `Throughput.numbers` gives.
            checkpoint: A complete checkpoint folder that was just written, or None.
        """
        ...

    def stop_requested(self) -> bool:
        """Say whether someone asked this worker to stop after the current step."""
        ...


class Engine(Protocol):
    """A way to run `nextdit_core.training.loop.train` on one or more workers."""

    def train(self, recipe: Recipe) -> None:
        """Train until the recipe's step count, resuming what is in its run folder.

        Raises:
            UserError: The engine cannot run this recipe.
            KeyboardInterrupt: Training was asked to stop; the last checkpoint is usable.
        """
        ...
