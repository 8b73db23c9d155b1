"""Overlap: elements of tensors that share one place in memory, where writing in place would err."""

from __future__ import annotations

from torch import Tensor

__all__ = ["meet", "repeats"]


def repeats(x: Tensor) -> bool:
    """Tell whether two elements of a tensor share a place, as after `expand`.

    Args:
        x: Any tensor.

    Returns:
        False if certainly not; True for some other layouts whose rows are woven into each other.

    >>> import torch
    >>> repeats(torch.zeros(3, 1).expand(3, 4)), repeats(torch.zeros(3, 4).T[::2])
    (True, False)
    """
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def meet(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors share an element; slices of one projection do not.

    Args:
        x: A tensor that does not repeat itself.
        y: Another, of as many dimensions.

    Returns:
        False if certainly not; True also for views of one storage that differ in dtype or in the
        order of their strides and lie in one range.

    >>> import torch
    >>> both = torch.zeros(5, 6, 8)
    >>> meet(both[:, :4], both[:, 4:]), meet(both[:, :4], both[:, 3:])
    (False, True)
    """
    if x.untyped_storage()._cdata != y.untyped_storage()._cdata or not x.numel() or not y.numel():
        return False
    (first_x, last_x), (first_y, last_y) = _range(x), _range(y)
    if last_x < first_y or last_y < first_x:
        return False
    # x[i] is y[j] where the strides times i - j add up to the distance of their first elements.
    steps: list[tuple[int, int, int]] = []
    for n, stride, m, other in zip(x.shape, x.stride(), y.shape, y.stride(), strict=True):
        if x.dtype != y.dtype or (n > 1 and m > 1 and stride != other):
            return True
        if n > 1 or m > 1:
            steps.append((stride if n > 1 else other, n - 1, m - 1))
    distances = {y.storage_offset() - x.storage_offset()}
    for stride, most, least in sorted(steps, reverse=True):
        distances = {
            distance - stride * count
            for distance in distances
            for count in (distance // stride, distance // stride + 1)
            if -least <= count <= most
        }
    return 0 in distances


def _range(x: Tensor) -> tuple[int, int]:
    """Find the first and last byte of a tensor in its storage."""
    first = int(x.storage_offset())
    reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return first * x.itemsize, (first + reach + 1) * x.itemsize - 1
