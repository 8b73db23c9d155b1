"""Lumina-Next as diffusers and its authors save it, sampled by our pipeline.

The reference is diffusers' `LuminaPipeline` with the same weights, noise and time grid. What is
chosen so that the two agree: prompts in lower case (diffusers lower-cases them), one scale for both
axes (`by="area"`), no size below the trained one (which diffusers interpolates the wrong way).
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch import Tensor, nn

import flowsolvers
from nextdit_core import (
    Conditioning,
    ContextDrop,
    Extrapolation,
    Guidance,
    NextDiT,
    Pipeline,
    Recipe,
    Step,
    Tokens,
    UserError,
    train,
)
from nextdit_core.commands.info import info
from nextdit_core.flow_model import FlowModel

PROMPTS = ["a red fox", "an axe, and a bird"]
NEGATIVE = "a grey day"
STEPS = 5


@pytest.fixture
def pipe(lumina_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(lumina_folder, device="cpu")


def _noise(size: tuple[int, int], count: int = len(PROMPTS)) -> Tensor:
    random = torch.Generator().manual_seed(sum(size))
    return torch.randn(count, 4, size[0] // 8, size[1] // 8, generator=random)


def _theirs(reference: Any, size: tuple[int, int], grid: list[float], **options: Any) -> Tensor:
    """Give diffusers' pictures, `[batch, 3, height, width]` in [0, 1]."""
    return reference(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        height=size[0],
        width=size[1],
        sigmas=[1.0 - t for t in grid[:-1]],
        latents=_noise(size),
        output_type="pt",
        clean_caption=False,
        **{"num_inference_steps": STEPS, **options},
    ).images


def _ours(pipe: Pipeline, size: tuple[int, int], grid: list[float], **options: Any) -> Tensor:
    found = pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        latents=list(_noise(size)),
        nfe=len(grid) - 1,
        solver="euler",
        schedule=flowsolvers.from_times(grid),
        output="tensor",
        **options,
    )
    return (torch.stack(found) + 1.0) / 2.0


GRIDS = {
    "shift 4": list(flowsolvers.shift(4.0).grid(STEPS)),
    "diffusers' own": [*(1.0 - np.linspace(1.0, 0.001, STEPS)).tolist(), 1.0],
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0, 7.5])
@pytest.mark.parametrize("size", [(64, 64), (32, 128), (128, 32)], ids=str)
def test_pictures_are_those_of_diffusers(
    lumina_pipeline: Any, pipe: Pipeline, size: tuple[int, int], guidance: float, grid: str
) -> None:
    """At the trained number of pixels, whatever the aspect."""
    times = GRIDS[grid]
    expected = _theirs(lumina_pipeline, size, times, guidance_scale=guidance)
    found = _ours(pipe, size, times, guidance=guidance)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("watershed", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("size", [(128, 128), (80, 96), (192, 64)], ids=str)
def test_extrapolated_pictures_are_those_of_diffusers(
    lumina_pipeline: Any,
    pipe: Pipeline,
    size: tuple[int, int],
    proportional: bool,
    watershed: float,
) -> None:
    """With its one scale for both axes; 0 is NTK throughout, and 1, its default, interpolation."""
    times = GRIDS["shift 4"]
    expected = _theirs(
        lumina_pipeline,
        size,
        times,
        scaling_watershed=watershed,
        proportional_attn=proportional,
    )
    beyond = Extrapolation(
        "time-aware-watershed", by="area", watershed=watershed, proportional=proportional
    )
    found = _ours(pipe, size, times, extrapolate=beyond)
    assert (found - expected).abs().max() <= 1e-4
    as_is = _ours(pipe, size, times)
    assert (as_is - expected).abs().max() > 1e-3  # so the setting is seen to matter


def test_recorded_pictures_of_diffusers(golden: Path) -> None:
    """Those that were recorded together with every latent on the way."""
    pipe = Pipeline.from_pretrained(golden / "tiny_pipeline", device="cpu")
    prompt = "a painting of a squirrel eating a burger"
    for name, beyond in (
        ("pipe_square_128", None),
        ("pipe_extrap_192x192_ws0.3", Extrapolation("time-aware-watershed", by="area")),
    ):
        case = load_file(golden / f"{name}.safetensors")
        times = (1.0 - case["sigmas"].double()).tolist()
        states: list[Tensor] = []
        options: dict[str, Any] = {
            "latents": [case["noise"][0]],
            "nfe": len(times) - 1,
            "solver": "euler",
            "schedule": flowsolvers.from_times(times),
            "extrapolate": beyond,
        }
        note = states.extend
        pipe(prompt, on_step=lambda step, note=note: note(step.latents()), **options)
        assert len(states) == len(case["steps"])
        for state, expected in zip(states, case["steps"], strict=True):
            assert (state - expected[0]).abs().max() <= 1e-5 * expected.abs().max()
        (pixels,) = pipe(prompt, output="tensor", **options)
        found = (pixels.permute(1, 2, 0) + 1.0) / 2.0
        assert (found - case["image"][0]).abs().max() <= 1e-5
        (picture,) = pipe(prompt, **options)
        assert isinstance(picture, Pillow.Image)
        levels = np.asarray(picture, dtype=np.float32) - 255.0 * case["image"][0].numpy()
        assert np.abs(levels).max() <= 0.5 + 1e-2


class _Recorded(nn.Module):
    """Stands in for a text encoder: gives recorded features, whose padding was in front."""

    def __init__(self, text: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.rows = [row[real.bool()] for row, real in zip(text, mask, strict=True)]

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        assert prompts == ["asked for", "away from"]
        return Conditioning.of(self.rows)


@pytest.mark.parametrize("shift", ["None", "1.0", "4.0"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("euler", "euler"), ("midpoint", "midpoint"), ("heun3", "heun3"), ("rk4", "rk38")],
)
def test_trajectories_are_those_of_the_authors_sampler(
    golden: Path, theirs: str, ours: str, shift: str
) -> None:
    """Recorded from their code: guidance 4 on three channels, every state on the way."""
    case = load_file(golden / "sampler_official.safetensors")
    expected = case[f"{theirs}_n5_shift{shift}"][:, 0]
    found = Pipeline.from_pretrained(golden / "tiny_pipeline", device="cpu")
    encoder = _Recorded(case["cap_feats"], case["cap_mask"])
    pipe = replace(found, model=FlowModel(found.model.backbone, encoder))
    stages = getattr(flowsolvers.method(ours), "stages", 1)
    states: list[Tensor] = []
    pipe(
        "asked for",
        negative_prompt="away from",
        latents=[case["noise"][0]],
        nfe=4 * stages,
        solver=ours,
        schedule="uniform" if shift == "None" else f"shift:{shift}",
        guidance=4.0,
        on_step=lambda step: states.extend(step.latents()),
        output="latent",
    )
    assert len(states) == len(expected) - 1
    for state, reference in zip(states, expected[1:], strict=True):
        assert (state - reference).abs().max() <= 1e-5 * max(1.0, reference.abs().max())


def test_below_the_trained_size_nothing_is_extrapolated(
    lumina_pipeline: Any, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers doubles frequencies at half the size; with its scale held at 1, as the authors'."""
    from diffusers.pipelines.lumina import pipeline_lumina

    size, times = (32, 32), GRIDS["shift 4"]
    beyond = Extrapolation("time-aware-watershed", by="area")
    found = _ours(pipe, size, times, extrapolate=beyond)
    usual = _theirs(lumina_pipeline, size, times, proportional_attn=False)
    table = pipeline_lumina.get_2d_rotary_pos_embed_lumina
    monkeypatch.setattr(
        pipeline_lumina, "get_2d_rotary_pos_embed_lumina", lambda *sides, **_: table(*sides)
    )
    held = _theirs(lumina_pipeline, size, times, proportional_attn=False)
    assert (found - held).abs().max() <= 1e-4
    assert (usual - held).abs().max() > 1e-3


def test_the_pipeline_takes_its_defaults_from_the_folder(
    lumina_folder: Path, pipe: Pipeline
) -> None:
    assert pipe.modality.default_size == (64, 64)
    assert pipe.guidance() == Guidance(4.0, channels=(0, 1, 2))
    (usual,) = pipe(PROMPTS[0], nfe=4, seed=3, output="latent")
    asked = {"size": (64, 64), "guidance": pipe.guidance(4.0), "schedule": "auto"}
    (same,) = pipe(PROMPTS[0], nfe=4, seed=3, solver="auto", output="latent", **asked)
    assert torch.equal(usual, same)
    (all_guided,) = pipe(PROMPTS[0], nfe=4, seed=3, guidance=Guidance(4.0), output="latent")
    assert (all_guided - usual).abs().max() > 1e-2
    file = lumina_folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 6.0}))
    assert Pipeline.from_pretrained(lumina_folder).card.sampling["schedule"] == "shift:6"


def test_pictures_of_several_sizes_are_those_alone(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"nfe": 4, "output": "tensor"}
    sizes = [(64, 64), (32, 96), (80, 48)]
    prompts = [*PROMPTS, ""]
    together = pipe(prompts, size=sizes, seed=[5, 6, 7], **options)
    for i, found in enumerate(together):
        (alone,) = pipe(prompts[i], size=sizes[i], seed=[5 + i], **options)
        assert found.shape == (3, *sizes[i])
        assert (found - alone).abs().max() <= 1e-4


def test_steps_can_be_looked_at_replaced_and_stopped(pipe: Pipeline) -> None:
    """A preview is the decoded x + (1 - t) v; here v is read off Euler's own next step."""
    grid = list(flowsolvers.shift(4.0).grid(4))
    options: dict[str, Any] = {"nfe": 4, "solver": "euler", "schedule": "shift:4", "seed": [1, 2]}
    sizes = [(64, 64), (32, 48)]
    seen: list[tuple[list[Tensor], list[Tensor], list[Any]]] = []

    def look(step: Step) -> None:
        assert step.t == pytest.approx(grid[step.step + 1])
        assert (step.steps, step.evaluations) == (4, step.step + 1)
        seen.append((step.latents(), step.data(), step.preview()))

    last = pipe(PROMPTS, size=sizes, output="latent", on_step=look, **options)
    for n, (latents, data, pictures) in enumerate(seen):
        for i in range(2):
            assert pictures[i].size == sizes[i][::-1]
            assert np.array_equal(pictures[i], pipe.modality.decode(data[i]))
            before = seen[n - 1][0][i] if n else None
            if before is not None:  # x_n = x_m + (t_n - t_m) v, and the data is x_n + (1 - t_n) v
                v = (latents[i] - before) / (grid[n + 1] - grid[n])
                expected = latents[i] + (1.0 - grid[n + 1]) * v
                assert (data[i] - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(seen[-1][0], last, strict=True))

    def stop(step: Step) -> None:
        if step.step == 1:
            step.stop()

    stopped = pipe(PROMPTS, size=sizes, output="latent", on_step=stop, **options)
    assert all(torch.equal(a, b) for a, b in zip(seen[1][0], stopped, strict=True))

    def replace_all(step: Step) -> None:
        if step.step == 3:
            step.go_on_from([one + 1.0 for one in step.latents()])

    moved = pipe(PROMPTS, size=sizes, output="latent", on_step=replace_all, **options)
    assert all((a - b - 1.0).abs().max() <= 1e-6 for a, b in zip(moved, last, strict=True))
    with pytest.raises(UserError, match=r"latents have sizes \[\(64, 64\)\]; expected"):
        pipe(PROMPTS, size=sizes, on_step=lambda step: step.go_on_from(last[:1]), **options)


def test_a_request_can_be_streamed_and_left(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"nfe": 5, "solver": "pec2", "schedule": "shift:4", "seed": [1, 2]}
    sizes = [(64, 64), (32, 48)]
    seen: list[list[Tensor]] = []
    expected = pipe(
        PROMPTS, size=sizes, output="latent", on_step=lambda s: seen.append(s.latents()), **options
    )
    steps = []
    for step in pipe.stream(PROMPTS, size=sizes, **options):
        steps.append(step.step)
        assert all(torch.equal(a, b) for a, b in zip(step.latents(), seen[step.step], strict=True))
    assert steps == list(range(len(seen)))
    assert step.t == 1.0
    assert all(torch.equal(a, b) for a, b in zip(step.data(), expected, strict=True))
    (first, second) = step.preview()
    assert first.tobytes() == pipe.modality.decode(expected[0]).tobytes()
    assert second.size == (48, 32)

    before = threading.active_count()
    calls: list[int] = []
    forward = pipe.model.backbone.forward

    def counted(*arguments: Any, **others: Any) -> Tensor:
        calls.append(1)
        return forward(*arguments, **others)

    monkeypatch.setattr(pipe.model.backbone, "forward", counted)
    for step in pipe.stream(PROMPTS, nfe=5, solver="euler"):
        if step.step == 1:
            break
    del step
    gc.collect()
    assert len(calls) == 2
    assert threading.active_count() == before
    rest = [
        step.step
        for step in pipe.stream(PROMPTS, nfe=5, solver="euler")
        if not (step.step == 2 and step.stop())
    ]
    assert rest == [0, 1, 2]
    with pytest.raises(UserError, match="accepted, closest first: euler"):
        next(pipe.stream(PROMPTS, solver="eulre"))
    with pytest.raises(UserError, match="stream takes no output"):
        pipe.stream(PROMPTS, output="latent")


def test_each_prompt_may_have_its_negative_one(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"nfe": 3, "output": "tensor"}
    negatives = [NEGATIVE, ""]
    both = pipe(PROMPTS, negative_prompt=negatives, seed=[1, 2], **options)
    for i in range(2):
        (one,) = pipe(PROMPTS[i], negative_prompt=negatives[i], seed=[i + 1], **options)
        assert (both[i] - one).abs().max() <= 1e-4
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        pipe(PROMPTS, negative_prompt=[NEGATIVE], **options)


def test_a_backbone_is_trained_on_latents(lumina_folder: Path, tmp_path: Path) -> None:
    """The autoencoder of one model serves another one's training and sampling."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for n in range(4):
        noise = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Pillow.fromarray(noise).save(pictures / f"{n}.png")
    recipe = Recipe.from_dict(
        {
            "out": str(tmp_path / "run"),
            "modality": "image",
            "modality_options": {
                "autoencoder": "kl-image",
                "autoencoder_options": {"model": str(lumina_folder)},
            },
            "dataset": "folder",
            "dataset_options": {"path": str(pictures), "height": 32, "width": 32},
            "model": {"width": 16, "layers": 1, "heads": 2},
            "text_encoder_options": {"text_dim": 16, "heads": 2},
            "steps": 2,
            "batch_tokens": 16,
            "device": "cpu",
        }
    )
    found = Pipeline.from_pretrained(train(recipe), device="cpu")
    assert found.modality.token_dim == 16
    (picture,) = found("", nfe=2, size=(48, 64))
    assert picture.size == (64, 48)


def test_a_picture_can_be_begun_from(pipe: Pipeline) -> None:
    """Image to image: late on, what comes out is nearly what went in."""
    random = np.random.default_rng(0)
    picture = Pillow.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    latent = pipe.modality.encode(picture)
    assert latent.shape == (4, 8, 12)
    away = [
        (pipe("", latents=[latent], start=start, nfe=4, output="latent")[0] - latent).abs().mean()
        for start in (0.98, 0.1)
    ]
    assert away[0] < 0.5 * away[1]


def test_threads_share_a_pipeline(pipe: Pipeline) -> None:
    """Text encoder, backbone and autoencoder, under different settings at once, as if alone."""
    requests: list[dict[str, Any]] = [
        {"seed": 1, "size": (96, 96), "extrapolate": "time-aware", "schedule": "shift:4"},
        {"seed": 2, "context_drop": ContextDrop(((0.5, 2),)), "negative_prompt": NEGATIVE},
        {"seed": 3, "guidance": Guidance(5.0, "apg", interval=(0.1, 0.7))},
        {"seed": 4, "guidance": 1.0, "size": (32, 128), "solver": "midpoint"},
    ]
    prompts = [*PROMPTS, "", "zebra"]

    def draw(place: int) -> Tensor:
        (found,) = pipe(prompts[place], nfe=4, output="tensor", **requests[place])
        return found

    alone = [draw(place) for place in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw, [0, 1, 2, 3] * 3))
    for one, expected in zip(found, alone * 3, strict=True):
        assert torch.equal(one, expected)


def test_half_precision_leaves_the_autoencoder_in_float32(lumina_folder: Path) -> None:
    half = Pipeline.from_pretrained(lumina_folder, device="cpu", dtype=torch.bfloat16)
    full = Pipeline.from_pretrained(lumina_folder, device="cpu")
    assert {one.dtype for one in half.model.backbone.parameters()} == {torch.bfloat16}
    assert half.model.text_encoder.dtype == "bfloat16"
    latent = _noise((64, 64), 1)[0]
    assert torch.equal(half.modality.decode_tensor(latent), full.modality.decode_tensor(latent))
    found, expected = (p(PROMPTS[0], nfe=4, output="tensor")[0] for p in (half, full))
    assert 0.0 < (found - expected).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("layout", ["authors", "nextdit", "diffusers"])
def test_a_backbone_alone_is_told_its_other_parts(
    lumina_folder: Path, pipe: Pipeline, tmp_path: Path, layout: Any
) -> None:
    alone = tmp_path / layout
    NextDiT.from_pretrained(lumina_folder).save_pretrained(alone, layout=layout)
    with pytest.raises(UserError, match=r"text_encoder='google/gemma-2b', autoencoder='stab"):
        Pipeline.from_pretrained(alone)
    with pytest.raises(UserError, match=r"such as autoencoder='stabilityai/sdxl-vae'$"):
        Pipeline.from_pretrained(alone, text_encoder=lumina_folder)
    found = Pipeline.from_pretrained(
        alone,
        text_encoder=lumina_folder / "text_encoder",  # whose tokenizer is beside it
        autoencoder=lumina_folder / "vae",
        device=torch.device("cpu"),
    )
    options: dict[str, Any] = {"size": (64, 64), "nfe": 4, "output": "tensor", "seed": 1}
    options |= {"solver": "euler", "schedule": "shift:4"}
    assert torch.equal(found(PROMPTS[0], **options)[0], pipe(PROMPTS[0], **options)[0])
    assert found.card.sampling["schedule"] == "shift:4"  # the authors' own
    _sixteen_channels(lumina_folder)
    with pytest.raises(UserError, match=r"4 channels in patches of 2x2, .* of 16 channels"):
        Pipeline.from_pretrained(alone, text_encoder=lumina_folder, autoencoder=lumina_folder)


def test_a_single_file_of_the_authors_is_a_backbone(
    lumina_folder: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    NextDiT.from_pretrained(lumina_folder).save_pretrained(tmp_path / "alone", layout="authors")
    (file,) = (tmp_path / "alone").glob("consolidated*")
    parts = {"text_encoder": lumina_folder, "autoencoder": lumina_folder}
    found = Pipeline.from_pretrained(file, device="cpu", **parts)
    options: dict[str, Any] = {"size": (64, 64), "nfe": 3, "schedule": "uniform"}
    assert found("", **options)[0].tobytes() == pipe("", **options)[0].tobytes()


def test_what_was_put_together_is_saved_as_one(
    lumina_folder: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved", device="cpu")
    options: dict[str, Any] = {"nfe": 3, "output": "tensor"}
    assert torch.equal(again(PROMPTS[0], **options)[0], pipe(PROMPTS[0], **options)[0])
    assert again.guidance() == pipe.guidance() == Guidance(4.0, channels=(0, 1, 2))
    assert again.card.step is None
    with pytest.raises(UserError, match="exists already"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="leave out text_encoder"):
        Pipeline.from_pretrained(tmp_path / "saved", text_encoder=lumina_folder)


def test_the_released_name_of_the_pipeline_is_read(lumina_folder: Path, pipe: Pipeline) -> None:
    """diffusers has dropped that name, which the released folder still has."""
    _edit(lumina_folder / "model_index.json", _class_name="LuminaText2ImgPipeline")
    found = Pipeline.from_pretrained(lumina_folder, device="cpu")
    assert torch.equal(found("", nfe=2, output="tensor")[0], pipe("", nfe=2, output="tensor")[0])


def _edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "-"}))


def _without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def _with(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / file, **changes)


def _cut(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def _sixteen_channels(folder: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.rmtree(folder / "vae")
    AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=16
    ).save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without("vae"), "lacks the folder vae; copy the whole pipeline, or give autoencoder="),
        (_without("tokenizer"), "lacks the folder tokenizer; .* give text_encoder="),
        (_without("transformer"), "lacks the folder transformer; copy the whole pipeline$"),
        (_without("scheduler"), "lacks the folder scheduler"),
        (
            _with("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
            "is of a DDIMScheduler; expected FlowMatchEulerDiscreteScheduler",
        ),
        (
            _with("scheduler/scheduler_config.json", use_dynamic_shifting=True),
            "sets use_dynamic_shifting to True",
        ),
        (_with("scheduler/scheduler_config.json", shift=0), "sets shift to 0"),
        (_with("model_index.json", _class_name="Lumina2Pipeline"), "is a Lumina-2 .*Lumina2Pipeli"),
        (_with("model_index.json", _class_name="FluxPipeline"), "class FluxPipeline; expected"),
        (
            _with("model_index.json", transformer=["diffusers", "Lumina2Transformer2DModel"]),
            "its transformer is a Lumina2Transformer2DModel; expected LuminaNextDiT2DModel",
        ),
        (_with("vae/config.json", _class_name="AutoencoderDC"), "is a AutoencoderDC; expected"),
        (_with("vae/config.json", block_out_channels="-"), "was changed or is damaged"),
        (_with("vae/config.json", scaling_factor=0.0), "the scale of a latent is"),
        (_with("text_encoder/config.json", hidden_size=40), "features of width 40, .* takes 32"),
        (_sixteen_channels, "4 channels in patches of 2x2, and .* latents of 16 channels"),
        (_cut, "cannot read the autoencoder"),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_work_is_refused_before_its_weights_are_read(
    lumina_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    message: str,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the backbone was read")

    monkeypatch.setattr("nextdit_core.lumina_pipeline.read_backbone", read)
    harm(lumina_folder)
    with pytest.raises(UserError, match=message):
        Pipeline.from_pretrained(lumina_folder, device="cpu")


def test_parts_can_be_replaced(lumina_folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """An autoencoder that was fixed, or a text encoder that is on another disk."""
    options: dict[str, Any] = {"nfe": 3, "output": "tensor"}
    expected = pipe(PROMPTS[0], **options)[0]
    moved = tmp_path / "moved"
    shutil.copytree(lumina_folder, moved)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(moved / part)
    found = Pipeline.from_pretrained(
        moved, text_encoder=lumina_folder, autoencoder=lumina_folder, device="cpu"
    )
    assert torch.equal(found(PROMPTS[0], **options)[0], expected)


def test_a_pipeline_of_the_hub_is_downloaded_as_far_as_it_is_read(
    lumina_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against a stand-in for the hub that copies what the patterns ask for."""
    from fnmatch import fnmatch

    import huggingface_hub

    (lumina_folder / "transformer" / "extra.bin").write_text("not read")
    (lumina_folder / "picture.png").write_text("not read")

    def snapshot(repo: str, allow_patterns: list[str] | None = None, **_: Any) -> str:
        assert repo == "someone/lumina"
        for file in lumina_folder.rglob("*"):
            name = file.relative_to(lumina_folder)
            wanted = any(fnmatch(name.as_posix(), one) for one in allow_patterns or ["*"])
            if file.is_file() and wanted:
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = Pipeline.from_pretrained("someone/lumina", device="cpu")
    expected = Pipeline.from_pretrained(lumina_folder, device="cpu")
    options: dict[str, Any] = {"nfe": 3, "output": "tensor"}
    assert torch.equal(found("axe", **options)[0], expected("axe", **options)[0])
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert not list((tmp_path / "cache").rglob("*.png"))

    # What will be refused is not downloaded: another pipeline, or a backbone without its parts.
    shutil.rmtree(tmp_path / "cache")
    _edit(lumina_folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(UserError, match="is a pipeline of class FluxPipeline"):
        Pipeline.from_pretrained("someone/lumina")
    assert [file.name for file in (tmp_path / "cache").rglob("*")] == ["model_index.json"]
    shutil.rmtree(tmp_path / "cache")
    (lumina_folder / "model_index.json").unlink()
    with pytest.raises(UserError, match="is no saved nextdit model and no diffusers pipeline"):
        Pipeline.from_pretrained("someone/lumina", autoencoder="stabilityai/sdxl-vae")
    assert not (tmp_path / "cache").exists()


def test_the_command_line_samples_and_describes_a_pipeline(
    lumina_folder: Path, nextdit: Callable[..., Any], tmp_path: Path
) -> None:
    run = nextdit("info", str(lumina_folder))
    assert run.returncode == 0, run.stderr
    for words in (
        "Lumina-Next in diffusers' layout",
        "default size      64x64",
        "FlowMatchEulerDiscreteScheduler, shift 1",
        "guidance_channels [0, 1, 2]",
        "3 channels to 4, a cell for 8x8, scale 0.7, shift 0",
        "32 wide",
    ):
        assert words in run.stdout, run.stdout
    arguments = ("sample", str(lumina_folder), "a red fox", "--seed", "7", "--nfe", "4")
    run = nextdit(*arguments, "--size", "64x96", "--device", "cpu", "--out", "fox.png")
    assert (run.returncode, run.stdout) == (0, "wrote 1 sample to fox.png\n"), run.stderr
    counts = [line for line in run.stderr.splitlines() if line.startswith("sampling: ")]
    # The first step of `auto` evaluates at both of its ends.
    assert [line.split()[1] for line in counts] == ["0/4", "2/4", "3/4", "4/4"]
    pipe = Pipeline.from_pretrained(lumina_folder, device="cpu")
    (expected,) = pipe("a red fox", seed=7, nfe=4, size=(64, 96))
    with Pillow.open(tmp_path / "fox.png") as found:
        assert found.size == (96, 64)
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_every_setting_of_the_command_line_is_that_of_the_pipeline(
    lumina_folder: Path, nextdit: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(lumina_folder, device="cpu")
    usual: dict[str, Any] = {"seed": 0, "nfe": 4, "size": (96, 96), "solver": "euler"}
    settings: list[tuple[list[str], dict[str, Any]]] = [
        (["--guidance-channels", "all"], {"guidance": Guidance(4.0)}),
        (["--guidance-channels", "1,2"], {"guidance": Guidance(4.0, channels=(1, 2))}),
        (
            ["--guidance", "3", "--guidance-rule", "apg", "--guidance-from", "0.2"],
            {"guidance": Guidance(3.0, "apg", (0.2, 1.0), channels=(0, 1, 2))},
        ),
        (
            ["--zero-until", "0.1", "--guidance-rule", "cfg-zero*", "--guidance-until", "0.6"],
            {"guidance": pipe.guidance(rule="cfg-zero*", interval=(0, 0.6), zero_until=0.1)},
        ),
        (["--guidance-rule", "renorm-clip"], {"guidance": pipe.guidance(rule="renorm-clip")}),
        (["--extrapolate", "time-aware"], {"extrapolate": "time-aware"}),
        (
            [
                *("--extrapolate", "time-aware-watershed", "--watershed", "0.6"),
                *("--extrapolate-by", "area", "--no-proportional", "--trained-size", "64x32"),
            ],
            {
                "extrapolate": Extrapolation(
                    "time-aware-watershed", (64, 32), proportional=False, by="area", watershed=0.6
                )
            },
        ),
        (["--extrapolate", "extrapolation"], {"extrapolate": "extrapolation"}),
        (["--context-drop", "0.5:2"], {"context_drop": "0.5:2"}),
        (["--negative-prompt", NEGATIVE], {"negative_prompt": NEGATIVE}),
        (["--schedule", "shift:4"], {"schedule": "shift:4"}),
        (["--solver", "midpoint"], {"solver": "midpoint"}),
        (["--dtype", "bfloat16"], {}),
    ]
    seen = {pipe("fox", **usual)[0].tobytes()}
    arguments = ("sample", str(lumina_folder), "fox", "--nfe", "4", "--size", "96x96")
    arguments += ("--solver", "euler", "--out", "x.png", "--device", "cpu")
    for words, options in settings:
        run = nextdit(*arguments, *words)
        assert run.returncode == 0, (words, run.stderr)
        if words[0] == "--dtype":
            pipe = Pipeline.from_pretrained(lumina_folder, device="cpu", dtype=torch.bfloat16)
        (expected,) = pipe("fox", **usual | options)
        with Pillow.open(tmp_path / "x.png") as found:
            assert np.array_equal(np.asarray(found), np.asarray(expected)), words
        seen.add(expected.tobytes())
    assert len(seen) == len(settings) + 1  # every setting changed the picture, each its own way


@pytest.mark.parametrize("ema", [False, True])
def test_the_command_line_samples_the_authors_folder(
    lumina_folder: Path, nextdit: Callable[..., Any], tmp_path: Path, ema: bool
) -> None:
    """Told where the other parts are; averaged weights where they are asked for."""
    alone = tmp_path / "alone"
    model = NextDiT.from_pretrained(lumina_folder)
    model.save_pretrained(alone, layout="authors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.save_pretrained(tmp_path / "averaged", layout="authors")
    (file,) = (tmp_path / "averaged").glob("consolidated*")
    shutil.copy(file, alone / file.name.replace("consolidated.", "consolidated_ema."))
    parts = {"text_encoder": str(lumina_folder), "autoencoder": str(lumina_folder)}
    run = nextdit(
        *("sample", str(alone), "a red fox", "--size", "64x64", "--nfe", "3", "--device", "cpu"),
        *("--text-encoder", parts["text_encoder"], "--autoencoder", parts["autoencoder"]),
        *["--ema"] * ema,
        *("--out", "fox.png"),
    )
    assert run.returncode == 0, run.stderr
    pipes = [
        Pipeline.from_pretrained(alone, device="cpu", ema=averaged, **parts)
        for averaged in (ema, not ema)
    ]
    expected, other = (p("a red fox", size=(64, 64), nfe=3)[0].tobytes() for p in pipes)
    with Pillow.open(tmp_path / "fox.png") as found:
        assert found.tobytes() == expected != other


def test_the_command_line_begins_from_a_picture(
    lumina_folder: Path, nextdit: Callable[..., Any], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "photo.png")
    pipe = Pipeline.from_pretrained(lumina_folder, device="cpu")
    arguments = ("sample", str(lumina_folder), "fox", "--nfe", "3", "--device", "cpu")
    arguments += ("--begin-from", "photo.png", "--out", "x.png")
    for words, size, start in (
        ((), (64, 96), 0.4),
        (("--size", "32x48", "--start", "0.7"), (32, 48), 0.7),
    ):
        run = nextdit(*arguments, *words)
        assert run.returncode == 0, run.stderr
        latent = pipe.modality.encode(pipe.modality.read(tmp_path / "photo.png", size))
        (expected,) = pipe("fox", latents=[latent], start=start, nfe=3, seed=[0])
        with Pillow.open(tmp_path / "x.png") as found:
            assert found.size == size[::-1]
            assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "0.4"], "--start needs --begin-from FILE"),
        (["--begin-from", "none.png"], "cannot read picture none.png"),
        (["--begin-from", "none.png", "--start", "0"], "--start is 0.0; expected above 0"),
        (["--guidance-channels", "0,4"], "latents have 4: expected 0 to 3"),
        (["--guidance-channels", "red"], "expected numbers such as 0,1,2, or all"),
        (["--guidance-from", "0.7", "--guidance-until", "0.2"], "interval"),
        (["--guidance-rule", "cfgzero"], "accepted, closest first: cfg-zero*"),
        (["--watershed", "0.3"], "--watershed needs --extrapolate METHOD"),
        (["--trained-size", "big", "--extrapolate", "ntk"], "--trained-size is 'big'"),
        (["--extrapolate", "nkt"], "unknown method 'nkt'"),
        (["--size", "60x64"], "both multiples of 16 (the patch size of 8 pixels a cell)"),
        (["--context-drop", "2"], "context drop '2'"),
        (["--text-encoder", "nowhere"], "nowhere"),
    ],
    ids=" ".join,
)
def test_settings_that_mean_nothing_are_one_line_that_helps(
    lumina_folder: Path, nextdit: Callable[..., Any], words: list[str], message: str
) -> None:
    run = nextdit("sample", str(lumina_folder), "fox", "--nfe", "2", "--device", "cpu", *words)
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("nextdit: error: ")]
    assert message in line


def test_what_becomes_infinite_is_said_and_not_drawn(
    lumina_folder: Path,
    nextdit: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in float16, where activations of large models overflow."""
    forward = NextDiT.forward

    def overflow(model: NextDiT, tokens: Tokens, t: Tensor, *others: Any, **options: Any) -> Tensor:
        return forward(model, tokens, t, *others, **options) / (t[0] < 0.5)

    monkeypatch.setattr(NextDiT, "forward", overflow)
    pipe = Pipeline.from_pretrained(lumina_folder, device="cpu")
    with pytest.raises(flowsolvers.NotFiniteError) as caught:
        pipe("fox", nfe=4, solver="euler", schedule="uniform")
    assert caught.value.t == pytest.approx(0.5)
    arguments = ("sample", str(lumina_folder), "fox", "--nfe", "4", "--device", "cpu")
    run = nextdit(*arguments, "--out", "fox.png")
    assert run.returncode == 2
    assert "nextdit: error: sampling in float32 came to no finite numbers" in run.stderr
    assert not (tmp_path / "fox.png").exists()


def test_a_saved_model_has_parts_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="leave out autoencoder and ema"):
        Pipeline.from_pretrained(tmp_path, autoencoder="somewhere", ema=True)


def test_info_says_why_a_folder_is_no_pipeline(lumina_folder: Path) -> None:
    from click.testing import CliRunner

    shutil.rmtree(lumina_folder / "vae")
    said = CliRunner().invoke(info, [str(lumina_folder)]).output
    assert "Lumina-Next in diffusers' layout" in said
    assert "no pipeline       " in said
    assert "lacks the folder vae" in said
