"""Named sizes, counted without allocating them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from nextdit_core import NextDiT, NextDiTConfig, Recipe, UserError
from nextdit_core.config import SIZES
from nextdit_core.recipe import SizesRecipe

#: Fields that no recipe sets: they follow from the modality, the text encoder and the weights.
BY_MODALITY = {"token_dim", "axes", "text_dim", "classes", "final_shift"}
BY_MODALITY |= {"patch_size", "sample_size"}
TOKEN = 16  # 2 x 2 patches of 4 channels


def _count(config: NextDiTConfig) -> int:
    with torch.device("meta"):
        model = NextDiT(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _thrown_away(config: NextDiTConfig) -> int:
    """Count the second half of the authors' output, for a sigma that nothing reads."""
    return config.token_dim * (config.width + 1)


@pytest.mark.parametrize(("size", "authors"), [("2b", 1_988_524_576), ("2b-gqa", 1_627_386_400)])
def test_text_to_image_sizes_have_the_authors_parameters(size: str, authors: int) -> None:
    """Ours lack the pad token, since nothing is padded, and the half that is thrown away."""
    config = NextDiTConfig.named(size, token_dim=TOKEN, text_dim=2048)
    assert _count(config) + config.width + _thrown_away(config) == authors


@pytest.mark.parametrize(
    ("size", "authors"),
    [
        ("600m", 559_455_776),
        ("2b", 1_763_043_104),
        ("3b", 4_036_300_832),
        ("7b", 7_025_122_336),
    ],
)
def test_class_conditional_sizes_have_the_authors_parameters(size: str, authors: int) -> None:
    """Theirs have no weights in the norms before a sublayer."""
    config = NextDiTConfig.named(size, token_dim=TOKEN, classes=1000, final_shift=True)
    pre_norms = 2 * config.layers * config.width
    assert _count(config) - pre_norms + _thrown_away(config) == authors


def test_the_recognition_size_is_the_papers() -> None:
    """86M counts ViT-B's blocks without modulation: 12 x (4 x 768² + 3 x 768 x 2048)."""
    config = NextDiTConfig.named("86m", token_dim=768)
    with torch.device("meta"):
        model = NextDiT(config)
    blocks = sum(
        parameter.numel()
        for name, parameter in model.layers.named_parameters()
        if "adaLN" not in name
    )
    assert round(blocks / 1e6) == 85
    assert round((blocks + 768 * 769 + 768 * 1000) / 1e6) == 86  # patch embedding and classes


def test_five_is_three_with_wider_text() -> None:
    five = NextDiTConfig.named("5b", token_dim=TOKEN, text_dim=4096)
    assert five == NextDiTConfig.named("3b", token_dim=TOKEN, text_dim=4096)
    assert round(_count(five) / 1e9) == 5


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_tiny_size_takes_any_number_of_axes(axes: int) -> None:
    assert _count(NextDiTConfig.named("tiny", token_dim=4, text_dim=8, axes=axes)) < 1_000_000


def test_what_is_said_wins_over_the_name() -> None:
    config = NextDiTConfig.named("600m", token_dim=4, layers=2, kv_heads=8)
    assert (config.width, config.layers, config.kv_heads) == (1536, 2, 8)


def test_an_unknown_size_lists_the_known() -> None:
    with pytest.raises(UserError, match="unknown backbone size '2b_gqa'; accepted: 2b-gqa"):
        NextDiTConfig.named("2b_gqa", token_dim=4)
    with pytest.raises(UserError, match="unknown backbone config key 'depth'"):
        NextDiTConfig.named("2b", token_dim=4, depth=3)


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_names_a_size(size: str, recipe: Callable[..., Recipe]) -> None:
    sizes = recipe(model={"size": size}).model
    config = NextDiTConfig(token_dim=TOKEN, **sizes.to_fields())
    assert config == NextDiTConfig.named(size, token_dim=TOKEN)


def test_a_recipe_changes_a_named_size_and_is_read_back(recipe: Callable[..., Recipe]) -> None:
    made = recipe(model={"size": "600m", "layers": 2})
    assert (made.model.width, made.model.layers) == (1536, 2)
    assert Recipe.from_dict(made.to_dict()) == made
    with pytest.raises(UserError, match="input should be 'tiny'"):
        recipe(model={"size": "600"})


def test_the_recipe_knows_every_size() -> None:
    names, _ = get_args(SizesRecipe.model_fields["size"].annotation)
    assert set(get_args(names)) == set(SIZES)
    fields = {field.name for field in dataclasses.fields(NextDiTConfig)}
    assert set(SizesRecipe().to_fields()) == fields - BY_MODALITY
