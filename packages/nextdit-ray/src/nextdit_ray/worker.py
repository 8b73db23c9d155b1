"""A worker's side: the training loop with Ray Train as its surroundings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device

from nextdit_core import Recipe, UserError
from nextdit_core.training.loop import train
from nextdit_core.training.run_folder import RunFolder

__all__ = ["RayRuntime", "train_worker"]


class RayRuntime:
    """One Ray Train worker, as the training loop sees it.

    Args:
        run: The run folder, where a request to stop is left.
    """

    device: torch.device

    def __init__(self, run: RunFolder) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = get_device()
        self._run = run

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Tell Ray Train how far training is.

        The checkpoint is in the run folder, where every later start finds it, so Ray is not
        given a second copy to keep.
        """
        ray.train.report(dict(metrics))

    def stop_requested(self) -> bool:
        """Say whether the driver heard Ctrl-C."""
        return self._run.stop_file.exists()


def train_worker(config: Mapping[str, Any]) -> None:
    """Run the loop on one worker.

    An error of the user's is written to the run folder; Ray then restarts the workers, which
    end at once, since another try would fail in the same way.

    Args:
        config: `recipe`, as `Recipe.to_dict` gives it, with an absolute `out`, and `folder`,
            from which its relative paths are taken where this machine has it.
    """
    if os.path.isdir(config["folder"]):
        os.chdir(config["folder"])
    recipe = Recipe.from_dict(config["recipe"])
    run = RunFolder(recipe.out)
    if run.failure() is not None:
        return
    # Workers of one machine with a thread per core each would wait for one another.
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))
    try:
        train(recipe, RayRuntime(run))
    except UserError as error:
        run.fail(str(error))
        raise
