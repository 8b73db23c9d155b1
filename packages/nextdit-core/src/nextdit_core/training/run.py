"""Run a recipe with the engine that it names."""

from __future__ import annotations

import sys
from pathlib import Path

from nextdit_core import registry
from nextdit_core.errors import UserError
from nextdit_core.recipe import Recipe
from nextdit_core.training.run_folder import RunFolder

__all__ = ["train"]


def train(recipe: Recipe) -> Path:
    """Train until the recipe's step count, from where its run folder stands.

    Args:
        recipe: The run. A finished run is left as it is, and no engine is started.

    Returns:
        The newest checkpoint, a model folder that `Pipeline.from_pretrained` takes.

    Raises:
        UserError: The recipe, the run folder or the engine cannot be used.
        KeyboardInterrupt: Training was stopped; the same call resumes.
    """
    run = RunFolder(recipe.out)
    finished = run.finished(recipe)
    if finished is not None:
        return finished
    engine = registry.load("nextdit.engines", recipe.engine)()
    try:
        engine.train(recipe)
    except KeyboardInterrupt:
        newest = run.newest()
        kept = f"the last checkpoint is {newest}" if newest else "no checkpoint was written yet"
        print(f"stopped; {kept}. The same command resumes.", file=sys.stderr)
        raise
    newest = run.newest()
    if newest is None:
        raise UserError(
            f"engine {recipe.engine!r} ended without a checkpoint in {run.path}; see "
            f"{run.events_file}"
        )
    return newest
