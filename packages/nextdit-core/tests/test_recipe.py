from __future__ import annotations

from pathlib import Path

import pytest

from nextdit_core import Recipe, UserError

MINIMAL = 'out = "runs/x"\nmodality = "image"\ndataset = "digits"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def test_overrides_reach_into_sections_and_keep_their_types(file: Path) -> None:
    recipe = Recipe.load(
        file, ["steps=7", "model.width=128", "optimizer.lr=1e-3", "engine=ray", "address=auto"]
    )
    assert (recipe.steps, recipe.model.width, recipe.optimizer.lr) == (7, 128, 1e-3)
    assert (recipe.engine, recipe.address) == ("ray", "auto")


def test_to_dict_and_back_is_the_same_recipe(file: Path) -> None:
    recipe = Recipe.load(file, ["model.kv_heads=2"])
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=7", r"unknown recipe key 'stepz'; accepted: steps,"),
        ("model.widht=7", r"unknown recipe key 'model.widht'; accepted: model.width,"),
        ("workers=0", r"'workers' is 0; .*greater than or equal to 1"),
        ("steps=many", r"'steps' is 'many'; .*integer"),
        ("steps=1.5", r"'steps' is 1.5; .*integer"),
        ("precision=float8", r"'precision' is 'float8'; .*'float32' or 'bfloat16'"),
        ("modality.x=1", r"modality is a value, not a section"),
        ("steps", r"'steps' is not an override; expected key=value"),
    ],
)
def test_bad_overrides_name_the_key(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.load(file, [override])


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('out = "x"\nmodality = "image"\n')
    with pytest.raises(UserError, match="lacks 'dataset'"):
        Recipe.load(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read recipe"):
        Recipe.load(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("steps = = 3")
    with pytest.raises(UserError, match="not valid TOML"):
        Recipe.load(path)
