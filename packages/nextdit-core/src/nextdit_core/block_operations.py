"""What a block does between its matrix products, by whoever is fastest at it here.

This module holds the PyTorch form of each operation, which defines it. On CUDA a distribution with
an entry point in the group `nextdit.kernels` takes over what it can serve. On other devices the
PyTorch form runs unless kernels are named, and no metadata is read at all.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from nextdit_core import block_rows, registry
from nextdit_core.eager_cpu import unobserved
from nextdit_core.errors import UserError
from rope3d import Rotation, rotate

__all__ = [
    "GROUP",
    "OPERATIONS",
    "VARIABLE",
    "BlockKernels",
    "choose",
    "explain",
    "gate_residual",
    "norm_modulate",
    "norm_rotate",
    "refresh",
    "swiglu",
]

#: The entry-point group in which a distribution offers kernels.
GROUP = "nextdit.kernels"

#: The environment variable that names kernels for a whole process; "torch" turns them off.
VARIABLE = "NEXTDIT_KERNELS"

#: What kernels offer: each a method, and a method `why_not_` with its tensors and no numbers.
OPERATIONS = ("swiglu", "norm_modulate", "gate_residual", "norm_rotate")


class BlockKernels(Protocol):
    """What an object behind an entry point of the group `nextdit.kernels` must offer.

    A `why_not_` method says why some tensors cannot be served, in words that a reader can act on,
    or gives None. It runs on every call and inside torch.compile, so it looks at devices, dtypes,
    shapes and strides only, never at values.
    """

    @property
    def name(self) -> str:
        """The name of its entry point."""
        ...

    def why_not_swiglu(self, gate: Tensor, up: Tensor) -> str | None:
        """Say why `swiglu` cannot serve these tensors, or None if it can."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute what `nextdit_core.block_operations.swiglu` documents."""
        ...

    def why_not_norm_modulate(self, x: Tensor, weight: Tensor | None, scale: Tensor) -> str | None:
        """Say why `norm_modulate` cannot serve these tensors, or None if it can."""
        ...

    def norm_modulate(
        self, x: Tensor, weight: Tensor | None, scale: Tensor, *, eps: float, centred: bool
    ) -> Tensor:
        """Compute what `nextdit_core.block_operations.norm_modulate` documents."""
        ...

    def why_not_gate_residual(
        self, x: Tensor, y: Tensor, weight: Tensor, gate: Tensor
    ) -> str | None:
        """Say why `gate_residual` cannot serve these tensors, or None if it can."""
        ...

    def gate_residual(
        self, x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, *, eps: float
    ) -> Tensor:
        """Compute what `nextdit_core.block_operations.gate_residual` documents."""
        ...

    def why_not_norm_rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> str | None:
        """Say why `norm_rotate` cannot serve these tensors, or None if it can."""
        ...

    def norm_rotate(
        self, q: Tensor, k: Tensor, rotation: Rotation, *norms: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Compute what `nextdit_core.block_operations.norm_rotate` documents."""
        ...


class TorchBlock:
    """The PyTorch form: serves all tensors, and says what each operation is."""

    name = "torch"

    def why_not_swiglu(self, gate: Tensor, up: Tensor) -> None:
        pass

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dtype == up.dtype and unobserved(gate, up):
            return functional.silu(gate).mul_(up)  # no second tensor as wide
        return functional.silu(gate) * up

    def why_not_norm_modulate(self, x: Tensor, weight: Tensor | None, scale: Tensor) -> None:
        pass

    def norm_modulate(
        self, x: Tensor, weight: Tensor | None, scale: Tensor, *, eps: float, centred: bool
    ) -> Tensor:
        width = x.shape[-1:]
        if centred:
            return functional.layer_norm(x, width, weight, eps=eps) * (1 + scale)
        if weight is not None and block_rows.serves(x, weight, scale):
            return block_rows.norm_modulate(x, weight, scale, eps=eps)
        return functional.rms_norm(x, width, weight, eps) * (1 + scale)

    def why_not_gate_residual(self, x: Tensor, y: Tensor, weight: Tensor, gate: Tensor) -> None:
        pass

    def gate_residual(
        self, x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, *, eps: float
    ) -> Tensor:
        if block_rows.serves(x, y, weight, gate):
            return block_rows.gate_residual(x, y, weight, gate, eps=eps)
        return x + torch.tanh(gate) * functional.rms_norm(y, y.shape[-1:], weight, eps)

    def why_not_norm_rotate(self, q: Tensor, k: Tensor, rotation: Rotation) -> None:
        pass

    def norm_rotate(
        self, q: Tensor, k: Tensor, rotation: Rotation, *norms: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        q_weight, q_bias, k_weight, k_bias = norms
        q, k = _normed(q, q_weight, q_bias, eps), _normed(k, k_weight, k_bias, eps)
        return rotate(q, k, rotation)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    rows = x.flatten(-2)
    return functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps).view(x.shape)


TORCH = TorchBlock()

#: Kernels that have been imported. The PyTorch form needs no look-up.
_LOADED: dict[str, BlockKernels] = {TORCH.name: TORCH}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate a hidden layer: silu(gate) · up.

    Args:
        gate: `[..., width]`.
        up: As `gate`.

    Returns:
        `[..., width]`.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), eq. 5 between its linear
        layers.

    >>> swiglu(torch.tensor([0.0, 90.0]), torch.tensor([5.0, 2.0]))
    tensor([  0., 180.])
    """
    return choose("swiglu", gate, up).swiglu(gate, up)


def norm_modulate(
    x: Tensor, weight: Tensor | None, scale: Tensor, *, eps: float, centred: bool = False
) -> Tensor:
    """Prepare the input of a layer: RMS(x) · weight · (1 + scale).

    Args:
        x: `[batch, tokens, width]`.
        weight: `[width]`, or None for ones.
        scale: `[batch, 1, width]`, or `[batch, tokens, width]`.
        eps: Added to the mean square.
        centred: Take off the mean of a row first: a LayerNorm rather than an RMSNorm.

    Returns:
        `[batch, tokens, width]`.

    Source: Lumina-Next (arXiv 2406.18583) §2.

    >>> norm_modulate(torch.tensor([[[3.0, -3.0]]]), None, torch.ones(1, 1, 2), eps=0.0)
    tensor([[[ 2., -2.]]])
    """
    kernels = choose("norm_modulate", x, weight, scale)
    return kernels.norm_modulate(x, weight, scale, eps=eps, centred=centred)


def gate_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, *, eps: float) -> Tensor:
    """Add the output of a layer: x + tanh(gate) · RMS(y) · weight.

    Args:
        x: `[batch, tokens, width]`.
        y: As `x`.
        weight: `[width]`.
        gate: `[batch, 1, width]`, or `[batch, tokens, width]`.
        eps: Added to the mean square.

    Returns:
        `[batch, tokens, width]`.

    Source: Lumina-Next (arXiv 2406.18583) §2.

    >>> x = torch.tensor([[[3.0, -3.0]]])
    >>> gate_residual(x, x, torch.ones(2), torch.full((1, 1, 2), 9.0), eps=0.0)
    tensor([[[ 4., -4.]]])
    """
    kernels = choose("gate_residual", x, y, weight, gate)
    if kernels is not TORCH and torch.is_autocast_enabled(x.device.type):
        # There PyTorch's norm gives float32, and with it the sum.
        x = x.float()
    return kernels.gate_residual(x, y, weight, gate, eps=eps)


def norm_rotate(
    q: Tensor,
    k: Tensor,
    rotation: Rotation,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys over all channels of a token, and rotate them.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        rotation: As `rope3d.rotate` takes it.
        q_weight: `[heads * head_dim]`, of the LayerNorm; so are the others.
        q_bias: Added after it.
        k_weight: `[kv_heads * head_dim]`.
        k_bias: Added after it.
        eps: Added to the variance.

    Returns:
        The rotated `(q, k)`.

    Source: Lumina-Next (arXiv 2406.18583) §2; Alpha-VLLM/Lumina-T2X, `Attention.forward`.

    >>> still = Rotation(torch.ones(1, 1), torch.zeros(1, 1))
    >>> x, one, zero = torch.tensor([[[[3.0, -3.0]]]]), torch.ones(2), torch.zeros(2)
    >>> norm_rotate(x, x, still, one, zero, one, zero, eps=0.0)[0]
    tensor([[[[ 1., -1.]]]])
    """
    kernels = choose("norm_rotate", q, k, rotation)
    if kernels is not TORCH and torch.is_autocast_enabled(q.device.type):
        # There PyTorch's norm gives float32.
        q, k = q.float(), k.float()
    return kernels.norm_rotate(q, k, rotation, q_weight, q_bias, k_weight, k_bias, eps=eps)


def choose(operation: str, x: Tensor, *others: Tensor | Rotation | None) -> BlockKernels:
    """Pick who carries out an operation.

    The environment variable NEXTDIT_KERNELS decides, else the first installed kernels (by name)
    that serve the tensors if they are on CUDA, else the PyTorch form. A compiled function keeps
    the environment variable that it was compiled under.

    Args:
        operation: One of `OPERATIONS`.
        x: Its first tensor.
        *others: Its other tensors, and the rotation, in order.

    Returns:
        The kernels, or the PyTorch form.

    Raises:
        UserError: The name is not installed or failed to load, two distributions claim it, or what
            it names cannot serve these tensors.
    """
    reason = None
    for name in _candidates(x.device.type):
        kernels = _LOADED[name]
        if kernels is TORCH:  # not asked: it serves all tensors
            return kernels
        reason = getattr(kernels, f"why_not_{operation}")(x, *others)
        if reason is None:
            return kernels
    raise UserError(
        f"{VARIABLE} names kernels that cannot run {operation} here: {reason}; change the "
        f"tensors, or unset {VARIABLE}"
    )


def _candidates(device: str) -> tuple[str, ...]:
    """Name the imported kernels to try, in order; a constant to torch.compile."""
    named = os.environ.get(VARIABLE)
    if named:
        _load(named)
        return (named,)
    return (*_automatic(), TORCH.name) if device == "cuda" else (TORCH.name,)


# What `torch.compiler.assume_constant_result` leaves behind; it imports the compiler, which takes
# longer than all of this package.
_candidates.__dict__["_dynamo_marked_constant"] = True


def _load(name: str) -> None:
    """Import kernels by name, once."""
    if name in _LOADED:
        return
    kernels = registry.load(GROUP, name)
    methods = [prefix + operation for operation in OPERATIONS for prefix in ("", "why_not_")]
    lacking = [method for method in ("name", *methods) if not hasattr(kernels, method)]
    if lacking:
        part = registry.parts(GROUP)[name]
        raise UserError(
            f"kernels {name!r} of {part.origin}: {part.target} lacks {', '.join(lacking)}; it must "
            "satisfy nextdit_core.block_operations.BlockKernels"
        )
    _LOADED[name] = cast("BlockKernels", kernels)


@cache
def _automatic() -> tuple[str, ...]:
    """Import all kernels that are installed; warn once of each that fails."""
    names: list[str] = []
    for name in registry.parts(GROUP):
        try:
            _load(name)
        except UserError as error:
            warnings.warn(f"{error}; continuing without it", RuntimeWarning, stacklevel=2)
        else:
            names.append(name)
    return tuple(name for name in names if name != TORCH.name)


def refresh() -> None:
    """Forget what was imported, after a package was installed in a running process."""
    registry.refresh()
    _automatic.cache_clear()
    _LOADED.clear()
    _LOADED[TORCH.name] = TORCH


def explain(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Tell who would carry out each operation, and why others would not.

    Args:
        device: Where the tensors are.
        dtype: What all of them are.

    Returns:
        By operation the name, followed by the others' reasons; or the error that it would raise.

    >>> explain()["swiglu"]
    'torch'
    """
    rows = torch.empty(1, 2, 8, device=device, dtype=dtype)
    weight, modulation = rows[0, 0], rows[:, :1]
    heads = rows.unflatten(-1, (2, 4))
    turns = torch.empty(2, 2, device=device)
    tensors: dict[str, tuple[Any, ...]] = {
        "swiglu": (rows, rows),
        "norm_modulate": (rows, weight, modulation),
        "gate_residual": (rows, rows, weight, modulation),
        "norm_rotate": (heads, heads, Rotation(turns, turns)),
    }
    return {operation: _explain(operation, tensors[operation]) for operation in OPERATIONS}


def _explain(operation: str, tensors: tuple[Any, ...]) -> str:
    try:
        words = choose(operation, *tensors).name
        names = _candidates(tensors[0].device.type)
    except UserError as error:
        return f"error: {error}"
    for name in names:
        reason = getattr(_LOADED[name], f"why_not_{operation}")(*tensors)
        words += f"; {name} would not: {reason}" if reason is not None else ""
    return words
