from __future__ import annotations

import json
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nextdit_core import NextDiT, NextDiTConfig, Pipeline, Recipe, Tokens, UserError, train
from nextdit_core.training import loop
from nextdit_core.training.activations import checkpoint_blocks
from nextdit_core.training.run_folder import RunFolder

Make = Callable[..., Recipe]


def _curve(recipe: Recipe) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in RunFolder(recipe.out).rows()]


def test_training_learns(recipe: Make) -> None:
    run = recipe(steps=150, checkpoint_every=150, log_every=50)
    train(run)
    losses = [loss for _, loss in _curve(run)]
    assert len(losses) == 150
    assert sum(losses[-30:]) < 0.75 * sum(losses[:30])


def test_a_stopped_run_continues_the_curve_bit_for_bit(recipe: Make, tmp_path: Path) -> None:
    whole = recipe(out=str(tmp_path / "whole"))
    train(whole)
    parts = recipe(out=str(tmp_path / "parts"), steps=5)
    train(parts)
    longer = recipe(out=str(tmp_path / "parts"))
    train(longer)
    assert _curve(longer) == _curve(whole)
    final = [
        RunFolder(r.out).checkpoint(12) / "backbone" / "model.safetensors" for r in (whole, longer)
    ]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_steps_after_the_last_checkpoint_are_done_again(recipe: Make) -> None:
    run = recipe()
    train(run)
    folder = RunFolder(run.out)
    before = _curve(run)
    (folder.checkpoint(12) / "complete.json").unlink()  # as if writing had been cut off
    assert train(run) == folder.checkpoint(12)
    assert _curve(run) == before
    starts = [event["step"] for event in folder.events() if event["event"] == "start"]
    assert starts == [0, 8]


def test_a_finished_run_is_left_alone(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe()
    checkpoint = train(run)
    monkeypatch.setattr(loop, "train", None)
    assert train(run.model_copy(update={"engine": "not installed"})) == checkpoint


def test_a_run_with_other_settings_is_refused(recipe: Make) -> None:
    train(recipe())
    with pytest.raises(UserError, match=r"holds a run with seed = 0.*choose another folder"):
        train(recipe(seed=1, steps=20))


def test_a_folder_with_something_else_is_refused(recipe: Make, tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(recipe())
    assert [file.name for file in place.iterdir()] == ["thesis.txt"]


def test_only_the_newest_checkpoints_are_kept(recipe: Make) -> None:
    run = recipe(keep_checkpoints=2)
    train(run)
    names = sorted(path.name for path in (RunFolder(run.out).path / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000012"]


def test_ctrl_c_leaves_a_checkpoint_and_the_same_call_resumes(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = recipe(out=str(tmp_path / "whole"))
    train(whole)
    real = loop._rank_loss
    calls = 0

    def interrupting(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loop, "_rank_loss", interrupting)
    run = recipe()
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        train(run)
    newest = RunFolder(run.out).newest()
    assert newest is not None
    assert newest.name == "step_00000006"  # the first report after the fifth step
    train(run)
    assert _curve(run) == _curve(whole)


def test_losses_that_are_not_finite_stop_with_their_step(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop._rank_loss
    monkeypatch.setattr(loop, "_rank_loss", lambda *args: real(*args) * float("nan"))
    with pytest.raises(UserError, match=r"the loss of step 10 is nan .* Lower optimizer.lr"):
        train(recipe())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_step_that_is_not_finite_is_left_out_and_counted(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    real = loop._rank_loss
    calls = 0

    def sometimes(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args) * (bad if calls == 3 else 1.0)

    monkeypatch.setattr(loop, "_rank_loss", sometimes)
    run = recipe(log_every=4, ema_decay=0.0, steps=4, checkpoint_every=1, keep_checkpoints=9)
    train(run)
    rows = RunFolder(run.out).rows()
    assert [row["step"] for row in rows if row.get("skipped")] == [3]

    def weights(step: int) -> dict[str, torch.Tensor]:
        return load_file(RunFolder(run.out).checkpoint(step) / "training" / "state.safetensors")

    before, left_out, after = weights(2), weights(3), weights(4)
    assert all(torch.equal(before[name], left_out[name]) for name in before)
    changed = [name for name in before if not torch.equal(left_out[name], after[name])]
    assert "model.backbone.x_embedder.weight" in changed
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_micro_batches_give_the_gradients_of_the_batch(recipe: Make, tmp_path: Path) -> None:
    whole = recipe(out=str(tmp_path / "whole"))
    parts = recipe(out=str(tmp_path / "parts"), micro_batch_tokens=6)
    train(whole)
    train(parts)
    for one, other in zip(_curve(whole), _curve(parts), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)
    norms = [[row["grad_norm"] for row in RunFolder(r.out).rows()] for r in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_checkpointed_activations_change_memory_and_nothing_else(
    recipe: Make, tmp_path: Path
) -> None:
    plain = recipe(out=str(tmp_path / "plain"))
    less = recipe(out=str(tmp_path / "less"), checkpoint_activations=True)
    files = [train(run) / "backbone" / "model.safetensors" for run in (plain, less)]
    assert files[0].read_bytes() == files[1].read_bytes()

    def saved(*, forget: bool) -> int:
        """Add up the bytes that autograd keeps for the backward pass."""
        torch.manual_seed(0)
        model = NextDiT(NextDiTConfig(token_dim=4, width=64, layers=6, heads=4))
        if forget:
            checkpoint_blocks(model)
        tokens = Tokens(torch.randn(64, 4), torch.zeros(64, 3), (64,))
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, torch.tensor([0.5])).square().sum()
        return sum(kept.values())

    assert saved(forget=True) < 0.2 * saved(forget=False)


def test_the_average_is_what_is_saved(recipe: Make) -> None:
    run = recipe(ema_decay=0.0, steps=4)
    checkpoint = train(run)
    raw = load_file(checkpoint / "training" / "state.safetensors")
    saved = load_file(checkpoint / "backbone" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(raw[f"model.backbone.{name}"], tensor), name


def test_more_workers_than_this_process_has_are_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match=r"workers is 2 and engine 'local' has 1.*engine=ray"):
        train(recipe(workers=2))


@pytest.mark.parametrize("what", ["weights", "rows"])
def test_a_write_that_fails_is_one_line_and_keeps_the_checkpoint_before(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The system refuses files above a size, as a full disk would; from the fifth step on."""
    run = recipe()
    real, calls = loop._rank_loss, 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refuse(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            size = 4096 if what == "weights" else 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return real(*args)

    monkeypatch.setattr(loop, "_rank_loss", refuse)
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large; choose another"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    newest = RunFolder(run.out).newest()
    assert newest is not None
    assert newest.name == "step_00000004"


def test_samples_depend_on_their_seed_and_not_on_the_batch(recipe: Make) -> None:
    pipe = Pipeline.from_pretrained(train(recipe()), device="cpu")
    one, two = pipe(["up", "down"], size=[(5,), (7,)], seed=[3, 4])
    assert one.shape == (5, 2)
    assert two.shape == (7, 2)
    (again,) = pipe("down", size=(7,), seed=[4])
    assert (two - again).abs().max() <= 1e-5
    (other,) = pipe("down", size=(7,), seed=[5])
    assert (two - other).abs().max() > 1e-3
    assert torch.equal(pipe("up", seed=1)[0], pipe("up", seed=1)[0])


def test_guidance_is_the_closed_form(recipe: Make) -> None:
    pipe = Pipeline.from_pretrained(train(recipe()), device="cpu")
    options: dict[str, Any] = {"seed": 0, "nfe": 1, "solver": "euler"}
    noise = pipe._noise([(6,)], [(0, 0)]).values
    with_prompt = pipe("up", guidance=1.0, **options)[0] - noise
    without = pipe("", guidance=1.0, **options)[0] - noise
    guided = pipe("up", guidance=3.0, **options)[0] - noise
    assert (guided - (without + 3 * (with_prompt - without))).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "eulre"}, r"eulre.*euler"),
        ({"schedule": "unifrom"}, r"unifrom.*uniform"),
        ({"nfe": 0}, "nfe"),
        ({"size": (0,)}, "dots size"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"size": [(3,), (4,)]}, "2 sizes for 1 prompts"),
    ],
)
def test_bad_requests_are_refused(recipe: Make, options: dict[str, Any], message: str) -> None:
    pipe = Pipeline.from_pretrained(train(recipe(steps=1)), device="cpu")
    with pytest.raises(UserError, match=message):
        pipe("up", **options)


@pytest.mark.parametrize("damage", ["version", "truncated", "not a model", "no weights", "shape"])
def test_a_model_that_cannot_be_loaded_is_named(recipe: Make, damage: str, tmp_path: Path) -> None:
    checkpoint = train(recipe(steps=1))
    marker = checkpoint / "complete.json"
    weights = checkpoint / "backbone" / "model.safetensors"
    message = {
        "version": "has format version 99; nextdit-core .* reads version 1",
        "truncated": "truncated: backbone/model.safetensors has 10 bytes",
        "not a model": "holds no nextdit.json",
        "no weights": "cannot read weights",
        "shape": "do not fit",
    }[damage]
    if damage == "version":
        card = checkpoint / "nextdit.json"
        text = card.read_text().replace('"format_version": 1', '"format_version": 99')
        card.write_text(text)
        _sizes(marker, {"nextdit.json": len(text)})
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:10])
    elif damage == "not a model":
        checkpoint = tmp_path / "empty"
        checkpoint.mkdir()
    elif damage == "no weights":
        weights.write_bytes(b"0123456789")
        _sizes(marker, {"backbone/model.safetensors": 10})
    else:
        config = checkpoint / "backbone" / "config.json"
        text = config.read_text().replace('"width": 16', '"width": 32')
        config.write_text(text)
    with pytest.raises(UserError, match=message):
        Pipeline.from_pretrained(checkpoint, device="cpu")


def _sizes(marker: Path, changes: dict[str, int]) -> None:
    values = json.loads(marker.read_text())
    values["files"] |= changes
    marker.write_text(json.dumps(values))
