"""Operations counted against PyTorch's own counter, and the rates of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextdit_core import Conditioning, NextDiT, NextDiTConfig, Recipe, Tokens, UserError, train
from nextdit_core.training import loop
from nextdit_core.training.activations import checkpoint_blocks
from nextdit_core.training.flops import FlopMeter, TrainingFlops
from nextdit_core.training.peak import named_peak, peak_tflops
from nextdit_core.training.run_folder import RunFolder
from nextdit_core.training.throughput import Throughput

Make = Callable[..., Recipe]
RATES = {"step_seconds", "samples_per_second", "tokens_per_second", "data_wait", "tflops"}
SIZES: dict[str, Any] = {"token_dim": 4, "width": 48, "layers": 3, "heads": 4, "multiple_of": 32}


def _batch(model: NextDiT, lengths: Sequence[int], text: Sequence[int]) -> tuple[Any, ...]:
    total = sum(lengths)
    tokens = Tokens(torch.randn(total, 4), torch.rand(total, 3) * 8, tuple(lengths))
    t = torch.rand(len(lengths))
    if model.config.classes is not None:
        return tokens, t, model.prepare_classes(torch.zeros(len(lengths), dtype=torch.int64))
    if model.config.text_dim is None:
        return tokens, t
    width = max(text)
    features = torch.randn(len(lengths), width, model.config.text_dim)
    return tokens, t, Conditioning(features, torch.tensor(list(text)))


def _counted(model: NextDiT, batch: tuple[Any, ...]) -> int:
    """Count forward and backward by PyTorch's counter, attention as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch).square().sum().backward()
    return counter.get_total_flops()


def _random(model: nn.Module) -> None:
    """Leave no weight at zero, where a gradient might be left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)


@pytest.mark.parametrize(
    ("changes", "lengths", "text"),
    [
        ({}, (16, 16), ()),
        ({"kv_heads": 2}, (16, 9, 30), ()),
        ({"text_dim": 24}, (16, 16), (8, 8)),
        ({"text_dim": 24, "kv_heads": 2}, (12, 20, 5), (8, 8, 8)),
        ({"text_dim": 24, "qk_norm": False}, (40,), (16,)),
        ({"classes": 10, "final_shift": True}, (9, 9, 9), ()),
    ],
    ids=str,
)
def test_operations_are_those_that_pytorch_counts(
    changes: dict[str, Any], lengths: tuple[int, ...], text: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = NextDiT(NextDiTConfig(**SIZES | changes))
    _random(model)
    meter = FlopMeter(model)
    batch = _batch(model, lengths, text)
    counted = _counted(model, batch)
    assert meter.take() == counted
    assert meter.take() == 0
    meter.remove()
    model(*batch)
    assert meter.take() == 0


def test_text_that_learns_takes_a_gradient() -> None:
    torch.manual_seed(0)
    model = NextDiT(NextDiTConfig(**SIZES, text_dim=24))
    _random(model)
    tokens, t, condition = _batch(model, (16, 16), (8, 8))
    learnt = Conditioning(condition.text.requires_grad_(), condition.lengths)
    meter = FlopMeter(model, text_learns=True)
    assert _counted(model, (tokens, t, learnt)) == meter.take()


def test_text_that_fills_up_a_batch_does_not_count() -> None:
    torch.manual_seed(0)
    model = NextDiT(NextDiTConfig(**SIZES, text_dim=24))
    meter = FlopMeter(model)
    model(*_batch(model, (10, 10), (8, 3)))
    assert meter.take() == meter.flops((10, 10), (8, 3)) < meter.flops((10, 10), (8, 8))


def test_what_is_computed_again_does_not_count() -> None:
    torch.manual_seed(0)
    model = NextDiT(NextDiTConfig(**SIZES))
    _random(model)
    checkpoint_blocks(model)
    meter = FlopMeter(model)
    assert _counted(model, _batch(model, (16, 16), ())) > 1.2 * meter.take()


def test_a_large_model_is_six_times_its_weights_and_attention() -> None:
    """Kaplan's 6·N·tokens, N without embeddings; PaLM's 12·layers·width·tokens² beside it."""
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig.named("2b", token_dim=16, text_dim=2048))
    blocks = [
        module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[1] in ("attention", "feed_forward")
        and not name.endswith("_y")
    ]
    weights = sum(module.weight.numel() for module in blocks)
    tokens = 4096
    expected = 6 * weights * tokens + 12 * 24 * 2304 * tokens * (tokens + 128)
    assert TrainingFlops.of(model)((tokens,), (128,)) == pytest.approx(expected, rel=0.01)


def test_rows_of_a_run_tell_its_rates(recipe: Make) -> None:
    run = recipe(steps=6, log_every=2, checkpoint_every=6, peak_tflops=0.5)
    begun = time.perf_counter()
    train(run)
    wall = time.perf_counter() - begun
    rows = RunFolder(run.out).rows()
    reports = [row for row in rows if "step_seconds" in row]
    assert [row["step"] for row in reports] == [2, 4, 6]
    for row in reports:
        assert row.keys() >= RATES
        assert 0 < row["data_wait"] < 1
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5, rel=1e-4)
        tokens = row["tokens_per_second"] * row["step_seconds"] * 2
        assert tokens == pytest.approx(round(tokens), abs=0.01)
        assert row["samples_per_second"] < row["tokens_per_second"]
    assert sum(2 * row["step_seconds"] for row in reports) < wall
    parts = loop.prepare(run)
    plan = loop.epoch_plan(parts.data.lengths, run.batch_tokens, run.seed, 0)
    first = sum(parts.data.lengths[one] for batch in plan[:2] for one in batch)
    got = reports[0]["tokens_per_second"] * reports[0]["step_seconds"] * 2
    assert got == pytest.approx(first, rel=1e-4)


def test_micro_batches_and_checkpoints_need_the_same_operations(
    recipe: Make, tmp_path: Any
) -> None:
    totals = []
    for name, changes in {
        "whole": {},
        "parts": {"micro_batch_tokens": 6},
        "again": {"checkpoint_activations": True},
    }.items():
        run = recipe(out=str(tmp_path / name), steps=2, log_every=2, **changes)
        train(run)
        row = RunFolder(run.out).rows()[-1]
        totals.append(row["tflops"] * row["step_seconds"])
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-4)


def test_no_peak_no_utilisation(recipe: Make) -> None:
    train(recipe(steps=2))
    rows = RunFolder(recipe().out).rows()
    assert "tflops" in rows[-1]
    assert all("mfu" not in row for row in rows)


def test_waiting_for_data_is_told_from_computing(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.make_batch

    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(loop, "make_batch", slow)
    train(recipe(steps=4, log_every=2))
    slowest = RunFolder(recipe().out).rows()[-1]
    assert slowest["data_wait"] > 0.5
    assert slowest["step_seconds"] >= 0.1


def test_writing_a_checkpoint_is_no_step() -> None:
    rates = Throughput()
    rates.step(1, 1, 1)
    time.sleep(0.05)
    rates.resume()
    rates.step(4, 40, 10**9)
    time.sleep(0.01)
    numbers = rates.numbers(2e9)
    assert 0.01 <= numbers["step_seconds"] < 0.05
    assert numbers["tokens_per_second"] == pytest.approx(40 / numbers["step_seconds"], rel=1e-4)
    assert numbers["tflops"] == pytest.approx(2e-3 / numbers["step_seconds"], rel=1e-4)
    assert "mfu" not in numbers


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_is_known_or_none(name: str, tflops: float | None) -> None:
    assert named_peak(name) == tflops


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_cpu_has_no_peak(precision: str) -> None:
    assert peak_tflops(torch.device("cpu"), precision) is None


def test_a_peak_that_is_no_number_is_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match=r"'peak_tflops' is 0; .*greater than 0"):
        recipe(peak_tflops=0)
