"""Find solvers by name through the entry points of installed distributions.

Built-in solvers come through the same door as those of strangers: an entry point of the group
`flowsolvers.solvers` that names a `Method`. Metadata is read once; listing imports nothing.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from flowsolvers.method import Method
from flowsolvers.spelling import closest_first

__all__ = ["GROUP", "method", "solvers"]

#: The entry-point group that solvers are published in.
GROUP = "flowsolvers.solvers"


@cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if _origin(other) != _origin(entry):
            raise ValueError(
                f"two distributions claim the solver {entry.name!r}: {_origin(other)} and "
                f"{_origin(entry)}; uninstall one of them"
            )
    return found


def _origin(entry: EntryPoint) -> str:
    dist = entry.dist
    return "an unnamed distribution" if dist is None else f"{dist.name} {dist.version}"


def solvers() -> tuple[str, ...]:
    """List the names of the installed solvers, without importing any of them.

    Returns:
        The names in alphabetical order.

    Raises:
        ValueError: Two distributions claim one name.

    Example:
        >>> "midpoint" in solvers()
        True
    """
    return tuple(sorted(_entries()))


def method(name: str) -> Method:
    """Load the solver that a name stands for.

    Args:
        name: One of `solvers()`.

    Returns:
        The method, such as a `Tableau`.

    Raises:
        ValueError: The name is not installed, is claimed by two distributions, cannot be
            imported, or is not a `Method`.

    Example:
        >>> method("heun").order
        2
    """
    entry = _entries().get(name)
    if entry is None:
        accepted = ", ".join(closest_first(name, _entries()))
        raise ValueError(f"unknown solver {name!r}; accepted, closest first: {accepted}")
    try:
        loaded = entry.load()
    except Exception as error:
        raise ValueError(
            f"solver {name!r} of {_origin(entry)} failed to load from {entry.value}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(loaded, Method):
        raise ValueError(
            f"solver {name!r} of {_origin(entry)} is a {type(loaded).__name__}; its entry point "
            f"{entry.value} must name a flowsolvers.Method, such as a flowsolvers.Tableau"
        )
    return loaded
