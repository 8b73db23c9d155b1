"""Attention backends: who carries out an attention, built in or found through entry points."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rope3d import plugins
from rope3d.attend_flash import FLASH_3, FLASH_4, FLASH_VARLEN
from rope3d.attend_products import PRODUCTS, pays_here
from rope3d.attend_reference import WRITTEN_OUT
from rope3d.attend_sdpa import CUDNN, SDPA
from rope3d.attention_case import AttentionCase
from rope3d.compile_constant import compile_constant

__all__ = [
    "GROUP",
    "VARIABLE",
    "AttentionBackend",
    "GatedAttentionBackend",
    "choose",
    "choose_gated",
    "explain",
    "refresh",
]

#: The entry-point group in which a distribution offers an attention backend.
GROUP = "rope3d.attention"

#: The environment variable that names an attention backend for a whole process.
VARIABLE = "ROPE3D_ATTENTION"


@runtime_checkable
class AttentionBackend(Protocol):
    """What an object behind an entry point of the group `rope3d.attention` must offer."""

    @property
    def name(self) -> str:
        """The name of its entry point."""
        ...

    def why_not(self, case: AttentionCase) -> str | None:
        """Say why a case cannot be served, or None if it can.

        Runs on every call and inside torch.compile: look at devices, dtypes, shapes, strides and
        host numbers only, never at values on the device.

        Args:
            case: Shapes that fit; see `AttentionCase`.

        Returns:
            A reason that a reader can act on, or None.
        """
        ...

    def attend(self, case: AttentionCase) -> Tensor:
        """Compute softmax(scale * q k^T) v within each sample, differentiably.

        Args:
            case: What `why_not` did not refuse.

        Returns:
            As q, with the last size of v. A query without keys gets 0.
        """
        ...


@runtime_checkable
class GatedAttentionBackend(AttentionBackend, Protocol):
    """An attention backend that also adds a gated attention to what is there, in one step."""

    def attend_gated(self, case: AttentionCase, gate: Tensor, out: Tensor) -> Tensor:
        """Compute out + tanh(gate) * attend(case), differentiably.

        Args:
            case: What `why_not` did not refuse.
            gate: `[heads]`.
            out: As the result of `attend`; left unchanged.

        Returns:
            As `out`.
        """
        ...


_BUILT_IN: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (FLASH_3, FLASH_4, CUDNN, FLASH_VARLEN, PRODUCTS, SDPA, WRITTEN_OUT)
}
_LOADED: dict[str, AttentionBackend] = dict(_BUILT_IN)


def choose(case: AttentionCase, backend: str | None = None) -> AttentionBackend:
    """Pick the backend for a case.

    The argument decides, else the environment variable ROPE3D_ATTENTION, else the order below: the
    first that serves the case. A compiled function keeps the variable that it was compiled under.

    On the CPU: products, where scores may be rounded, the processor has AVX512-BF16 and no AMX, and
    no gradient is recorded; else sdpa. On MPS: sdpa. On CUDA:

    1. flash-3, then flash-4, where installed for this GPU;
    2. cudnn from compute capability 9.0 on at head_dim 64 and 128 with at least 1024 keys;
    3. flash-varlen for packed samples of different lengths;
    4. installed plug-ins by name, where sdpa would be called once per sample;
    5. sdpa.

    Args:
        case: What to carry out.
        backend: A name, or None.

    Returns:
        The backend.

    Raises:
        ValueError: The name is not installed, or the named backend does not serve the case.
        ImportError: The named backend failed to load.
        RuntimeError: Two distributions claim one name.

    Source:
        The order on CUDA follows figures published with flash-attention 3 (arXiv 2407.08608): on
        an H100 at head_dim 128 and 4096 tokens 638, 609 (cuDNN) and 368 (2) TFLOP/s.
    """
    return _first(case, _order(case, backend))


def choose_gated(case: AttentionCase, backend: str | None = None) -> AttentionBackend:
    """Pick the backend for a gated attention: one that gates itself comes first on CUDA.

    Args:
        case: What to carry out.
        backend: A name, or None.

    Returns:
        The backend; if it is no `GatedAttentionBackend`, the caller gates and adds.

    Raises:
        ValueError: As in `choose`.
        ImportError: As in `choose`.
        RuntimeError: As in `choose`.
    """
    order = _order(case, backend)
    if case.q.device.type == "cuda" and len(order) > 1:
        order = (*_gating(), *order)
    return _first(case, order)


def refresh() -> None:
    """Forget what was found and imported, after a package was installed in a running process."""
    plugins.refresh()
    _plugged.cache_clear()
    _LOADED.clear()
    _LOADED.update(_BUILT_IN)


def explain(case: AttentionCase, backend: str | None = None, *, gated: bool = False) -> str:
    """Tell which backend would carry out a case here, and why the others would not.

    Args:
        case: What to carry out.
        backend: As in `choose`.
        gated: Whether it is a gated attention, as in `choose_gated`.

    Returns:
        A table with one line per backend: name, distribution, whether it runs, why.

    Raises:
        ValueError: The name is not installed.
        RuntimeError: Two distributions claim one name.
    """
    named = _named(backend)
    entries = plugins.installed(GROUP)
    if named is not None:
        _load(named)
    try:
        chosen = (choose_gated if gated else choose)(case, backend).name
    except ValueError:
        chosen = None
    rows = [("backend", "from", "runs", "why")]
    for name in (*_BUILT_IN, *(name for name in entries if name not in _BUILT_IN)):
        where = plugins.origin(entries[name]) if name not in _BUILT_IN else "built in"
        if name == chosen:
            why = "named" if named else "first in the order that serves this case"
            rows.append((name, where, "yes", why))
        else:
            rows.append((name, where, "no", _why_not_here(name, named, case, chosen)))
    return plugins.table(rows)


def _why_not_here(name: str, named: str | None, case: AttentionCase, chosen: str | None) -> str:
    if named is not None and name != named:
        return f"{named} is named"
    if named is None and case.q.device.type != "cuda" and name not in _BUILT_IN:
        return f"not imported: q is on {case.q.device.type}, and only cuda or its name asks for it"
    try:
        reason = _load(name).why_not(case)
    except ImportError as error:
        return str(error)
    if reason is None and name == PRODUCTS.name and not case.rounded_scores:
        return "scores are to stay in float32; ask with rounded_scores=True or by its name"
    return reason or f"would serve, but {chosen} comes first"


def _first(case: AttentionCase, order: Sequence[str]) -> AttentionBackend:
    refusals = ""
    for name in order:
        candidate = _LOADED[name]
        reason = candidate.why_not(case)
        if reason is None:
            return candidate
        refusals += f"; {name}: {reason}"
    raise ValueError(
        f"no backend can carry out this attention{refusals}; change the tensors, or name another "
        f"backend by argument or {VARIABLE}"
    )


def _order(case: AttentionCase, backend: str | None) -> tuple[str, ...]:
    named = _resolve(backend)
    if named is not None:
        return (named,)
    if case.q.device.type != "cuda":
        rounds = case.rounded_scores and _products_pay()
        return (PRODUCTS.name, SDPA.name) if rounds else (SDPA.name,)
    newer = (FLASH_3.name, FLASH_4.name)
    if case.packed and len(case.runs) > 1:
        return (*newer, FLASH_VARLEN.name, *_automatic(), SDPA.name)
    if not case.dense and len(case.runs) > 1:
        return (*_automatic(), SDPA.name)
    recent = torch.cuda.get_device_properties(case.q.device).major >= 9
    if recent and case.dense and case.q.shape[-1] in (64, 128) and case.k.shape[1] >= 1024:
        return (*newer, CUDNN.name, SDPA.name)
    return (*newer, SDPA.name)


@compile_constant
def _resolve(backend: str | None) -> str | None:
    """Import the named backend; its name is a constant to torch.compile."""
    named = _named(backend)
    if named is not None:
        _load(named)
    return named


@compile_constant
def _products_pay() -> bool:
    return pays_here()


@compile_constant
def _automatic() -> tuple[str, ...]:
    return _plugged()


@compile_constant
def _gating() -> tuple[str, ...]:
    return tuple(n for n in _plugged() if isinstance(_LOADED[n], GatedAttentionBackend))


@cache
def _plugged() -> tuple[str, ...]:
    """Import every plug-in; warn once of each that fails."""
    names: list[str] = []
    for name in plugins.installed(GROUP):
        try:
            _load(name)
        except ImportError as error:
            warnings.warn(f"{error}; continuing without it", RuntimeWarning, stacklevel=2)
        else:
            names.append(name)
    return tuple(names)


def _load(name: str) -> AttentionBackend:
    if name in _LOADED:
        return _LOADED[name]
    if name not in plugins.installed(GROUP):
        known = ", ".join((*_BUILT_IN, *plugins.installed(GROUP)))
        raise ValueError(
            f"unknown attention backend {name!r}; known: {known}; install the distribution that "
            f"offers it, or choose another by argument or {VARIABLE}"
        )
    backend: AttentionBackend = plugins.load(GROUP, name, ("name", "why_not", "attend"), VARIABLE)
    _LOADED[name] = backend
    return backend


def _named(backend: str | None) -> str | None:
    return backend or os.environ.get(VARIABLE) or None
