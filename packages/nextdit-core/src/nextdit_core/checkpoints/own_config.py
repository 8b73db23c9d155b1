"""The config.json of a backbone's own folder, with the version of the format."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["BACKBONE_FORMAT", "own_config_values", "read_own_config"]

#: Raised when a reader of the version before could not read the folder. Version 2 brought experts,
#: patch_size and sample_size; what it lacks has the meaning that it had before.
BACKBONE_FORMAT = 2
KEY = "format_version"


def own_config_values(config: NextDiTConfig) -> dict[str, Any]:
    """Give the values of config.json."""
    return {KEY: BACKBONE_FORMAT, **config.to_dict()}


def read_own_config(place: Path, values: Mapping[str, Any]) -> NextDiTConfig:
    """Read the values of config.json.

    Args:
        place: What to call the checkpoint.
        values: Of config.json, of this version or an older one; without one they are of the first.

    Returns:
        The sizes.

    Raises:
        UserError: They are of a newer version, or do not fit.
    """
    found = values.get(KEY, 1)
    if not isinstance(found, int) or not 1 <= found <= BACKBONE_FORMAT:
        raise UserError(
            f"{place} has backbone format version {found!r}; nextdit-core "
            f"{version('nextdit-core')} reads versions 1 to {BACKBONE_FORMAT}; use the "
            f"nextdit-core that wrote it, or a newer one: pip install -U nextdit-core"
        )
    return NextDiTConfig.from_dict({key: value for key, value in values.items() if key != KEY})
