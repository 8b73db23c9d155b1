"""The reference backend: the rotation in plain PyTorch, on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["REFERENCE", "Reference", "as_complex"]

# Elements that are turned at once: what is alive besides is a few times as large.
_BLOCK = 2**18

# What the arithmetic is done in; other tensors are converted.
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Reference:
    """Rotate with PyTorch operations; the definition that other backends are held to."""

    name: str = "reference"

    def why_not(self, q: Tensor, k: Tensor) -> str | None:
        """Refuse only tensors that hold no real floating-point numbers."""
        if q.dtype.is_floating_point and k.dtype.is_floating_point:
            return None
        return f"q is {q.dtype} and k is {k.dtype}; rotation needs floating point"

    def rotate(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate `[..., tokens, heads, 2 * pairs]` by `[..., tokens, pairs]`.

        `turns` are cos + i sin in complex64, where they are there already.
        """
        if not (_multiplies_complex(q) and _multiplies_complex(k)):
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
            return _turn(q, cos, sin), _turn(k, cos, sin)
        if turns is None or torch.float64 in (q.dtype, k.dtype):
            turns = as_complex(cos, sin, q.dtype)
        turns = turns.unsqueeze(-2)
        if q.dtype == k.dtype and q.dtype in _WIDE:
            return _multiply(q, turns), _multiply(k, turns)
        return _in_blocks(q, _multiply, turns), _in_blocks(k, _multiply, turns)

    def rotate_half(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as `rotate`, with pair m in channels m and m + pairs."""
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return _in_blocks(q, _turn_halves, cos, sin), _in_blocks(k, _turn_halves, cos, sin)

    def rotate_(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turns: Tensor | None = None
    ) -> None:
        """Rotate as `rotate`, writing into q and k."""
        for x in (q, k):
            if not _multiplies_complex(x):
                _write(x, _turn, cos.unsqueeze(-2), sin.unsqueeze(-2))
                continue
            table = turns
            if table is None or x.dtype == torch.float64:
                table = as_complex(cos, sin, x.dtype)
            table = table.unsqueeze(-2)
            if x.dtype in _WIDE and _holds_complex(x):
                torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(table)
            else:
                _write(x, _multiply, table)

    def rotate_half_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate as `rotate_half`, writing into q and k."""
        for x in (q, k):
            _write(x, _turn_halves, cos.unsqueeze(-2), sin.unsqueeze(-2))


def _in_blocks(x: Tensor, turn: Callable[..., Tensor], *tables: Tensor) -> Tensor:
    """Return what `turn` gives, block by block where that spares large tensors on the way.

    Most of the time of an eager rotation on the CPU is the first touch of new memory.
    """
    if not _multiplies_complex(x) or _is_recorded(x, *tables):
        return turn(x, *tables)
    turned = x.new_empty(x.shape)
    _write(turned, turn, *tables, source=x)
    return turned


def _is_recorded(*tensors: Tensor) -> bool:
    """Tell whether operations are recorded, or are transformed by torch.func."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return True
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def _write(
    x: Tensor, turn: Callable[..., Tensor], *tables: Tensor, source: Tensor | None = None
) -> None:
    """Write what `turn` gives of the source, or of x, into x: block by block of the tokens."""
    if x.numel() == 0:
        return
    rows = max(1, _BLOCK * x.shape[-3] // x.numel())
    blocks = (one.split(rows, dim=-3) for one in (x, x if source is None else source, *tables))
    for part, *given in zip(*blocks, strict=True):
        part.copy_(turn(*given))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _multiplies_complex(x: Tensor) -> bool:
    """Tell whether complex numbers are the faster way: eagerly on the CPU.

    Inductor fuses real arithmetic and not complex, and subclasses of Tensor may lack the views.
    `benchmarks/apply_cpu.py` measures what this gains.
    """
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _holds_complex(x: Tensor) -> bool:
    """Tell whether pairs can be read as complex numbers: two neighbours at an even place."""
    if x.stride(-1) != 1 or x.storage_offset() % 2:
        return False
    return not any(stride % 2 for stride in x.stride()[:-1])


def as_complex(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Give cos + i sin, in complex64, or complex128 for float64."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.complex(cos.to(real), sin.to(real))


def _multiply(x: Tensor, turns: Tensor) -> Tensor:
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not _holds_complex(wide):
        wide = wide.contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


REFERENCE = Reference()
