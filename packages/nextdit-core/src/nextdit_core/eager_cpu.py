"""Whether an operation may take a quicker way on the CPU, which nothing but its result shows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["linear", "unobserved"]

# Elements of the input of a linear layer below which the way there costs more than it gains.
_FEW = 2**14


def unobserved(*tensors: Tensor) -> bool:
    """Tell whether tensors are plain ones on the CPU and nobody looks at what is done to them.

    Those who look: autograd, forward derivatives, torch.func, torch.compile, autocast, and modes
    such as the counter of FLOPs.

    Args:
        *tensors: All that an operation takes.

    Returns:
        Whether only the numbers of its result matter.

    >>> unobserved(torch.ones(1)), unobserved(torch.ones(1, requires_grad=True))
    (True, False)
    """
    if any(one.device.type != "cpu" for one in tensors) or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    return all(
        type(one) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(one)
        for one in tensors
    )


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer, in float32 on AMD processors with oneDNN's matrix product.

    There it took 0.9 of the time of MKL's, which PyTorch calls for float32 (Zen 4, 512 to 2048
    rows). Anything but a plain `nn.Linear` without hooks is called as it is, so that adapters and
    quantised layers work.

    Args:
        layer: Maps the last size.
        x: `[..., in_features]`.

    Returns:
        `[..., out_features]`.

    >>> layer = nn.Linear(2, 1)
    >>> torch.equal(linear(layer, torch.ones(1, 2)), layer(torch.ones(1, 2)))
    True
    """
    if torch.compiler.is_compiling() or x.dtype != torch.float32:  # sizes may be symbols there
        return layer(x)
    if x.numel() < _FEW or not _prefers_onednn():
        return layer(x)
    if type(layer) is not nn.Linear or _is_hooked(layer):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    every = (x, weight) if bias is None else (x, weight, bias)
    if not unobserved(*every) or any(one.dtype != torch.float32 for one in every):
        return layer(x)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_hooked(layer: nn.Module) -> bool:
    """Tell whether a call does more than `forward`, or `forward` is another, as of accelerate."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or _has_any_global_hook()
    return bool(hooks) or "forward" in vars(layer)


@cache
def _prefers_onednn() -> bool:
    name = str(getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", ""))
    there = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return name.startswith("AMD") and there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
