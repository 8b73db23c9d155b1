"""Runs that start from given weights, all of them trained or adapters alone."""

from __future__ import annotations

import builtins
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextdit_core import (
    Conditioning,
    NextDiT,
    NextDiTConfig,
    Pipeline,
    Recipe,
    Tokens,
    UserError,
    train,
)
from nextdit_core.recipe import LoraRecipe
from nextdit_core.training.flops import FlopMeter
from nextdit_core.training.loop import prepare
from nextdit_core.training.lora import add_adapters
from nextdit_core.training.run_folder import RunFolder

Make = Callable[..., Recipe]

#: A backbone that the authors' and diffusers' layouts can hold: two axes, tokens of 2 x 2 x 1.
GRID = """
import torch
from nextdit_core import Example, Modality


class Tiles(Modality):
    axes = 2
    suffix = ".txt"
    token_dim = 4
    default_size = (2, 3)
    options = {}

    def size(self, latent):
        return tuple(latent.shape[:2])

    def positions(self, size):
        rows, columns = (torch.arange(float(extent)) for extent in size)
        return torch.cartesian_prod(torch.zeros(1), rows, columns)

    def tokenize(self, latent):
        return latent.flatten(0, 1)

    def detokenize(self, values, size):
        return values.unflatten(0, size)

    def write(self, media, path, captions):
        path.write_text("")


class Slopes:
    def __len__(self):
        return 12

    def __getitem__(self, index):
        rise = torch.linspace(-1, 1, 6).view(2, 3, 1).expand(2, 3, 4)
        return Example(rise * (1 if index % 2 else -1), "up" if index % 2 else "down")
"""

GRID_ENTRY_POINTS = """
[nextdit.modalities]
tiles = toy_tiles:Tiles
[nextdit.datasets]
slopes = toy_tiles:Slopes
"""


@pytest.fixture
def base(recipe: Make, tmp_path: Path) -> Path:
    """A model that was trained a little, and saved."""
    return train(recipe(out=str(tmp_path / "base"), steps=8, checkpoint_every=8))


@pytest.fixture
def tiles(install: Callable[..., Path], recipe: Make) -> Callable[..., Recipe]:
    """Make recipes for a modality whose backbones have a form in every layout."""
    install("toy-tiles", "toy_tiles", GRID_ENTRY_POINTS, GRID)

    def make(**changes: Any) -> Recipe:
        return recipe(**{"modality": "tiles", "dataset": "slopes"} | changes)

    return make


def _weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("backbone", "text_encoder")
        for name, tensor in load_file(folder / part / "model.safetensors").items()
    }


def _raw(folder: Path) -> dict[str, Tensor]:
    state = load_file(folder / "training" / "state.safetensors")
    return {
        name.removeprefix("model."): tensor
        for name, tensor in state.items()
        if name.startswith("model.")
    }


def test_step_0_is_the_given_model_and_the_average_starts_there(
    recipe: Make, base: Path, tmp_path: Path
) -> None:
    """With a rate of nearly 0, raw and averaged weights after one step are the given ones."""
    run = recipe(
        out=str(tmp_path / "tuned"),
        init_from=str(base),
        steps=1,
        model={},
        optimizer={"lr": 1e-30},
    )
    folder = train(run)
    given = _weights(base)
    for found in (_weights(folder), _raw(folder)):
        assert found.keys() == given.keys()
        for name, tensor in given.items():
            assert torch.equal(found[name], tensor), name
    assert json.loads((folder / "training" / "position.json").read_text())["step"] == 1
    (event,) = [e for e in RunFolder(run.out).events() if e["event"] == "init_from"]
    assert event["place"] == str(base / "backbone")


def test_the_average_moves_from_the_given_weights(recipe: Make, base: Path, tmp_path: Path) -> None:
    options = {"init_from": str(base), "steps": 1, "model": {}, "ema_decay": 0.1}
    folder = train(recipe(out=str(tmp_path / "tuned"), **options))
    given, raw, average = _weights(base), _raw(folder), _weights(folder)
    moved = [name for name in given if not torch.equal(given[name], raw[name])]
    assert len(moved) > len(given) / 2
    for name in moved:
        expected = 0.1 * given[name].double() + 0.9 * raw[name].double()
        assert (average[name] - expected).abs().max() <= 1e-6


def test_moments_and_position_are_fresh(recipe: Make, base: Path, tmp_path: Path) -> None:
    """The first step of AdamW moves each number by the rate, whatever was before."""
    options = {"init_from": str(base), "steps": 1, "model": {}, "optimizer": {"lr": 1e-3}}
    folder = train(recipe(out=str(tmp_path / "tuned"), **options))
    given, raw = _weights(base), _raw(folder)
    change = torch.cat([(raw[name] - given[name]).flatten() for name in given]).abs()
    assert change.max() <= 1.001e-3
    assert change.median() > 0.9e-3
    assert [row["step"] for row in RunFolder(str(tmp_path / "tuned")).rows()] == [1]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["all", "lora"])
def test_a_resumed_run_is_the_same_and_does_not_look_at_the_given_weights(
    recipe: Make, base: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    if lora is not None:
        pytest.importorskip("peft", reason="peft is not installed")
    options: dict[str, Any] = {"init_from": str(base), "model": {}}
    if lora is not None:
        options["lora"] = lora
    whole = train(recipe(out=str(tmp_path / "whole"), **options))
    first = train(recipe(out=str(tmp_path / "parts"), steps=5, **options))
    assert (first / "nextdit.json").is_file()
    shutil.rmtree(base)
    again = train(recipe(out=str(tmp_path / "parts"), **options))
    for name, tensor in _weights(whole).items():
        assert torch.equal(_weights(again)[name], tensor), name
    curves = [
        [(row["step"], row["loss"]) for row in RunFolder(folder.parents[1]).rows()]
        for folder in (whole, again)
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("layout", ["nextdit", "diffusers", "authors"])
def test_a_backbone_of_every_layout_is_a_start(
    tiles: Make, tmp_path: Path, random: torch.Generator, layout: Any
) -> None:
    config = NextDiTConfig(
        token_dim=4, axes=2, width=32, layers=2, heads=4, kv_heads=2, text_dim=16, multiple_of=32
    )
    backbone = NextDiT(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    backbone.to(torch.bfloat16).save_pretrained(tmp_path / "weights", layout=layout)
    run = tiles(
        out=str(tmp_path / "tuned"),
        init_from=str(tmp_path / "weights"),
        steps=1,
        model={},
        optimizer={"lr": 1e-30},
    )
    folder = train(run)
    found = _raw(folder)
    for name, tensor in backbone.state_dict().items():
        assert found[f"backbone.{name}"].dtype == torch.float32
        assert torch.equal(found[f"backbone.{name}"], tensor.float()), name
    assert Pipeline.from_pretrained(folder, device="cpu").model.backbone.config.width == 32


def test_a_saved_model_of_the_hub_is_a_start_with_its_text_encoder(
    recipe: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as huggingface_hub's cache is after a download."""
    constants = pytest.importorskip("huggingface_hub.constants")
    given = _weights(base)
    home = tmp_path / "cache" / "models--someone--dots"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    base.rename(home / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    options = {"init_from": "someone/dots", "model": {}, "steps": 1, "optimizer": {"lr": 1e-30}}
    found = _raw(train(recipe(out=str(tmp_path / "tuned"), **options)))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_fine_tuning_goes_on_where_the_model_stood(recipe: Make, tmp_path: Path) -> None:
    base = train(recipe(out=str(tmp_path / "long"), steps=150, checkpoint_every=150, log_every=50))
    first = [row["loss"] for row in RunFolder(tmp_path / "long").rows()][:12]
    tuned = recipe(out=str(tmp_path / "tuned"), init_from=str(base), model={})
    train(tuned)
    then = [row["loss"] for row in RunFolder(tuned.out).rows()]
    assert sum(then) < 0.8 * sum(first)


def test_adapters_alone_learn_and_peft_reads_them(recipe: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = train(recipe(out=str(tmp_path / "base"), steps=40, checkpoint_every=40))
    targets = ["wq", "wk", "wv", "wo", "wk_y", "w1", "w2"]
    run = recipe(
        out=str(tmp_path / "tuned"),
        init_from=str(base),
        model={},
        lora={"rank": 3, "alpha": 7, "targets": targets},
        optimizer={"lr": 1e-2},
        ema_decay=0.5,
        steps=20,
        checkpoint_every=20,
    )
    folder = train(run)
    given, raw = _weights(base), _raw(folder)
    for name, tensor in given.items():
        layer, _, ending = name.rpartition(".")
        kept = raw.get(name, raw.get(f"{layer}.base_layer.{ending}"))
        assert kept is not None
        assert torch.equal(kept, tensor), name
    moments = load_file(folder / "training" / "state.safetensors")
    learnt = sorted(name for name in moments if name.startswith("exp_avg."))
    assert len(learnt) == 2 * len(targets)
    assert all(".lora_" in name for name in learnt)

    # The model that the checkpoint shows is the one that peft puts together.
    backbone = NextDiT.from_pretrained(base)
    adapted: Any = peft.PeftModel.from_pretrained(backbone, folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    shown = NextDiT.from_pretrained(folder).state_dict()
    assert merged.keys() == shown.keys()
    changed = [name for name in shown if not torch.equal(shown[name], given[f"backbone.{name}"])]
    assert {name.split(".")[-2] for name in changed} == set(targets)
    for name, tensor in shown.items():
        assert (tensor - merged[name]).abs().max() <= 1e-6, name
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    assert (
        pipe("up")[0] - Pipeline.from_pretrained(base, device="cpu")("up")[0]
    ).abs().max() > 1e-4


def test_operations_of_adapters_are_those_that_pytorch_counts(random: torch.Generator) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    config = NextDiTConfig(
        token_dim=4, width=48, layers=3, heads=4, kv_heads=2, text_dim=24, multiple_of=32
    )
    model = NextDiT(config)
    model.requires_grad_(False)
    add_adapters(model, LoraRecipe(rank=4, targets=["wq", "wv", "wk_y", "w1", "w2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    meter = FlopMeter(model)
    tokens = Tokens(torch.randn(48, 4), torch.rand(48, 3) * 8, (24, 24))
    condition = Conditioning(torch.randn(2, 8, 24), torch.tensor([8, 8]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, torch.rand(2), condition).square().sum().backward()
    assert meter.take() == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "nowhere/at/all"}, r"init_from: there is no file or folder nowhere/at/all"),
        ({"init_from": "BASE/nextdit.json"}, r"init_from: "),
        (
            {"text_encoder_options": {"text_dim": 32, "heads": 2}},
            r"its text encoder has options .*'text_dim': 16.*weights of other sizes",
        ),
        (
            {
                "init_from": "BASE/backbone",
                "text_encoder_options": {"text_dim": 32, "heads": 2},
                "model": {"width": 32, "layers": 1, "heads": 4},
            },
            r"text_dim is 16, and the recipe's text encoder has 32; width is 16, and the recipe's "
            r"\[model\] makes it 32; heads is 2, .* makes it 4",
        ),
        ({"model": {"ffn_dim_multiplier": 3.0}}, r"ffn_width is 64, and .* makes it 128"),
        ({"model": {"heads": 3}}, r"with its other sizes, model.width 16 is not a multiple"),
        ({"model": {"size": "tiny"}}, r"width is 16, .* makes it 96; layers is 1, .* makes it 3"),
        (
            {"modality": "tiles", "dataset": "slopes"},
            r"token_dim is 2, .* modality has 4; axes is 1.* modality 'dots' with modality_options",
        ),
        (
            {"objective": {"prediction": "noise"}},
            r"it predicts velocity on the linear path, and the recipe has noise on the linear path "
            r"\(objective.path=linear objective.prediction=velocity would fit\)",
        ),
        (
            {"lora": {"targets": ["wq", "wx"]}},
            r"unknown linear layer in lora.targets 'wx'; accepted",
        ),
        ({"init_from": None, "lora": {}}, r"lora adapts given weights; say which: init_from="),
        ({"init_from": "BASE/backbone", "lora": {}}, r"no weights for the text encoder 'bytes'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_before_any_compute(
    recipe: Make,
    tiles: Make,
    base: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    values = {"out": str(tmp_path / "tuned"), "init_from": str(base), "model": {}} | changes
    if values["init_from"] is None:
        del values["init_from"]
    else:
        values["init_from"] = values["init_from"].replace("BASE", str(base))
    with pytest.raises(UserError, match=message):
        train(recipe(**values))
    assert not (tmp_path / "tuned").exists()


def test_another_start_is_another_run(recipe: Make, base: Path, tmp_path: Path) -> None:
    options = {"out": str(tmp_path / "tuned"), "steps": 1, "model": {}}
    train(recipe(init_from=str(base), **options))
    with pytest.raises(UserError, match=r"holds a run with init_from = "):
        train(recipe(init_from=str(tmp_path), **options | {"steps": 2}))


def test_sizes_that_agree_may_be_said(recipe: Make, base: Path, tmp_path: Path) -> None:
    run = recipe(
        out=str(tmp_path / "tuned"), init_from=str(base), model={"width": 16, "kv_heads": 2}
    )
    assert prepare(run).config.width == 16
    back = Recipe.from_dict(run.to_dict())
    assert back == run
    assert back.model.model_fields_set == {"width", "kv_heads"}


def test_without_peft_the_way_to_get_it_is_told(
    recipe: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "nextdit_core.training.lora.find_spec",
        lambda name: None if name == "peft" else real(name),
    )
    run = recipe(out=str(tmp_path / "tuned"), init_from=str(base), model={}, lora={})
    with pytest.raises(UserError, match=r"pip install 'nextdit-core\[lora\]'"):
        train(run)


def test_no_adapters_no_peft(
    recipe: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        assert not name.startswith("peft")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    train(recipe(out=str(tmp_path / "tuned"), init_from=str(base), model={}, steps=1))
