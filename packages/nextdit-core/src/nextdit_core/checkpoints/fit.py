"""Whether a checkpoint holds exactly what its sizes need, told before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nextdit_core.checkpoints.feed_forwards import (
    expected_counts,
    expert_counts,
    first_expert,
)
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["check_fit", "check_sizes"]

Shapes = Mapping[str, tuple[int, ...]]
FIRST = 5


def check_fit(place: object, title: str, found: Shapes, expected: Shapes) -> None:
    """Compare names and shapes.

    Args:
        place: What to call the checkpoint.
        title: Name of the layout that it seems to have.
        found: What it holds.
        expected: What a backbone of its sizes has in this layout.

    Raises:
        UserError: Names are missing or unexpected, or shapes differ; lists the first five.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {list(found[name])} (expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{place} looks like {title}, and its tensors do not fit: {'; '.join(problems)}. Check "
            f"that all files of the checkpoint are there and belong together"
        )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - FIRST} more" if len(names) > FIRST else ""
    return ", ".join(names[:FIRST]) + rest


def check_sizes(place: object, config: NextDiTConfig, found: Shapes, layers: int) -> None:
    """Compare the large sizes of a config with the tensors, before a backbone is described.

    Args:
        place: What to call the checkpoint.
        config: As a config.json says.
        found: Shapes under the authors' names.
        layers: Layers among the tensors.

    Raises:
        UserError: A size differs.
    """

    def size(name: str, axis: int) -> int | None:
        shape = found.get(name, ())
        return shape[axis] if len(shape) == 2 else None

    first = "layers.0"
    sizes: list[tuple[str, object, object]] = [
        ("layers", config.layers, layers),
        ("width", config.width, size("x_embedder.weight", 0)),
        ("token_dim", config.token_dim, size("x_embedder.weight", 1)),
        ("text_dim", config.text_dim, size(f"{first}.attention.wk_y.weight", 1)),
        ("experts", expected_counts(config), expert_counts(found)),
        ("feed-forward width", config.ffn_width, size(f"{first_expert(found)}.w1.weight", 0)),
    ]
    for name, said, seen in sizes:
        if said != seen:
            raise UserError(
                f"{place}: config.json says {name} {said}, and the weights have {seen}: they do "
                f"not fit one another, or one of the files is damaged"
            )
