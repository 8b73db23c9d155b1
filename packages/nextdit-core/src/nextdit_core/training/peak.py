"""What a device can do at most: the denominator of model FLOP utilisation (MFU)."""

from __future__ import annotations

import torch

__all__ = ["named_peak", "peak_tflops"]

#: Dense bfloat16 matrix products with float32 accumulation, in 10¹² operations a second, by words
#: of the driver's name of the device; the first that fits counts. The data sheets of Hopper and
#: Blackwell state twice as much, "with sparsity".
_BFLOAT16: tuple[tuple[tuple[str, ...], float], ...] = (
    # NVIDIA HGX B200 data sheet: 36 PFLOPS of FP16/BF16 with sparsity on 8 GPUs.
    (("B200",), 2250.0),
    # NVIDIA H200 data sheet: 1,671 (NVL) and 1,979 (SXM) with sparsity.
    (("H200", "NVL"), 835.5),
    (("H200",), 989.5),
    # NVIDIA GH200 data sheet: 990.
    (("GH200",), 990.0),
    # NVIDIA H100 data sheet: 1,671 (NVL), 1,513 (PCIe) and 1,979 (SXM) with sparsity.
    (("H100", "NVL"), 835.5),
    (("H100", "PCIe"), 756.5),
    (("H100",), 989.5),
    # NVIDIA A100 data sheet: 312, for PCIe and SXM alike.
    (("A100",), 312.0),
    # NVIDIA L40S data sheet: 362.05.
    (("L40S",), 362.05),
    # NVIDIA L4 data sheet: 242 with sparsity.
    (("L4",), 121.0),
    # NVIDIA A10 data sheet: 125.
    (("A10",), 125.0),
    # NVIDIA Ada GPU architecture white paper, appendix A: 165.2 with FP32 accumulation.
    (("RTX", "4090"), 165.2),
    # NVIDIA Ampere GA102 white paper, appendix A: 71 with FP32 accumulation.
    (("RTX", "3090"), 71.0),
)


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Look up the peak of a device.

    Args:
        device: The device.
        precision: "bfloat16" or "float32", as in a recipe.

    Returns:
        10¹² operations a second, or None where this table does not know: other devices, and any
        precision other than bfloat16, for which the peak depends on settings.
    """
    if device.type != "cuda" or precision != "bfloat16":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Look up a device by the name that its driver gives, such as "NVIDIA H100 80GB HBM3".

    >>> named_peak("NVIDIA A100-SXM4-80GB")
    312.0
    """
    words = name.replace("-", " ").split()
    if "D" in words or "Laptop" in words or "MIG" in words:  # less than what bears the name
        return None
    for parts, tflops in _BFLOAT16:
        if all(part in words for part in parts):
            return tflops
    return None
