"""Find parts by name through the entry points of installed distributions.

Built-in parts come through the same door as those of strangers. Metadata is read once and
cached; listing loads nothing; a part is imported when it is asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nextdit_core.errors import UserError, unknown_name

__all__ = ["GROUPS", "Part", "load", "parts", "refresh"]

#: Every entry-point group that this package reads, with the word for one member.
GROUPS = {
    "nextdit.modalities": "modality",
    "nextdit.text_encoders": "text encoder",
    "nextdit.autoencoders": "autoencoder",
    "nextdit.datasets": "dataset",
    "nextdit.engines": "engine",
    "nextdit.kernels": "kernels",
    "nextdit.commands": "command",
}

#: Parts that are known to exist although their distribution may not be installed.
KNOWN = {
    "nextdit.modalities": {"image": "modality-image"},
    "nextdit.autoencoders": {"kl-image": "modality-image[vae]"},
    "nextdit.datasets": {"digits": "modality-image[digits]", "folder": "modality-image"},
    "nextdit.engines": {"ray": "nextdit-ray"},
    "nextdit.kernels": {"triton": "nextdit-kernels"},
    "nextdit.commands": {"demo": "modality-image[digits] nextdit-ray"},
}


@dataclass(frozen=True)
class Part:
    """One named part and the distribution that brings it."""

    group: str
    name: str
    distribution: str
    version: str
    target: str

    @property
    def origin(self) -> str:
        """The distribution and its version, as in `modality-image 0.1.0`."""
        return f"{self.distribution} {self.version}"


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.get(entry.name)
        if other is not None and _part(other).distribution != _part(entry).distribution:
            raise UserError(
                f"two distributions claim the {GROUPS[group]} {entry.name!r}: "
                f"{_part(other).origin} and {_part(entry).origin}; uninstall one of them"
            )
        found[entry.name] = entry
    return found


def _part(entry: EntryPoint) -> Part:
    dist = entry.dist
    name, version = (dist.name, dist.version) if dist is not None else ("unknown", "?")
    return Part(entry.group, entry.name, name, version, entry.value)


def refresh() -> None:
    """Forget the cached metadata, after a package was installed in a running process."""
    _entries.cache_clear()


def parts(group: str) -> dict[str, Part]:
    """List the parts of a group without importing any of them.

    Args:
        group: An entry-point group, one of `GROUPS`.

    Returns:
        The parts by name, in alphabetical order.

    Raises:
        UserError: Two distributions claim one name.
    """
    return {name: _part(entry) for name, entry in sorted(_entries(group).items())}


def load(group: str, name: str) -> Any:
    """Import the part that a name stands for.

    Args:
        group: An entry-point group, one of `GROUPS`.
        name: The part's name.

    Returns:
        The object behind the entry point.

    Raises:
        UserError: The name is not installed, or its module cannot be imported.
    """
    kind = GROUPS[group]
    entries = _entries(group)
    if name not in entries:
        package = KNOWN.get(group, {}).get(name)
        fix = f"install it with: pip install {package}" if package else ""
        raise unknown_name(kind, name, entries, fix)
    entry = entries[name]
    try:
        return entry.load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{kind} {name!r} of {_part(entry).origin} failed to load from {entry.value}: "
            f"{type(error).__name__}: {error}"
        ) from error
