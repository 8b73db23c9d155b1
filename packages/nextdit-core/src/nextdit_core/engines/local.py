"""Train in this process, or in the processes that torchrun started."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from nextdit_core.errors import UserError
from nextdit_core.progress import Progress
from nextdit_core.recipe import Recipe
from nextdit_core.training.loop import prepare, train
from nextdit_core.training.run_folder import RunFolder, step_of

__all__ = ["LocalEngine", "pick_device"]


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Choose a device.

    Args:
        wanted: "auto" (CUDA, then MPS, then CPU), or a torch device such as "cpu" or "cuda:1".
        local_rank: Which CUDA device of this machine, where `wanted` names none.

    Returns:
        The device.

    Raises:
        UserError: The device is not there.
    """
    if wanted == "auto":
        wanted = "cpu"
        if torch.cuda.is_available():
            wanted = "cuda"
        elif torch.backends.mps.is_available():
            wanted = "mps"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device {wanted!r} is not one; accepted: auto, cpu, cuda, mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device is 'cuda' and torch sees no CUDA device; use device=cpu")
        return torch.device("cuda", local_rank if device.index is None else device.index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is 'mps' and torch sees none; use device=cpu")
    return device


class _LocalRuntime:
    device: torch.device

    def __init__(self, device: torch.device, progress: Progress | None) -> None:
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.device = device
        self.stop = False
        self._progress = progress

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        if self._progress is not None:
            self._progress.to(int(metrics["step"]), f"loss {metrics['loss']:.4f}")

    def stop_requested(self) -> bool:
        return self.stop


class LocalEngine:
    """Run the loop here; under torchrun, as one of its processes."""

    def train(self, recipe: Recipe) -> None:
        """Train until the recipe's step count, resuming what is in its run folder.

        Ctrl-C saves a checkpoint at the next report and stops; a second one stops at once.

        Args:
            recipe: The run.

        Raises:
            UserError: The recipe asks for more workers than this process has.
            KeyboardInterrupt: Training was stopped by Ctrl-C.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if recipe.workers != world:
            raise UserError(
                f"workers is {recipe.workers} and engine 'local' has {world} here; use "
                f"engine=ray, workers={world}, or torchrun --nproc-per-node {recipe.workers} "
                f"-m nextdit_core train ..."
            )
        prepare(recipe)
        device = pick_device(recipe.device, local_rank)
        run = RunFolder(recipe.out)
        if world > 1:
            cuda = device.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        try:
            self._train(recipe, run, device)
        finally:
            if world > 1:
                dist.destroy_process_group()

    def _train(self, recipe: Recipe, run: RunFolder, device: torch.device) -> None:
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            run.open(recipe)
        if dist.is_initialized():
            dist.barrier()
        newest = run.newest()
        done = 0 if newest is None else step_of(newest)
        if not first:
            train(recipe, _LocalRuntime(device, None))
            return
        with Progress("training", recipe.steps, done=done) as progress:
            runtime = _LocalRuntime(device, progress)
            with _interrupt_between_steps(runtime):
                train(recipe, runtime)
        if runtime.stop:
            raise KeyboardInterrupt


@contextmanager
def _interrupt_between_steps(runtime: _LocalRuntime) -> Iterator[None]:
    """Turn the first Ctrl-C into a request that the loop reads between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def request(signum: int, frame: FrameType | None) -> None:
        runtime.stop = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
