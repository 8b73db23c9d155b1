"""The config.json of a backbone's own folder, with the version of the format."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["BACKBONE_FORMAT", "own_config_values", "read_own_config"]

#: Raised when a reader of the version before would misread the folder.
BACKBONE_FORMAT = 1
KEY = "format_version"


def own_config_values(config: NextDiTConfig) -> dict[str, Any]:
    """Give the values of config.json."""
    return {KEY: BACKBONE_FORMAT, **config.to_dict()}


def read_own_config(place: Path, values: Mapping[str, Any]) -> NextDiTConfig:
    """Read the values of config.json.

    Args:
        place: What to call the checkpoint.
        values: Of config.json. Without a version they are of the first.

    Returns:
        The sizes.

    Raises:
        UserError: They are of another version, or do not fit.
    """
    found = values.get(KEY, 1)
    if found != BACKBONE_FORMAT:
        raise UserError(
            f"{place} has backbone format version {found!r}; nextdit-core "
            f"{version('nextdit-core')} reads version {BACKBONE_FORMAT}; use the nextdit-core that "
            f"wrote it, or a newer one: pip install -U nextdit-core"
        )
    return NextDiTConfig.from_dict({key: value for key, value in values.items() if key != KEY})
