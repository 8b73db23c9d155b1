"""The feed-forward layers of a checkpoint: one or two in a block, plain or of experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = [
    "ExpertsBy",
    "expected_counts",
    "expert_counts",
    "expert_fields",
    "expert_kind",
    "first_expert",
]

#: By what the experts of a mixture are chosen.
ExpertsBy = Literal["time", "space"]
EXPERT = re.compile(r"layers\.0\.feed_forward(_time|_space|)\.experts\.\d+\.w1\.weight")
Shapes = Mapping[str, tuple[int, ...]]


def expert_counts(shapes: Shapes) -> dict[str, int]:
    """Count the experts of the first layer, by what follows `feed_forward` in their names."""
    found: dict[str, int] = {}
    for name in shapes:
        match = EXPERT.fullmatch(name)
        if match:
            found[match.group(1)] = found.get(match.group(1), 0) + 1
    return dict(sorted(found.items()))


def expected_counts(config: NextDiTConfig) -> dict[str, int]:
    """Say what `expert_counts` finds in a backbone of these sizes."""
    if config.both_experts:
        return {"_space": config.space_experts, "_time": config.time_experts}
    count = config.time_experts or config.space_experts
    return {"": count} if count else {}


def first_expert(shapes: Shapes) -> str:
    """Name a feed-forward layer of the first block, of which all are alike."""
    for kind in expert_counts(shapes):
        return f"layers.0.feed_forward{kind}.experts.0"
    return "layers.0.feed_forward"


def expert_fields(
    shapes: Shapes, width: int, modulation_dim: int, by: ExpertsBy | None
) -> dict[str, int]:
    """Give the fields of a config that say which experts there are.

    Args:
        shapes: In the authors' names.
        width: Of a token.
        modulation_dim: Of the timestep embedding.
        by: By what they are chosen, where the router does not tell: it takes the timestep embedding
            or the token, which up to a width of 1024 are equally wide.

    Returns:
        `time_experts` and `space_experts`.

    Raises:
        UserError: Nothing tells by what they are chosen, or `by` contradicts the router.
    """
    counts = expert_counts(shapes)
    if "" not in counts:
        if by is not None:
            there = "experts of time and of space" if counts else "no experts"
            raise UserError(f"the checkpoint has {there}, so that experts_by={by!r} says nothing")
        return {
            "time_experts": counts.get("_time", 0),
            "space_experts": counts.get("_space", 0),
        }
    seen = shapes.get("layers.0.feed_forward.gate.weight", (0, 0))[-1]
    fits = {"time": seen == modulation_dim, "space": seen == width}
    if by is None and all(fits.values()):
        raise UserError(
            f"no tensor tells by what the {counts['']} experts are chosen: at width {width} the "
            f"timestep embedding and a token are equally wide; give experts_by='time' (models.py "
            f"of Next-DiT-MoE) or 'space' (models1.py), --experts-by on the command line"
        )
    chosen = by or ("time" if fits["time"] else "space")
    if not fits.get(chosen, False):
        raise UserError(
            f"layers.0.feed_forward.gate.weight takes {seen} numbers, where a router by {chosen} "
            f"takes {modulation_dim if chosen == 'time' else width}; give another experts_by, or "
            f"check that the files belong together"
        )
    return {f"{chosen}_experts": counts[""]}


def expert_kind(name: str | None) -> ExpertsBy | None:
    """Check by what experts are said to be chosen.

    Raises:
        UserError: It is neither "time" nor "space".
    """
    for known in get_args(ExpertsBy):
        if name == known:
            return known
    if name is None:
        return None
    raise UserError(f"experts_by is {name!r}; expected 'time' or 'space'")
