from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nextdit_core import Pipeline, UserError, train
from nextdit_core.text_encoders import TextEncoder, load_text_encoder
from nextdit_core.text_encoders.cached import BATCH, CachedTextEncoder
from nextdit_core.text_encoders.feature_cache import FeatureCache
from nextdit_core.training.run_folder import RunFolder

pytest.importorskip("transformers")

FOXES = [f"a fox of {number} years" for number in range(3 * BATCH + 5)]
PROMPTS = ["a red fox", "", "孤舟蓑笠翁 🎣", "A Red FOX", "a lighthouse in a storm " * 20]


@pytest.fixture
def load(language_model: Callable[[str], Path]) -> Callable[..., Any]:
    """Load a frozen encoder."""

    def encoder(**options: Any) -> Any:
        options = {"model": str(language_model("gemma")), **options}
        return load_text_encoder("transformers", options)

    return encoder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Note which prompts reach a language model."""
    from nextdit_core.text_encoders.transformers import TransformersTextEncoder

    seen: list[list[str]] = []
    real = TransformersTextEncoder.forward

    def forward(self: Any, prompts: list[str]) -> Any:
        seen.append(list(prompts))
        return real(self, prompts)

    monkeypatch.setattr(TransformersTextEncoder, "forward", forward)
    return seen


def test_cached_features_are_those_of_the_encoder(load: Any, tmp_path: Path) -> None:
    cached = CachedTextEncoder(load(), tmp_path)
    assert isinstance(cached, TextEncoder)
    expected = load()(PROMPTS)
    for _ in range(2):  # computed, then read
        condition = cached([*PROMPTS, "a red fox"])
        assert torch.equal(condition.text[:-1], expected.text)
        assert torch.equal(condition.lengths[:-1], expected.lengths)
        assert condition.host_lengths == tuple(condition.lengths.tolist())
        assert torch.equal(condition.text[-1], expected.text[0])
    assert not condition.text.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_features_come_back_bit_for_bit(load: Any, tmp_path: Path, dtype: str) -> None:
    first = CachedTextEncoder(load(dtype=dtype), tmp_path)(PROMPTS)
    again = CachedTextEncoder(load(dtype=dtype), tmp_path)(PROMPTS)
    assert again.text.dtype == getattr(torch, dtype)
    assert torch.equal(first.text, again.text)


def test_a_caption_is_encoded_once_by_all_runs(
    load: Any, tmp_path: Path, calls: list[list[str]]
) -> None:
    cached = CachedTextEncoder(load(), tmp_path)
    steps = list(cached.fill(FOXES * 2))
    assert steps[-1] == (len(FOXES), len(FOXES))
    assert sorted(prompt for call in calls for prompt in call) == sorted(FOXES)
    assert max(map(len, calls)) == BATCH
    assert cached.encoder._loaded == ()  # the weights are not in memory any more
    calls.clear()
    other = CachedTextEncoder(load(), tmp_path)
    assert list(other.fill(FOXES, begin=0.5))[-1] == (len(FOXES), 0)
    other(FOXES)
    assert calls == []
    assert other.encoder._loaded == ()


def test_each_process_begins_at_its_own_place(
    load: Any, tmp_path: Path, calls: list[list[str]]
) -> None:
    """One that comes to what another has made passes by."""
    first, second = (CachedTextEncoder(load(), tmp_path) for _ in range(2))
    one, two = first.fill(FOXES), second.fill(FOXES, begin=0.5)
    for _ in range(2):
        next(one), next(two)
    assert len({prompt for call in calls for prompt in call}) == len(FOXES)
    assert [step[1] for step in one][-1] + [step[1] for step in two][-1] == len(FOXES)
    assert len(calls) == 4


def test_the_key_is_the_encoder_and_the_prompt(load: Any, tmp_path: Path) -> None:
    folders = set()
    for options in ({}, {"layer": -1}, {"max_tokens": 8}, {"dtype": "bfloat16"}):
        cached = CachedTextEncoder(load(**options), tmp_path)
        cached(PROMPTS)
        assert cached.cache.size()[0] == len(PROMPTS)
        folders.add(cached.cache.folder)
    assert len(folders) == 4
    assert len({cached.cache.path(prompt) for prompt in PROMPTS}) == len(PROMPTS)


def test_the_size_is_what_the_files_take(load: Any, tmp_path: Path) -> None:
    cached = CachedTextEncoder(load(), tmp_path)
    assert cached.cache.size() == (0, 0)
    cached(PROMPTS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert cached.cache.size() == (len(PROMPTS), sum(path.stat().st_size for path in files))
    tensors = [load_file(path)["features"] for path in files]
    lengths = cached(PROMPTS).lengths
    assert sorted(map(len, tensors)) == sorted(lengths.tolist())  # no padding on disk


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)


def _another_file(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features": torch.zeros(3, 32)}, path)


@pytest.mark.parametrize("damage", [_cut, _empty, _flip, _another_file])
def test_a_damaged_entry_is_made_again_with_a_warning(
    load: Any, tmp_path: Path, damage: Callable[[Path], None], calls: list[list[str]]
) -> None:
    cached = CachedTextEncoder(load(), tmp_path)
    expected = cached(PROMPTS)
    path = cached.cache.path(PROMPTS[2])
    before = path.read_bytes()
    damage(path)
    calls.clear()
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is damaged .*computed again"):
        condition = cached(PROMPTS)
    assert calls == [[PROMPTS[2]]]
    assert (condition.text - expected.text).abs().max() <= 1e-5 * expected.text.abs().max()
    again = cached(PROMPTS)  # without a warning, which would be an error here
    assert torch.equal(again.text, condition.text)
    assert len(path.read_bytes()) == len(before)


def test_no_flipped_bit_gives_other_features(tmp_path: Path, random: torch.Generator) -> None:
    cache = FeatureCache(tmp_path, "0" * 64, 4)
    features = torch.randn(3, 4, generator=random).bfloat16()
    cache.write("a", features)
    path = cache.path("a")
    data = path.read_bytes()
    missed = []
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = cache.read("a")
        if found is not None and not torch.equal(found, features):
            missed.append(bit)
    assert missed == []


FILL = """
import json, sys
from nextdit_core.text_encoders import load_text_encoder
from nextdit_core.text_encoders.cached import CachedTextEncoder
folder, model = sys.argv[1:]
cached = CachedTextEncoder(load_text_encoder("transformers", {"model": model}), folder)
assert cached.cache.size() == (0, 0)
print("ready", flush=True)
*_, (_, made) = cached.fill(json.loads(sys.stdin.readline()))
print(made, flush=True)
"""


def test_processes_fill_one_folder(load: Any, tmp_path: Path) -> None:
    encoder = load()
    command = [sys.executable, "-c", FILL, str(tmp_path), encoder.model]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
        answers = []
        for worker in workers:
            worker.stdin.write(json.dumps(FOXES) + "\n")
            worker.stdin.flush()
        for worker in workers:
            answers.append(int(worker.communicate(timeout=120)[0]))
            assert worker.returncode == 0
    finally:
        for worker in workers:
            worker.kill()
    assert len(FOXES) <= sum(answers) <= 2 * len(FOXES)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(FOXES)
    assert not [path for path in files if path.name.startswith(".")]
    expected = encoder(FOXES)
    cached = CachedTextEncoder(load(), tmp_path)
    found = cached(FOXES)
    assert cached.encoder._loaded == ()
    assert torch.equal(found.lengths, expected.lengths)
    assert (found.text - expected.text).abs().max() <= 1e-5 * expected.text.abs().max()


def test_threads_write_one_entry(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "0" * 64, 64)
    rows = [torch.full((50, 64), float(number)) for number in range(8)]

    def write(row: torch.Tensor) -> torch.Tensor | None:
        for _ in range(20):
            cache.write("a", row)
            found = cache.read("a")
            assert found is not None
            assert bool((found == found[0, 0]).all())
        return found

    with ThreadPoolExecutor(8) as pool:
        assert all(found is not None for found in pool.map(write, rows))
    assert cache.size()[0] == 1


def test_an_encoder_that_learns_is_refused(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ByteTextEncoder learns with the backbone.*text_cache"):
        train(recipe(text_cache=str(tmp_path / "cache")))
    assert not (tmp_path / "run").exists()


def test_features_that_are_not_finite_are_not_kept(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load()
    encoder(["a"])
    with torch.no_grad():
        next(encoder._loaded[0].parameters())[:] = float("inf")
    cached = CachedTextEncoder(encoder, tmp_path)
    with pytest.raises(UserError, match="features of 'a red fox' are not finite"):
        cached(["a red fox"])
    assert cached.cache.size() == (0, 0)


def test_a_folder_that_cannot_be_written_is_named(load: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cached = CachedTextEncoder(load(), tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/"):
        cached(["a red fox"])


def _run(recipe: Any, model: Path, **changes: Any) -> Any:
    return recipe(
        text_encoder="transformers", text_encoder_options={"model": str(model)}, **changes
    )


def _losses(run: Any) -> list[float]:
    return [row["loss"] for row in RunFolder(run.out).rows()]


def test_training_reads_the_cache_and_draws_the_same_curve(
    recipe: Any,
    language_model: Callable[[str], Path],
    tmp_path: Path,
    calls: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = language_model("gemma")
    plain = _run(recipe, model, out=str(tmp_path / "plain"))
    train(plain)
    calls.clear()
    kept = _run(recipe, model, out=str(tmp_path / "kept"), text_cache=str(tmp_path / "cache"))
    capsys.readouterr()
    checkpoint = train(kept)
    assert sorted(prompt for call in calls for prompt in call) == ["", "down", "up"]
    assert _losses(kept) == pytest.approx(_losses(plain), abs=1e-5)
    said = capsys.readouterr().err
    assert "encoding captions: 3/3 captions" in said
    (event,) = [e for e in RunFolder(kept.out).events() if e["event"] == "text_cache"]
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert (event["made"], event["captions"]) == (3, 3)
    assert event["bytes"] == sum(path.stat().st_size for path in files)
    assert f"3 new; 3 take {event['bytes'] / 1e6:.1f} MB in {tmp_path / 'cache'}" in said

    calls.clear()
    again = kept.model_copy(update={"out": str(tmp_path / "again"), "steps": 5})
    train(again)
    train(again.model_copy(update={"steps": 12}))
    assert calls == []
    assert _losses(again) == _losses(kept)
    cache = tmp_path / "cache"
    moved = again.model_copy(update={"steps": 14, "text_cache": str(cache.rename(f"{cache}-2"))})
    train(moved)  # the folder's place is no part of what the run is
    assert calls == []

    card = (checkpoint / "nextdit.json").read_text()
    assert "cache" not in card
    (sample,) = Pipeline.from_pretrained(checkpoint, device="cpu")("up")
    assert sample.isfinite().all()


def test_ctrl_c_while_encoding_stops_and_the_same_call_goes_on(
    recipe: Any,
    language_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[list[str]],
) -> None:
    monkeypatch.setattr("nextdit_core.text_encoders.cached.BATCH", 1)
    run = _run(recipe, language_model("gemma"), text_cache=str(tmp_path / "cache"), steps=4)
    real = CachedTextEncoder._make

    def interrupting(self: Any, prompts: list[str]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(CachedTextEncoder, "_make", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert len(calls) == 1
    assert _losses(run) == []
    train(run)
    assert sorted(prompt for call in calls for prompt in call) == ["", "down", "up"]
    assert len(_losses(run)) == 4
