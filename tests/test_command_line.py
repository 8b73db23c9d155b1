"""The command line: what it starts with, what it says to bad input, what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

RECIPE = """
out = "run"
modality = "image"
dataset = "digits"
modality_options = { channels = 1, patch_size = 4, height = 16, width = 16 }
model = { width = 32, layers = 1, heads = 2 }
text_encoder_options = { text_dim = 16, heads = 2 }
steps = 6
batch_tokens = 256
checkpoint_every = 2
sampling = { nfe = 4 }
device = "cpu"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to sample from."""
    from nextdit_core import Recipe, train

    folder = tmp_path_factory.mktemp("trained")
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    train(Recipe.load(path, [f'out="{folder / "run"}"']))
    return folder / "run"


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['nextdit', '--help']\n"
        "from nextdit_core.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'ray', 'sklearn', 'pydantic', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - begun)
    assert "demo" in run.stdout
    assert "train" in run.stdout
    assert run.stderr.strip() == "[]"
    assert min(times) < 0.5, times


def _error(run: subprocess.CompletedProcess[str]) -> str:
    """The one line that a user's error is, behind lines of progress."""
    assert run.returncode == 2, run.stdout + run.stderr
    lines = [line for line in run.stderr.splitlines() if not line.startswith("training:")]
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("nextdit: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["stepz=3"], ["unknown recipe key 'stepz'", "accepted: steps,"]),
        (["modality=imge"], ["unknown modality 'imge'", "accepted: image"]),
        (["dataset=digit"], ["unknown dataset 'digit'", "accepted: digits"]),
        (["engine=rya"], ["unknown engine 'rya'", "accepted: ray"]),
        (["text_encoder=byte"], ["unknown text encoder 'byte'", "accepted: bytes"]),
        (["sampling.solver=midpiont"], ["'midpiont'", "midpoint"]),
        (["sampling.schedule=unifrom"], ["'unifrom'", "uniform"]),
        (["workers=0"], ["'workers' is 0", "greater than or equal to 1"]),
        (["workers=3"], ["workers is 3", "engine=ray"]),
        (["modality_options.patch=4"], ["no option 'patch'", "accepted: patch_size"]),
        (["model.heads=5"], ["model.width 32 is not a multiple of model.heads 5"]),
        (["batch_tokens=8"], ["more than batch_tokens 8", "at least 16"]),
        (["dataset_options.split=dev"], ["'dev'", "train, test, all"]),
        (["dataset=folder", "dataset_options.path=nowhere"], ["nowhere is not a folder"]),
        (["device=cuda:x"], ["'device' is 'cuda:x'"]),
        (["objective.prediction=nose"], ["'nose'", "'noise'"]),
        (["objective.pth=vp"], ["unknown recipe key 'objective.pth'", "accepted: objective.path"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_bad_recipe_is_one_line_that_helps(
    nextdit: Run, recipe: Path, tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    line = _error(nextdit("train", str(recipe), *overrides))
    assert [part for part in parts if part not in line] == [], line
    assert not (tmp_path / "run").exists()


def test_an_unknown_command_names_the_closest(nextdit: Run) -> None:
    assert "unknown command 'trian'; accepted: train," in _error(nextdit("trian"))


def test_a_missing_package_says_how_to_get_it(nextdit: Run, tmp_path: Path) -> None:
    """As after `pip uninstall scikit-learn`: a module of that name that cannot be imported."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sklearn.py").write_text("raise ImportError('no scikit-learn here')")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    run = subprocess.run(
        [sys.executable, "-m", "nextdit_core", "train", str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(blocked)},
        capture_output=True,
        text=True,
    )
    assert "pip install modality-image[digits]" in _error(run)


def test_a_folder_that_cannot_be_written_is_named(nextdit: Run, recipe: Path) -> None:
    assert "cannot write to run folder /proc/run" in _error(
        nextdit("train", str(recipe), "out=/proc/run")
    )


def test_train_sample_and_info_work_one_by_one(nextdit: Run, recipe: Path, tmp_path: Path) -> None:
    run = nextdit("train", str(recipe))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("trained: ")
    assert "training: 6/6 steps" in run.stderr

    prompt = "a handwritten seven"
    run = nextdit("sample", "run", prompt, "--count", "3", "--out", "sevens.png")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "wrote 3 samples to sevens.png\n"
    first = (tmp_path / "sevens.png").read_bytes()
    nextdit("sample", "run", prompt, "--count", "3", "--out", "again.png")
    assert (tmp_path / "again.png").read_bytes() == first

    run = nextdit("info", "run")
    assert run.returncode == 0, run.stderr
    assert "parameters" in run.stdout
    run = nextdit("info")
    assert "torch" in run.stdout


def test_a_model_that_predicts_noise_is_trained_sampled_and_told_apart(
    nextdit: Run, recipe: Path, tmp_path: Path
) -> None:
    run = nextdit("train", str(recipe), "objective.path=vp", "objective.prediction=noise")
    assert run.returncode == 0, run.stderr
    prompt = "a handwritten seven"
    for name, options in (("ode.png", []), ("sde.png", ["--sde", "sigma:0.5"])):
        run = nextdit("sample", "run", prompt, "--out", name, *options)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "ode.png").read_bytes() != (tmp_path / "sde.png").read_bytes()
    assert "noise on the vp path" in nextdit("info", "run").stdout
    line = _error(nextdit("train", str(recipe), "objective.prediction=noise"))
    assert "holds a run with objective.path = 'vp'" in line
    line = _error(nextdit("convert", "run", "out", "--to", "diffusers"))
    assert "predicts noise on the vp path" in line
    assert not (tmp_path / "out").exists()


def test_a_model_is_tuned_from_another(
    nextdit: Run, recipe: Path, trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    sizes = "model = { width = 32, layers = 1, heads = 2 }\n"
    recipe.write_text(recipe.read_text().replace(sizes, ""))
    for out, options in (("all", []), ("few", ["lora.rank=2", 'lora.targets=["wq", "w2"]'])):
        run = nextdit("train", str(recipe), f"out={out}", f"init_from={trained}", *options)
        assert run.returncode == 0, run.stderr
        run = nextdit("sample", out, "a handwritten seven", "--out", f"{out}.png")
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "few/checkpoints/step_00000006/adapter/adapter_config.json").is_file()
    for override, parts in (
        ("text_encoder_options.text_dim=32", ["'text_dim': 16", "weights of other sizes"]),
        ("model.width=64", ["width is 32", "[model] makes it 64"]),
        ("init_from=nowhere", ["init_from: there is no file or folder nowhere"]),
        ("lora.rnk=3", ["unknown recipe key 'lora.rnk'", "accepted: lora.rank"]),
    ):
        line = _error(nextdit("train", str(recipe), "out=other", f"init_from={trained}", override))
        assert [part for part in parts if part not in line] == [], line
        assert not (tmp_path / "other").exists()


def test_a_folder_of_samples_is_completed_and_not_made_again(
    nextdit: Run, trained: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten one\n\na handwritten two\n")
    arguments = ("sample", str(trained), str(prompts), "--count", "2", "--out", "samples")
    assert nextdit(*arguments).stdout == "wrote 4 samples to samples\n"
    files = sorted((tmp_path / "samples").iterdir())
    assert len(files) == 4
    gone, kept = files[0], files[1:]
    before, times = gone.read_bytes(), [file.stat().st_mtime_ns for file in kept]
    gone.unlink()
    assert nextdit(*arguments).stdout == "wrote 1 sample to samples (3 were there before)\n"
    assert gone.read_bytes() == before
    assert [file.stat().st_mtime_ns for file in kept] == times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "eulre"], "accepted, closest first: euler,"),
        (["--schedule", "shfit:4"], "shift"),
        (["--sde", "sgima"], "accepted, closest first: sigma"),
        (["--sde", "sigma", "--solver", "heun"], "--solver is of the ODE"),
        (["--nfe", "0"], "--nfe is 0; expected at least 1"),
        (["--count", "0"], "--count is 0"),
        (["--size", "15x16"], "multiples of 4"),
        (["--size", "big"], "expected whole numbers such as 16x16"),
        (["--out", "x.jpg"], "does not end in .png"),
        (["--out", "/proc/x/y.png"], "cannot write to /proc/x"),
        (["--device", "tpu"], "accepted: auto, cpu, cuda, mps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_request_is_one_line_that_helps(
    nextdit: Run, trained: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    line = _error(nextdit("sample", str(trained), "a handwritten one", *arguments))
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_version_or_cut_short_is_refused(
    nextdit: Run, trained: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "model"
    newest = max((trained / "checkpoints").iterdir())
    shutil.copytree(newest, copy)
    weights = copy / "backbone" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    line = _error(nextdit("sample", str(copy), "a handwritten one"))
    assert "truncated: backbone/model.safetensors" in line

    card = newest / "nextdit.json"
    shutil.copytree(newest, copy, dirs_exist_ok=True)
    (copy / "nextdit.json").write_text(
        card.read_text().replace('"format_version": 1', '"format_version": 7')
    )
    line = _error(nextdit("sample", str(copy), "a handwritten one"))
    assert "has format version 7" in line


def test_modalities_lists_parts_with_their_distribution(nextdit: Run) -> None:
    lines = nextdit("modalities").stdout.splitlines()
    rows = [line.split() for line in lines]
    assert ["modality", "image", "modality-image", "0.1.0", "installed"] in rows
    assert ["engine", "ray", "nextdit-ray", "0.1.0", "installed"] in rows
