"""Backends: who carries out a rotation, found through the entry points of distributions.

Metadata is read once and cached; nothing is imported until a backend is asked for by name, or a
tensor on CUDA makes a faster one worth importing. On other devices the reference runs unless a
backend is named, and no metadata is read at all.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.metadata import EntryPoint
from typing import Protocol, runtime_checkable

from torch import Tensor

from rope3d import plugins
from rope3d.compile_constant import compile_constant
from rope3d.reference import REFERENCE

__all__ = [
    "GROUP",
    "VARIABLE",
    "Backend",
    "WritingBackend",
    "choose",
    "explain_rotation",
    "installed",
    "load",
    "refresh",
]

#: The entry-point group in which a distribution offers a backend.
GROUP = "rope3d.backends"

#: The environment variable that names a backend for a whole process.
VARIABLE = "ROPE3D_BACKEND"


@runtime_checkable
class Backend(Protocol):
    """What an object behind an entry point of the group `rope3d.backends` must offer."""

    @property
    def name(self) -> str:
        """The name of its entry point."""
        ...

    def why_not(self, q: Tensor, k: Tensor) -> str | None:
        """Say why these tensors cannot be served, or None if they can.

        Runs on every call and inside torch.compile: look at devices, dtypes, shapes and strides
        only, never at values.

        Args:
            q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
            k: As `q`, with its own number of heads.

        Returns:
            A reason that a reader can act on, or None.
        """
        ...

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate out of place, differentiably, as `rope3d.rotate` documents.

        Args:
            q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`, any strides.
            k: As `q`, with its own number of heads.
            cos: `[tokens, pairs]`, or for dense q `[batch or 1, tokens, pairs]`; float32.
            sin: As `cos`.

        Returns:
            The rotated `(q, k)`, same shapes and dtypes.
        """
        ...


@runtime_checkable
class WritingBackend(Backend, Protocol):
    """A backend that can also rotate in place; for others the result is copied into q and k."""

    def rotate_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate in place; called eagerly only, where no gradient is recorded.

        Args:
            q: As in `rotate`; no two elements of q and k share memory.
            k: As `q`, with its own number of heads.
            cos: As in `rotate`.
            sin: As `cos`.
        """
        ...


#: Backends that have been imported. The reference needs no look-up, so that a rotation on the CPU
#: reads no metadata.
_LOADED: dict[str, Backend] = {REFERENCE.name: REFERENCE}


def installed() -> dict[str, EntryPoint]:
    """List the backends of all installed distributions by name, importing none of them.

    Returns:
        Entry points by name, in alphabetical order.

    Raises:
        RuntimeError: Two distributions claim one name.
    """
    return plugins.installed(GROUP)


def load(name: str) -> Backend:
    """Import a backend by name.

    Args:
        name: A name that `installed` lists.

    Returns:
        The backend.

    Raises:
        ValueError: The name is not installed.
        ImportError: The backend failed to import, or what it names is not a backend.
        RuntimeError: Two distributions claim one name.
    """
    backend: Backend = plugins.load(GROUP, name, ("name", "why_not", "rotate"), VARIABLE)
    _LOADED[name] = backend
    return backend


def refresh() -> None:
    """Forget what was found and imported, after a package was installed in a running process."""
    plugins.refresh()
    _automatic.cache_clear()
    _LOADED.clear()
    _LOADED[REFERENCE.name] = REFERENCE


def choose(
    q: Tensor, k: Tensor, backend: str | None = None, *, reference_only: str | None = None
) -> Backend:
    """Pick the backend for two tensors.

    The argument decides, else the environment variable ROPE3D_BACKEND, else the first installed
    backend (by name) that serves the tensors if they are on CUDA, else the reference. A compiled
    function keeps the environment variable that it was compiled under.

    Args:
        q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        backend: A name, or None.
        reference_only: Why no other backend than the reference may serve, or None if any may.

    Returns:
        The backend.

    Raises:
        ValueError: The name is not installed, or no eligible backend serves these tensors.
        ImportError: The named backend failed to load.
        RuntimeError: Two distributions claim one name.
    """
    refusals = ""
    for name in _candidates(q.device.type, backend):
        candidate = _LOADED[name]
        reason = candidate.why_not(q, k)
        if name != REFERENCE.name:
            reason = reason or reference_only
        if reason is None:
            return candidate
        refusals += f"; {name}: {reason}"
    raise ValueError(
        f"no backend can rotate these tensors{refusals}; change the tensors, or name another "
        f"backend by argument or {VARIABLE}"
    )


@compile_constant
def _candidates(device: str, backend: str | None) -> tuple[str, ...]:
    """Name the imported backends to try, in order; a constant to torch.compile."""
    named = _named(backend)
    if named is not None:
        load(named)
        return (named,)
    return (*_automatic(), REFERENCE.name) if device == "cuda" else (REFERENCE.name,)


def _named(backend: str | None) -> str | None:
    return backend or os.environ.get(VARIABLE) or None


@cache
def _automatic() -> tuple[str, ...]:
    """Import every backend but the reference; warn once of each that fails."""
    names: list[str] = []
    for name in _others():
        try:
            load(name)
        except ImportError as error:
            warnings.warn(f"{error}; continuing without it", RuntimeWarning, stacklevel=2)
        else:
            names.append(name)
    return tuple(names)


def _others() -> tuple[str, ...]:
    return tuple(name for name in installed() if name != REFERENCE.name)


def explain_rotation(q: Tensor, k: Tensor, *, backend: str | None = None) -> str:
    """Tell which backend would rotate these tensors here, and why the others would not.

    Args:
        q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        backend: As in `rotate`.

    Returns:
        A table with one line per installed backend: name, distribution, whether it runs, why.

    Raises:
        ValueError: The name is not installed.
        RuntimeError: Two distributions claim one name.
    """
    named = _named(backend)
    entries = installed()
    if named is not None and named not in entries:
        load(named)  # raises the error that lists the names
    table = [("backend", "from", "runs", "why")]
    chosen: str | None = None
    for name in (*_others(), REFERENCE.name):
        reason = _why_not_here(name, named, q, k)
        if reason is None and chosen is None:
            chosen, runs = name, "yes"
            reason = "named" if named else "first that serves these tensors"
        else:
            runs, reason = "no", reason or f"would serve, but {chosen} comes first"
        origin = plugins.origin(entries[name]) if name in entries else "built in"
        table.append((name, origin, runs, reason))
    return plugins.table(table)


def _why_not_here(name: str, named: str | None, q: Tensor, k: Tensor) -> str | None:
    if named is not None and name != named:
        return f"{named} is named"
    if named is None and name != REFERENCE.name and q.device.type != "cuda":
        return (
            f"not imported: q is on {q.device.type}, and only cuda tensors or its name ask for it"
        )
    try:
        candidate = REFERENCE if name == REFERENCE.name and named is None else load(name)
    except ImportError as error:
        return str(error)
    return candidate.why_not(q, k)
