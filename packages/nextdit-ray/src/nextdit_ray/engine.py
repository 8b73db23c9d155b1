"""The driver's side: start Ray Train, show progress, pass Ctrl-C on, explain failures."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nextdit_core import Recipe, UserError
from nextdit_core.progress import Progress
from nextdit_core.training.loop import prepare
from nextdit_core.training.run_folder import RunFolder, step_of

__all__ = ["RayEngine"]

#: Read by Ray in the driver; what the user has set stays.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
#: The watcher of preempted nodes is a process of its own; one machine needs none.
LOCAL_SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
OBJECT_STORE_BYTES = 150 * 2**20
POLL_SECONDS = 0.2


class RayEngine:
    """Run the training loop on Ray Train workers.

    Without an address Ray is started on this machine for the run and stopped after it. With
    one ("auto", "ray://host:10001", ...) the run joins that cluster; its run folder then has
    to be on storage that all nodes share.
    """

    def train(self, recipe: Recipe) -> None:
        """Train until the recipe's step count, resuming what is in its run folder.

        A worker that dies is replaced, up to `max_failures` times, and training goes on from
        the newest checkpoint. Ctrl-C saves a checkpoint and stops; a second one stops at once.

        Args:
            recipe: The run.

        Raises:
            UserError: The recipe does not fit, the cluster is too small or cannot be reached,
                or training failed for a reason that another try would not cure.
            KeyboardInterrupt: Training was stopped by Ctrl-C.
        """
        prepare(recipe)
        run = RunFolder(recipe.out)
        run.open(recipe)
        newest = run.newest()
        done = 0 if newest is None else step_of(newest)
        run.rewind(done)
        starting = f"starting {recipe.workers} Ray worker{'s' * (recipe.workers > 1)}"
        with (
            Progress("training", recipe.steps, done=done, note=starting) as progress,
            _cluster(recipe),
        ):
            stopped = _fit(recipe, run, progress)
        failure = run.failure()
        if failure is not None:
            raise UserError(failure)
        if stopped:
            raise KeyboardInterrupt


@contextmanager
def _cluster(recipe: Recipe) -> Iterator[None]:
    """Connect to Ray; leave it as it was found."""
    local = recipe.address is None
    for name, value in (SETTINGS | LOCAL_SETTINGS if local else SETTINGS).items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if local:
            options |= {
                "address": "local",
                "num_cpus": max(recipe.workers, os.cpu_count() or 1),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        else:
            options["address"] = recipe.address
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = recipe.address or "this machine"
            raise UserError(f"cannot start Ray on {where}: {error}") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _fit(recipe: Recipe, run: RunFolder, progress: Progress) -> bool:
    """Run the trainer in a thread, so that this one can show progress and hear Ctrl-C."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from nextdit_ray.worker import train_worker

    # An environment switch decides what ray.train exports, so a type checker sees two of each.
    options: Any = ray.train
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = recipe.device == "cuda" or (recipe.device == "auto" and gpus >= recipe.workers)
    kind, there = ("GPU", gpus) if use_gpu else ("CPU", int(resources.get("CPU", 0)))
    if there < recipe.workers:
        raise UserError(
            f"workers is {recipe.workers} and the cluster has {there} {kind}s; use "
            f"workers={max(1, there)} or add nodes"
        )
    settings = recipe.to_dict() | {"out": str(run.path)}
    if recipe.text_cache is not None:
        settings["text_cache"] = str(Path(recipe.text_cache).expanduser().absolute())
    if recipe.init_from is not None and Path(recipe.init_from).expanduser().exists():
        settings["init_from"] = str(Path(recipe.init_from).expanduser().absolute())
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"recipe": settings, "folder": str(Path.cwd())},
        scaling_config=options.ScalingConfig(num_workers=recipe.workers, use_gpu=use_gpu),
        run_config=options.RunConfig(
            # Ray resumes a name that it has seen; what to resume is ours to find, in `run`.
            name=f"start-{time.time_ns()}",
            storage_path=str(run.path / "ray"),
            failure_config=options.FailureConfig(max_failures=recipe.max_failures),
            logging_config=options.LoggingConfig(log_level="ERROR"),
        ),
    )
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread below
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    with _interrupts(run) as interrupts:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            row = run.last_row()
            if row is not None and row["step"] != progress.done:
                progress.to(row["step"], f"loss {row['loss']:.4f}")
            if interrupts[0] > 1:
                raise KeyboardInterrupt
    if errors and run.failure() is None:
        raise UserError(
            f"training failed after {recipe.max_failures} restarts: {_cause(errors[0])}; the "
            f"same command resumes from the newest checkpoint in {run.path}"
        ) from errors[0]
    return interrupts[0] > 0


def _cause(error: BaseException) -> str:
    """Give the last line of what the first failed worker said."""
    failures = getattr(error, "worker_failures", None) or {}
    text = str(next(iter(failures.values()), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__


@contextmanager
def _interrupts(run: RunFolder) -> Iterator[list[int]]:
    """Count Ctrl-C; at the first, leave a request that all workers see."""
    count = [0]
    if threading.current_thread() is not threading.main_thread():
        yield count
        return

    def request(signum: int, frame: FrameType | None) -> None:
        count[0] += 1
        run.stop_file.touch()

    before = signal.signal(signal.SIGINT, request)
    try:
        yield count
    finally:
        signal.signal(signal.SIGINT, before)
