"""The reference backend: the rotation in plain PyTorch, on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["REFERENCE", "Reference"]


@dataclass(frozen=True)
class Reference:
    """Rotate with PyTorch operations; the definition that other backends are held to."""

    name: str = "reference"

    def why_not(self, q: Tensor, k: Tensor) -> str | None:
        """Refuse only tensors that hold no real floating-point numbers."""
        if q.dtype.is_floating_point and k.dtype.is_floating_point:
            return None
        return f"q is {q.dtype} and k is {k.dtype}; rotation needs floating point"

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate `[..., tokens, heads, 2 * pairs]` by `[..., tokens, pairs]`."""
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
        turn = _turn_complex if _multiplies_complex(q) and _multiplies_complex(k) else _turn
        return turn(q, cos, sin), turn(k, cos, sin)

    def rotate_half(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as `rotate`, with pair m in channels m and m + pairs."""
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return _turn_halves(q, cos, sin), _turn_halves(k, cos, sin)


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


def _turn_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(dtype)
    if wide.stride(-1) != 1 or wide.storage_offset() % 2 or any(s % 2 for s in wide.stride()[:-1]):
        wide = wide.contiguous()  # a complex number is two neighbours at an even place
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.complex(cos.to(dtype), sin.to(dtype)))
    return turned.flatten(-2).to(x.dtype)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


REFERENCE = Reference()
