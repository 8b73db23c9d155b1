"""Which layout a checkpoint has, by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from nextdit_core.errors import UserError

__all__ = ["Layout", "recognise", "refuse_foreign"]


class Layout(Enum):
    """Layouts that are known; the value is what to call them."""

    OWN = "a Next-DiT backbone of nextdit-core"
    AUTHORS = "Lumina-Next in the authors' layout"
    DIFFUSERS = "Lumina-Next in diffusers' layout (LuminaNextDiT2DModel)"
    CLASS_CONDITIONAL = "the class-conditional Next-DiT of Next-DiT-ImageNet"
    LUMINA_2 = "Lumina-2 (Lumina-Image-2.0) in its authors' layout"
    LUMINA_2_DIFFUSERS = "Lumina-2 (Lumina-Image-2.0) in diffusers' layout"
    STALE = "Lumina-Next as diffusers' convert_lumina_to_diffusers.py writes it"
    MIXTURE = "the class-conditional mixture of experts of Next-DiT-MoE"
    FLAG_DIT = "Flag-DiT (Lumina-T2I or Flag-DiT-ImageNet)"
    FLAG_DIT_1D = "the one-dimensional Flag-DiT of Lumina-T2Music or Lumina-T2Audio"
    UNKNOWN = "no layout that is known here"


#: What to do with what is recognised and not read.
ADVICE = {
    Layout.LUMINA_2: "another network (joint attention over text and image, refiner layers); use "
    "the Lumina-Image-2.0 code or diffusers' Lumina2Pipeline",
    Layout.LUMINA_2_DIFFUSERS: "another network (joint attention over text and image, refiner "
    "layers); use diffusers' Lumina2Pipeline",
    Layout.STALE: "that script writes names that diffusers' own model does not load; start from "
    "the authors' consolidated file and write it with: nextdit convert SOURCE DEST --to diffusers",
    Layout.FLAG_DIT: "the predecessor of Next-DiT (one-dimensional rotary embedding, shifts in "
    "every block, no norm behind a sublayer); use the authors' code",
    Layout.FLAG_DIT_1D: "the predecessor of Next-DiT; use the authors' code",
}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Tell the layout of a checkpoint.

    Args:
        shapes: Shape of every tensor by name.

    Returns:
        The layout; `Layout.UNKNOWN` where nothing tells.

    >>> recognise({"layers.0.attn1.to_q.weight": (192, 192)}).name
    'DIFFUSERS'
    """
    names = {re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in shapes}

    def any_of(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in names)

    if any_of("context_refiner.", "noise_refiner.", "layers.N.attention.qkv", "layers.N.attn.to_"):
        return Layout.LUMINA_2 if any_of("layers.N.attention.") else Layout.LUMINA_2_DIFFUSERS
    if any_of("layers.N.attn1.", "layers.N.attn2."):
        stale = any_of("layers.N.attn_norm", "layers.N.adaLN_modulation", "final_layer.")
        return Layout.STALE if stale else Layout.DIFFUSERS
    if any_of("layers.N.feed_forward.experts.", "layers.N.feed_forward_"):
        return Layout.OWN if any_of("layers.N.attention_norm1.") else Layout.MIXTURE
    if any_of("proj_in.", "blocks.") and any_of("blocks.N.attention.w"):
        return Layout.FLAG_DIT_1D
    if not any_of("layers.N.attention.w"):
        return Layout.UNKNOWN
    modulation = shapes.get("layers.0.adaLN_modulation.1.weight", (0,))[:1]
    width = shapes.get("x_embedder.weight", (0,))[:1]
    six = modulation == tuple(6 * size for size in width) and modulation > (0,)
    if any_of("eol_token") or six:
        return Layout.FLAG_DIT
    if any_of("layers.N.attention_norm.", "layers.N.ffn_norm."):
        return Layout.CLASS_CONDITIONAL
    rows = shapes.get("final_layer.linear.weight", (0,))[:1]
    columns = shapes.get("x_embedder.weight", (0,))[-1:]
    sigma = rows == tuple(2 * size for size in columns) and rows > (0,)
    return Layout.AUTHORS if any_of("pad_token") or sigma else Layout.OWN


def refuse_foreign(place: object, layout: Layout, shapes: Mapping[str, object]) -> None:
    """Refuse what is not a Next-DiT, by its name.

    Raises:
        UserError: The layout is not one that is read.
    """
    if layout is Layout.UNKNOWN:
        some = ", ".join(sorted(shapes)[:5]) or "none"
        raise UserError(
            f"{place} has {layout.value}; its first tensors: {some}. Expected a Next-DiT of "
            f"nextdit-core, of the authors or of diffusers"
        )
    if layout in ADVICE:
        raise UserError(f"{place} is {layout.value}: {ADVICE[layout]}")
