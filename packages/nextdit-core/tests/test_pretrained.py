"""Our own folders: sharded, streamed, versioned; and the hub."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextdit_core import NextDiT, NextDiTConfig, Pipeline, Recipe, UserError, train
from nextdit_core.checkpoints.shards import parse_size


@pytest.fixture
def backbone(random: torch.Generator) -> NextDiT:
    config = NextDiTConfig.named("tiny", token_dim=4, text_dim=8, axes=3)
    model = NextDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model


def _same(one: NextDiT, other: NextDiT) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return one.config == other.config and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("size", ["5GB", "300KB", 1])
def test_a_backbone_comes_back_as_it_was(
    size: str | int, backbone: NextDiT, tmp_path: Path
) -> None:
    backbone.save_pretrained(tmp_path / "out", max_shard_size=size)
    back = NextDiT.from_pretrained(tmp_path / "out")
    assert _same(back, backbone)
    assert not back.training
    assert all(parameter.requires_grad for parameter in back.parameters())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {"5GB": 1, 1: len(backbone.state_dict())}.get(size, len(files))
    if size == "300KB":
        assert len(files) > 2
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in backbone.parameters())
        for file in files:
            held = load_file(file)
            assert {n for n, home in index["weight_map"].items() if home == file.name} == set(held)
            assert sum(t.nbytes for t in held.values()) <= 300_000 or len(held) == 1


def test_the_dtype_and_device_are_those_asked_for(backbone: NextDiT, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "out")
    half = NextDiT.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert all(
        torch.equal(p, q.bfloat16())
        for p, q in zip(half.parameters(), backbone.parameters(), strict=True)
    )
    half.save_pretrained(tmp_path / "half")
    assert NextDiT.from_pretrained(tmp_path / "half").final_layer.linear.bias.dtype is (
        torch.bfloat16
    )
    nowhere = NextDiT.from_pretrained(tmp_path / "out", device="meta")
    assert all(parameter.is_meta for parameter in nowhere.parameters())


def test_weights_that_are_not_finite_are_refused(backbone: NextDiT, tmp_path: Path) -> None:
    with torch.no_grad():
        backbone.layers[1].feed_forward.w2.weight[3, 3] = 1e6  # type: ignore[union-attr, operator]
    backbone.save_pretrained(tmp_path / "out")
    assert _same(NextDiT.from_pretrained(tmp_path / "out"), backbone)
    with pytest.raises(UserError, match=r"layers\.1\.feed_forward\.w2\.weight .*in torch\.float16"):
        NextDiT.from_pretrained(tmp_path / "out", dtype=torch.float16)


def test_a_newer_format_is_refused_by_name(backbone: NextDiT, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "complete.json").unlink()
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("format_version") == 2
    for name in (
        *("time_experts", "space_experts", "experts_per_token"),
        *("patch_size", "sample_size"),
    ):
        del values[name]
    for older in ({}, {"format_version": 1}):
        file.write_text(json.dumps(values | older))
        back = NextDiT.from_pretrained(tmp_path / "out")
        assert _same(back, backbone)
        assert back.config == backbone.config
    for other in (3, "2", 0):
        file.write_text(json.dumps(values | {"format_version": other}))
        with pytest.raises(
            UserError, match=rf"format version {other!r}; nextdit-core .* reads versions 1 to 2"
        ):
            NextDiT.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", "96", "model.width is '96'; expected int"),
        ("layers", 10**12, "says layers 1000000000000, and the weights have 3"),
        ("multiple_of", 10**9, "says feed-forward width 1000000000"),
        ("norm_eps", float("nan"), "model.norm_eps is nan; expected float"),
        ("heads", None, "model.heads is None; expected int"),
        ("depth", 3, "unknown backbone config key 'depth'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    key: str, value: Any, message: str, backbone: NextDiT, tmp_path: Path
) -> None:
    backbone.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "complete.json").unlink()
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        NextDiT.from_pretrained(tmp_path / "out")


def test_an_index_that_leads_elsewhere_is_refused(backbone: NextDiT, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    (tmp_path / "out" / "complete.json").unlink()
    file = tmp_path / "out" / "model.safetensors.index.json"
    text = file.read_text()
    file.write_text(text.replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(UserError, match="is no file beside it"):
        NextDiT.from_pretrained(tmp_path / "out")
    file.write_text(text.replace("model-00001-of", "model-10001-of"))
    with pytest.raises(UserError, match=r"names model-10001-of.*which is missing"):
        NextDiT.from_pretrained(tmp_path / "out")


def test_a_place_that_is_taken_is_left_alone(backbone: NextDiT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        backbone.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["5 apples", "GB", "-1", 0, "0.1B"])
def test_sizes_that_are_none_are_refused(size: str | int) -> None:
    with pytest.raises(UserError, match="is not a number of bytes"):
        parse_size(size)


MEASURE = """
    import sys
    import torch
    from nextdit_core import NextDiT

    def megabytes(key):
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024

    NextDiT.from_pretrained(sys.argv[2])           # imports, thread pools, allocator
    begun = megabytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")                            # forget the peak so far
    model = NextDiT.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    print(weights, megabytes("VmHWM") - begun)
"""


@pytest.fixture(scope="module")
def large_and_small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Write a backbone of some hundred megabytes and a small one, in every layout."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"token_dim": 16, "text_dim": 512, "heads": 16}
    models = {
        "large": NextDiT(NextDiTConfig(width=1024, layers=5, **sizes)),
        "small": NextDiT(NextDiTConfig(width=64, layers=1, **sizes)),
    }
    folder = tmp_path_factory.mktemp("layouts")
    for name, model in models.items():
        for layout in ("nextdit", "diffusers", "authors"):
            place = folder / f"{name}-{layout}"
            model.save_pretrained(place, layout=layout, max_shard_size="100MB")  # type: ignore[arg-type]
        (folder / f"{name}-pth").mkdir()
        weights = load_file(place / "consolidated.00-of-01.safetensors")
        torch.save(weights, folder / f"{name}-pth" / "consolidated.00-of-01.pth")
    return {
        layout: (folder / f"large-{layout}", folder / f"small-{layout}")
        for layout in ("nextdit", "diffusers", "authors", "pth")
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("nextdit", "float32"),
        ("pth", "float32"),
        pytest.param("nextdit", "bfloat16", marks=pytest.mark.slow),
        pytest.param("diffusers", "float32", marks=pytest.mark.slow),
        pytest.param("authors", "float32", marks=pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_memory_than_the_weights(
    layout: str, dtype: str, large_and_small: dict[str, tuple[Path, Path]]
) -> None:
    places = large_and_small[layout]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), *places, dtype],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    weights, peak = map(float, run.stdout.split())
    print(f"\n{layout} as {dtype}: weights {weights:.0f} MiB, peak {peak:.0f} MiB above the start")
    assert weights > 150
    assert peak <= 1.15 * weights


# Saved models and runs


def test_a_run_and_a_saved_model_hold_a_backbone(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    checkpoint = train(recipe(steps=1))
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu")
    for place in (checkpoint, checkpoint.parents[1], checkpoint / "backbone"):
        assert _same(NextDiT.from_pretrained(place), pipe.model.backbone)


def test_a_model_with_its_backbone_in_shards_loads_and_resumes(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextdit_core.checkpoints import save

    whole = train(recipe(steps=1))
    expected = Pipeline.from_pretrained(whole, device="cpu").model.backbone
    monkeypatch.setattr(save.write_backbone, "__kwdefaults__", {"max_shard_size": "10KB"})
    again = train(recipe(out=str(whole.parents[2] / "sharded"), steps=1))
    assert len(list((again / "backbone").glob("*.safetensors"))) > 1
    assert _same(Pipeline.from_pretrained(again, device="cpu").model.backbone, expected)
    longer = train(recipe(out=str(whole.parents[2] / "sharded"), steps=2))
    straight = train(recipe(out=str(whole.parents[2] / "straight"), steps=2))
    one, two = (
        Pipeline.from_pretrained(path, device="cpu").model.backbone for path in (longer, straight)
    )
    assert _same(one, two)


def test_a_folder_written_before_the_version_loads(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    checkpoint = train(recipe(steps=1))
    expected = Pipeline.from_pretrained(checkpoint, device="cpu").model.backbone
    file = checkpoint / "backbone" / "config.json"
    values = json.loads(file.read_text())
    del values["format_version"]
    file.write_text(json.dumps(values))
    marker = checkpoint / "complete.json"
    sizes = json.loads(marker.read_text())
    sizes["files"]["backbone/config.json"] = file.stat().st_size
    marker.write_text(json.dumps(sizes))
    assert _same(Pipeline.from_pretrained(checkpoint, device="cpu").model.backbone, expected)


# The hub


def _cached(cache: Path, repository: str, folder: Path) -> None:
    """Lay a folder out as huggingface_hub's own cache does after a download."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    folder.rename(home / "snapshots" / commit)


def test_a_downloaded_repository_is_found_by_its_id(backbone: NextDiT, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    backbone.save_pretrained(tmp_path / "out")
    _cached(tmp_path / "cache", "someone/a-model", tmp_path / "out")
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert _same(NextDiT.from_pretrained("someone/a-model", **options), backbone)
    with pytest.raises(UserError, match="no folder someone/else here, and no such model came"):
        NextDiT.from_pretrained("someone/else", **options)


def test_a_folder_here_wins_over_a_repository(
    backbone: NextDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    backbone.save_pretrained("someone/a-model")
    assert _same(NextDiT.from_pretrained("someone/a-model"), backbone)


@pytest.mark.parametrize("call", ["load", "push"])
def test_without_huggingface_hub_the_extra_is_named(
    call: str, backbone: NextDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'nextdit-core\[hub\]'"):
        if call == "load":
            NextDiT.from_pretrained("someone/a-model")
        else:
            backbone.push_to_hub("someone/a-model")


def test_a_push_uploads_what_save_pretrained_writes(
    backbone: NextDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is faked at huggingface_hub's two calls; their real signatures check ours."""
    hub = pytest.importorskip("huggingface_hub")
    real = {
        name: inspect.signature(getattr(hub.HfApi, name))
        for name in ("create_repo", "upload_folder")
    }
    made: dict[str, Any] = {}

    def create_repo(self: Any, *args: Any, **kwargs: Any) -> Any:
        made["create"] = real["create_repo"].bind(self, *args, **kwargs).arguments
        return hub.RepoUrl("https://huggingface.co/someone/a-model")

    def upload_folder(self: Any, *args: Any, **kwargs: Any) -> str:
        made["upload"] = real["upload_folder"].bind(self, *args, **kwargs).arguments
        Path(kwargs["folder_path"]).rename(tmp_path / "uploaded")
        return "https://huggingface.co/someone/a-model/commit/1"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    said = backbone.push_to_hub("a-model", private=True, branch="next", max_shard_size="300KB")
    assert said.endswith("/commit/1")
    assert (made["create"]["repo_id"], made["create"]["private"]) == ("a-model", True)
    assert (made["upload"]["repo_id"], made["upload"]["revision"]) == ("someone/a-model", "next")
    assert _same(NextDiT.from_pretrained(tmp_path / "uploaded"), backbone)
    assert len(list((tmp_path / "uploaded").glob("model-*.safetensors"))) > 2


def test_two_files_with_one_tensor_are_refused(backbone: NextDiT, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    (tmp_path / "out" / "complete.json").unlink()
    first, second, *_ = sorted((tmp_path / "out").glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(UserError, match=r"is in .* and in .*; remove one file"):
        NextDiT.from_pretrained(tmp_path / "out")
