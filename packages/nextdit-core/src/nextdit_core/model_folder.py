"""Where a saved model is: a model folder, or the newest complete checkpoint of a run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from nextdit_core.errors import UserError
from nextdit_core.folder import check_complete, read_object

__all__ = [
    "CARD",
    "CHECKPOINTS",
    "FORMAT_VERSION",
    "check_format",
    "find_model",
    "is_saved_model",
    "newest_checkpoint",
]

FORMAT_VERSION = 1
CARD = "nextdit.json"
CHECKPOINTS = "checkpoints"


def is_saved_model(path: Path) -> bool:
    """Say whether a folder is a model or a run of this package, complete or not."""
    return (path / CARD).is_file() or (path / CHECKPOINTS).is_dir()


def find_model(path: str | Path) -> Path:
    """Find the model folder that a path stands for.

    Args:
        path: A model folder, or a run folder, whose newest complete checkpoint is taken.

    Returns:
        The model folder, checked to be complete and of this format version.

    Raises:
        UserError: There is none, or it is truncated or of another version.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(
                f"{path} holds no complete checkpoint yet; train it first: nextdit train "
                f"{path / 'recipe.toml'}"
            )
        path = newest
    if path.is_dir() and not (path / CARD).is_file():
        raise UserError(
            f"{path} holds no {CARD}, so it is not a saved nextdit model; give the folder of a "
            f"run or of a model. A backbone alone (ours, the authors' or diffusers') is loaded by "
            f"NextDiT.from_pretrained and described by nextdit info"
        )
    check_complete(path)
    check_format(path)
    return path


def check_format(path: Path) -> None:
    """Refuse a model folder of another format version.

    Raises:
        UserError: The version is not the one that this package reads.
    """
    found = read_object(path / CARD).get("format_version")
    if found != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {found!r}; nextdit-core {version('nextdit-core')} reads "
            f"version {FORMAT_VERSION}; use the nextdit-core that wrote it, or a newer one: "
            f"pip install -U nextdit-core"
        )


def newest_checkpoint(run: Path) -> Path | None:
    """Find the newest complete checkpoint of a run folder; incomplete ones are passed over."""
    for folder in sorted((run / CHECKPOINTS).glob("step_*"), reverse=True):
        try:
            check_complete(folder)
        except UserError:
            continue
        return folder
    return None
