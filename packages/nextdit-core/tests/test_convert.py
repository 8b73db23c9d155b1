"""`nextdit convert` and `nextdit info` on checkpoints of every layout."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from nextdit_core import NextDiT, NextDiTConfig, Pipeline, Recipe, UserError, train
from nextdit_core.commands.convert import convert
from nextdit_core.commands.info import info

CASE = "fwd_masked_12x20"


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run a command to its end; an error of the user is raised."""

    def invoke(command: object, *arguments: object) -> Result:
        result = CliRunner().invoke(command, [str(one) for one in arguments])  # type: ignore[arg-type]
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return invoke


def test_a_backbone_goes_through_all_layouts_unharmed(
    golden: Path, on_latents: Callable[..., Tensor], run: Callable[..., Result], tmp_path: Path
) -> None:
    place = golden / "tiny_pipeline"
    for layout in ("authors", "nextdit", "diffusers", "nextdit", "authors", "diffusers"):
        dest = tmp_path / f"{len(list(tmp_path.iterdir()))}-{layout}"
        said = run(convert, place, dest, "--to", layout).output
        assert f"1,814,338 parameters, layout {layout}" in said
        place = dest
    case = load_file(golden / f"{CASE}.safetensors")
    out = on_latents(NextDiT.from_pretrained(place), case)
    assert (out - case["out_official"]).abs().max() <= 1e-5


@pytest.mark.parametrize("patch", [2, 4])
def test_what_diffusers_knows_beyond_sizes_survives_our_layout(
    lumina: Callable[..., Any], run: Callable[..., Result], tmp_path: Path, patch: int
) -> None:
    """From diffusers to ours and back: every weight, sample_size and patch_size, on both ways."""
    from diffusers import LuminaNextDiT2DModel

    theirs = lumina(sample_size=40, patch_size=patch, in_channels=3)
    theirs.save_pretrained(tmp_path / "theirs")
    run(convert, tmp_path / "theirs", tmp_path / "ours", "--to", "nextdit")
    assert "sample_size=40" in run(info, tmp_path / "ours").output
    ours = NextDiT.from_pretrained(tmp_path / "ours")
    assert (ours.config.patch_size, ours.config.sample_size) == (patch, 40)
    run(convert, tmp_path / "ours", tmp_path / "command", "--to", "diffusers")
    ours.save_pretrained(tmp_path / "call", layout="diffusers")
    for place in ("command", "call"):
        back = LuminaNextDiT2DModel.from_pretrained(tmp_path / place)
        assert (back.config.sample_size, back.config.patch_size) == (40, patch)
        mine, yours = theirs.state_dict(), back.state_dict()
        assert mine.keys() == yours.keys()
        for name, tensor in mine.items():
            if not name.startswith(("pad_token", "norm_out.linear_2")):
                assert torch.equal(yours[name], tensor), name
        again = NextDiT.from_pretrained(tmp_path / place)
        assert again.config == ours.config
    with pytest.raises(UserError, match=rf"patch_size is 1, and .*ours says {patch}; leave out"):
        run(convert, tmp_path / "ours", tmp_path / "x", "--to", "diffusers", "--patch-size", 1)


def test_sizes_that_nothing_tells_are_said(
    golden: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    source = golden / "tiny_official.safetensors"
    run(convert, source, tmp_path / "ours", "--to", "nextdit", "--sample-size", 64)
    assert NextDiT.from_pretrained(tmp_path / "ours").config.sample_size == 64
    args = argparse.Namespace(model="NextDiT_2B_GQA_patch2", image_size=512)
    (tmp_path / "theirs").mkdir()
    torch.save(args, tmp_path / "theirs" / "model_args.pth")
    shutil.copy(source, tmp_path / "theirs" / "consolidated.00-of-01.safetensors")
    assert NextDiT.from_pretrained(tmp_path / "theirs").config.sample_size == 64
    plain = NextDiT.from_pretrained(source)
    assert plain.config.sample_size is None
    plain.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    assert json.loads((tmp_path / "diffusers" / "config.json").read_text())["sample_size"] == 128


def test_convert_and_info_are_told_what_no_tensor_tells(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    """A class-conditional mixture of experts, in both directions."""
    sizes = {"token_dim": 16, "width": 32, "layers": 1, "heads": 4, "multiple_of": 16}
    model = NextDiT(
        NextDiTConfig(**sizes, classes=5, final_shift=True, space_experts=4)  # type: ignore[arg-type]
    )
    model.save_pretrained(tmp_path / "theirs", layout="authors")
    with pytest.raises(UserError, match=r"give heads \(--heads on the command line\)"):
        run(info, tmp_path / "theirs")
    with pytest.raises(UserError, match="--experts-by on the command line"):
        run(convert, tmp_path / "theirs", tmp_path / "x", "--to", "nextdit", "--heads", 4)
    with pytest.raises(UserError, match="3 heads do not fit width 32"):
        run(info, tmp_path / "theirs", "--heads", 3)
    told = ("--heads", 4, "--experts-by", "space")
    said = run(info, tmp_path / "theirs", *told).output
    assert "the class-conditional mixture of experts of Next-DiT-MoE" in said
    assert "space_experts=4" in said
    said = run(convert, tmp_path / "theirs", tmp_path / "ours", "--to", "nextdit", *told).output
    assert "the class-conditional mixture of experts of Next-DiT-MoE" in said
    said = run(convert, tmp_path / "ours", tmp_path / "again", "--to", "authors").output
    assert "zeros    the second half of the output" in said
    one, two = (
        load_file(tmp_path / name / "consolidated.00-of-01.safetensors")
        for name in ("theirs", "again")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(UserError, match=r"heads is 8, and .*ours says 4; leave out heads"):
        run(convert, tmp_path / "ours", tmp_path / "x", "--to", "authors", "--heads", 8)
    with pytest.raises(UserError, match="feed-forward layers are experts"):
        run(convert, tmp_path / "ours", tmp_path / "x", "--to", "diffusers")


def test_heads_that_contradict_a_gate_are_refused(golden: Path) -> None:
    with pytest.raises(UserError, match="heads is 2, and the gate of the text attention has"):
        NextDiT.from_pretrained(golden / "tiny_official.safetensors", heads=2)


def test_a_converted_transformer_serves_the_pipeline_of_diffusers(
    golden: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    """Every latent of a sampling run equals the recorded ones, extrapolation included."""
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline

    run(convert, golden / "tiny_pipeline", tmp_path / "out", "--to", "diffusers")
    transformer = LuminaNextDiT2DModel.from_pretrained(tmp_path / "out")
    pipe = LuminaPipeline.from_pretrained(golden / "tiny_pipeline", transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    for name, side, options in (
        ("pipe_square_128", 128, {}),
        ("pipe_extrap_192x192_ws0.3", 192, {"scaling_watershed": 0.3}),
    ):
        case = load_file(golden / f"{name}.safetensors")
        out = pipe(
            prompt_embeds=case["prompt_embeds"],
            prompt_attention_mask=case["prompt_mask"],
            negative_prompt_embeds=case["negative_prompt_embeds"],
            negative_prompt_attention_mask=case["negative_mask"],
            height=side,
            width=side,
            num_inference_steps=len(case["timesteps"]),
            guidance_scale=4.0,
            latents=case["noise"],
            output_type="latent",
            clean_caption=False,
            **options,
        ).images
        assert (out - case["latents"]).abs().max() <= 1e-5


def test_convert_changes_the_number_format_and_cuts_shards(
    golden: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("--layout", "nextdit", "--dtype", "bfloat16", "--max-shard-size", "1MB")
    run(convert, golden / "tiny_official.safetensors", tmp_path / "out", *options)
    model = NextDiT.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4


def test_convert_says_what_it_leaves_out(
    golden: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    said = run(convert, golden / "tiny_pipeline", tmp_path / "out", "--to", "nextdit").output
    assert "Lumina-Next in diffusers' layout" in said
    assert "left out pad_token (192 numbers)" in said
    assert "second half of final_layer.linear (3,088 numbers)" in said


def test_convert_refuses_before_it_reads(
    golden: Path, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("nextdit_core.checkpoints.load.read_backbone", read)
    source = golden / "tiny_pipeline"
    for arguments, message in (
        ((source, tmp_path, "--to", "authors"), "exists already"),
        ((source, tmp_path / "x", "--to", "authors", "--max-shard-size", "2 cm"), "'2 cm' is not"),
        ((source, tmp_path / "x", "--to", "authors", "--ema"), "no file of averaged weights"),
        ((tmp_path / "none", tmp_path / "x", "--to", "authors"), "there is no file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(convert, *arguments)


def test_info_describes_a_checkpoint_of_others(
    golden: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    said = run(info, golden / "tiny_pipeline").output
    assert "1,929,362 parameters in 93 tensors, float32, 7 MiB" in said
    assert "width=192" in said
    model = NextDiT.from_pretrained(golden / "tiny_pipeline")
    model.save_pretrained(tmp_path / "authors", layout="authors")
    args = argparse.Namespace(model="NextDiT_2B_GQA_patch2", image_size=1024)
    torch.save(args, tmp_path / "authors" / "model_args.pth")
    said = run(info, tmp_path / "authors").output
    assert "Lumina-Next in the authors' layout" in said
    assert "model='NextDiT_2B_GQA_patch2', image_size=1024" in said


def test_info_and_pipeline_take_saved_models(
    recipe: Callable[..., Recipe], run: Callable[..., Result], golden: Path, tmp_path: Path
) -> None:
    checkpoint = train(recipe(steps=1))
    assert "training steps    1" in run(info, checkpoint).output
    assert "a Next-DiT backbone of nextdit-core" in run(info, checkpoint / "backbone").output
    run(convert, checkpoint, tmp_path / "alone", "--to", "nextdit")
    assert "a Next-DiT backbone of nextdit-core" in run(info, tmp_path / "alone").output
    for place in (tmp_path / "alone", golden / "tiny_pipeline" / "transformer"):
        with pytest.raises(UserError, match=r"loaded by NextDiT\.from_pretrained"):
            Pipeline.from_pretrained(place)


def test_a_pipeline_of_the_hub_is_found_by_its_id(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as huggingface_hub's cache is after a download."""
    constants = pytest.importorskip("huggingface_hub.constants")
    checkpoint = train(recipe(steps=1))
    expected = Pipeline.from_pretrained(checkpoint, device="cpu")("up", seed=1)
    home = tmp_path / "cache" / "models--someone--dots"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    checkpoint.rename(home / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipe = Pipeline.from_pretrained("someone/dots", device="cpu")
    assert torch.equal(pipe("up", seed=1)[0], expected[0])
