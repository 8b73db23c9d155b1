"""Captioned media to learn from, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from nextdit_core import registry
from nextdit_core.errors import UserError
from nextdit_core.modality import Modality, build

__all__ = ["Dataset", "Example", "TokenDataset", "load_dataset"]


@dataclass(frozen=True)
class Example:
    """One medium and what it shows.

    Args:
        media: What the modality's `encode` takes.
        caption: Its description; may be empty.
    """

    media: Any
    caption: str


@runtime_checkable
class Dataset(Protocol):
    """A finite list of examples; the same index gives the same example every time."""

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Give one example."""
        ...


class TokenDataset:
    """A dataset seen through a modality: tokens, positions and captions by index.

    Each example is encoded once and kept, because the batch plan needs every length before
    the first step.

    Args:
        dataset: The examples.
        modality: How they become tokens.

    Raises:
        UserError: The dataset is empty, or an example does not fit the modality.
    """

    def __init__(self, dataset: Dataset, modality: Modality) -> None:
        if len(dataset) == 0:
            raise UserError("the dataset holds no examples; check its options")
        self.captions: list[str] = []
        self.values: list[Tensor] = []
        self.positions: list[Tensor] = []
        grids: dict[tuple[int, ...], Tensor] = {}
        for index in range(len(dataset)):
            example = dataset[index]
            latent = modality.encode(example.media)
            size = tuple(modality.size(latent))
            if size not in grids:
                grids[size] = modality.positions(size)
            values = modality.tokenize(latent)
            if values.shape != (len(grids[size]), modality.token_dim):
                raise UserError(
                    f"example {index} of size {size} became tokens of shape "
                    f"{tuple(values.shape)}; the modality's positions and token_dim call for "
                    f"[{len(grids[size])}, {modality.token_dim}]"
                )
            self.captions.append(example.caption)
            self.values.append(values.float())
            self.positions.append(grids[size])

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.values)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example."""
        return [len(values) for values in self.values]


def load_dataset(name: str, options: Mapping[str, Any] | None = None) -> Dataset:
    """Build the dataset of that name.

    Args:
        name: Entry-point name, such as "digits".
        options: Keyword arguments of its class.

    Returns:
        The dataset.

    Raises:
        UserError: The name is not installed or an option is wrong.
    """
    cls = registry.load("nextdit.datasets", name)
    dataset: Dataset = build(f"dataset {name!r}", cls, options or {})
    return dataset
