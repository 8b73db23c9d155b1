"""Layouts of released image and video models, by the name of the model.

All are `axial`: one block of channels per axis, adjacent channels form a pair.
"""

from __future__ import annotations

from rope3d.layouts import axial
from rope3d.rope import Rope

__all__ = ["cogvideox", "flux", "hunyuan_video", "lumina2", "wan"]


def flux() -> Rope:
    """Lay out FLUX.1: axes (index, row, column) of 16, 56, 56 channels, base 10000.

    Returns:
        A layout of 3 axes, head_dim 128.

    Convention:
        Text tokens are at (0, 0, 0) and image tokens at (0, row, column).

    Source:
        black-forest-labs/flux, `EmbedND`; `FluxPosEmbed` of diffusers.

    >>> flux().head_dim
    128
    """
    return axial((16, 56, 56))


def wan(head_dim: int = 128) -> Rope:
    """Lay out Wan 2.1 and 2.2: (frame, row, column), 44, 42, 42 channels of 128, base 10000.

    Args:
        head_dim: Channels of a head, even; rows and columns take 2 * (head_dim // 6) each.

    Returns:
        A layout of 3 axes.

    Raises:
        ValueError: `head_dim` is odd, or below 6.

    Source:
        Wan-Video/Wan2.1, `rope_apply`; `WanRotaryPosEmbed` of diffusers.

    >>> wan().head_dim
    128
    """
    side = 2 * (head_dim // 6)
    return axial((head_dim - 2 * side, side, side))


def hunyuan_video() -> Rope:
    """Lay out HunyuanVideo: (frame, row, column), 16, 56, 56 channels, base 256.

    Returns:
        A layout of 3 axes, head_dim 128.

    Convention:
        Text tokens are not rotated: give them the position (0, 0, 0).

    Source:
        HunyuanVideo, arXiv 2412.03603; `HunyuanVideoRotaryPosEmbed` of diffusers.

    >>> hunyuan_video().base
    (256.0, 256.0, 256.0)
    """
    return axial((16, 56, 56), base=256.0)


def cogvideox(head_dim: int = 64) -> Rope:
    """Lay out CogVideoX: (frame, row, column), 16, 24, 24 channels of 64, base 10000.

    Args:
        head_dim: Channels of a head, a multiple of 16; frames take a quarter of them.

    Returns:
        A layout of 3 axes.

    Raises:
        ValueError: `head_dim` is not a positive multiple of 16.

    Convention:
        Text tokens are not rotated: give them the position (0, 0, 0). Version 1.0 squeezes rows
        and columns of other resolutions into those of training: use fractional positions.

    Source:
        CogVideoX, arXiv 2408.06072; `get_3d_rotary_pos_embed` of diffusers.

    >>> cogvideox().head_dim
    64
    """
    if head_dim <= 0 or head_dim % 16:
        raise ValueError(f"head_dim is {head_dim}; expected a positive multiple of 16, such as 64")
    side = 3 * head_dim // 8
    return axial((head_dim // 4, side, side))


def lumina2() -> Rope:
    """Lay out Lumina-Image 2.0: (index, row, column), 32, 32, 32 channels, base 10000.

    Returns:
        A layout of 3 axes, head_dim 96.

    Convention:
        Text token i of n is at (i, 0, 0) and image tokens at (n, row, column).

    Source:
        Lumina-Image 2.0, arXiv 2503.21758; `Lumina2RotaryPosEmbed` of diffusers.

    >>> lumina2().head_dim
    96
    """
    return axial((32, 32, 32))
