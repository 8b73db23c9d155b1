"""FlowScheduler in the pipelines of diffusers, with tiny random models made here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolvers as fs

pytest.importorskip("diffusers")

import diffusers
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from flowsolvers.adapters.diffusers import FlowScheduler

SOLVERS = ["euler", "midpoint", "pec2", "unipc2"]
FAMILIES = ["flux", "sd3", "lumina", "lumina2"]


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _random(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every weight a value, also those that start at zero; smooth in time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.05 if "time" in name else 0.15, generator=generator)
    return model.eval().requires_grad_(False)


def _vae(channels: int) -> torch.nn.Module:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=channels,
        shift_factor=0.06,
        scaling_factor=1.5,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _random(vae, seed=7)


def _flux() -> SimpleNamespace:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    parts: dict[str, Any] = {
        "transformer": _random(transformer, seed=1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True
        ),
        "vae": _vae(1),
    }
    parts |= dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    call = {
        "prompt_embeds": _noise(2, 5, 8, seed=2),
        "pooled_prompt_embeds": _noise(2, 8, seed=3),
        "height": 16,
        "width": 16,
    }
    return SimpleNamespace(
        parts=parts,
        pipe=diffusers.FluxPipeline(**parts),
        call=call,
        latents=_noise(2, 16, 4, seed=4),
        calls=1,
    )


def _sd3() -> SimpleNamespace:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,  # what its inpainting wants
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=16,
        pos_embed_max_size=16,
    )
    parts: dict[str, Any] = {
        "transformer": _random(transformer, seed=1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _vae(16),
    }
    parts |= dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in NUMBERS)
    call = {
        "prompt_embeds": _noise(2, 5, 8, seed=2),
        "negative_prompt_embeds": _noise(2, 5, 8, seed=5),
        "pooled_prompt_embeds": _noise(2, 8, seed=3),
        "negative_pooled_prompt_embeds": _noise(2, 8, seed=6),
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
    }
    return SimpleNamespace(
        parts=parts,
        pipe=diffusers.StableDiffusion3Pipeline(**parts),
        call=call,
        latents=_noise(2, 16, 8, 8, seed=4),
        calls=1,
    )


NUMBERS = ("", "_2", "_3")


def _lumina() -> SimpleNamespace:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=8,
    )
    parts = {
        "transformer": _random(transformer, seed=1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        "vae": _vae(4),
        "text_encoder": None,
        "tokenizer": None,
    }
    return SimpleNamespace(
        parts=parts,
        pipe=diffusers.LuminaPipeline(**parts),
        call=_gemma_call(),
        latents=_noise(2, 4, 4, 4, seed=4),
        calls=1,
    )


def _gemma_call() -> dict[str, Any]:
    return {
        "prompt_embeds": _noise(2, 5, 8, seed=2),
        "negative_prompt_embeds": _noise(2, 5, 8, seed=5),
        "prompt_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
    }


def _lumina2() -> SimpleNamespace:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=8,
    )
    parts = {
        "transformer": _random(transformer, seed=1),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae": _vae(4),
        "text_encoder": None,
        "tokenizer": None,
    }
    return SimpleNamespace(
        parts=parts,
        pipe=diffusers.Lumina2Pipeline(**parts),
        call=_gemma_call(),
        latents=_noise(2, 4, 4, 4, seed=4),
        calls=2,  # condition and none one after the other
    )


_FAMILIES: dict[str, Callable[[], SimpleNamespace]] = {
    "flux": _flux,
    "sd3": _sd3,
    "lumina": _lumina,
    "lumina2": _lumina2,
}


@pytest.fixture
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    found = _FAMILIES[request.param]()
    found.pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def count() -> Iterator[Callable[[torch.nn.Module], list[Tensor]]]:
    """Note the timestep of every call of a transformer."""
    handles: list[Any] = []

    def hooked(transformer: torch.nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []

        def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["timestep"])

        handles.append(transformer.register_forward_pre_hook(note, with_kwargs=True))
        return seen

    yield hooked
    for handle in handles:
        handle.remove()


def _sample(family: SimpleNamespace, pipe: Any = None, **settings: Any) -> Tensor:
    pipe = family.pipe if pipe is None else pipe
    call = family.call | {"output_type": "latent", "latents": family.latents} | settings
    call = {key: value for key, value in call.items() if value is not None}
    return pipe(**call).images


def _ours(family: SimpleNamespace, **settings: Any) -> FlowScheduler:
    return FlowScheduler.from_config(family.parts["scheduler"].config, **settings)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_every_pipeline_runs_and_spends_what_was_asked(family, solver, count) -> None:
    family.pipe.scheduler = _ours(family, solver=solver)
    seen = count(family.pipe.transformer)
    latents = _sample(family, num_inference_steps=7)
    assert latents.shape == family.latents.shape
    assert latents.isfinite().all()
    assert len(seen) == 7 * family.calls
    assert family.pipe.scheduler.plan.nfe == 7


@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_euler_gives_the_latents_of_the_pipelines_own_scheduler(family, steps) -> None:
    sigmas = None
    if "sigmas" in inspect.signature(family.pipe.__call__).parameters:
        sigmas = [1.0 - i / steps for i in range(steps)]  # SD3 and Lumina have other ones
    expected = _sample(family, num_inference_steps=steps, sigmas=sigmas)
    family.pipe.scheduler = _ours(family, solver="euler")
    assert torch.equal(_sample(family, num_inference_steps=steps, sigmas=sigmas), expected)


def _guided(cond: Tensor, uncond: Tensor, scale: float = 3.0) -> Tensor:
    return uncond + scale * (cond - uncond)


def _flux_velocity(family: SimpleNamespace) -> fs.Velocity:
    places = torch.zeros(4, 4, 3)
    places[..., 1] += torch.arange(4)[:, None]
    places[..., 2] += torch.arange(4)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return -family.pipe.transformer(
            hidden_states=x,
            timestep=(1.0 - t).expand(2),
            pooled_projections=family.call["pooled_prompt_embeds"],
            encoder_hidden_states=family.call["prompt_embeds"],
            txt_ids=torch.zeros(5, 3),
            img_ids=places.reshape(16, 3),
        ).sample

    return velocity


def _sd3_velocity(family: SimpleNamespace) -> fs.Velocity:
    def velocity(t: Tensor, x: Tensor) -> Tensor:
        cond, uncond = (
            family.pipe.transformer(
                hidden_states=x,
                timestep=1000.0 * (1.0 - t).expand(2),
                encoder_hidden_states=family.call[f"{sign}prompt_embeds"],
                pooled_projections=family.call[f"{sign}pooled_prompt_embeds"],
            ).sample
            for sign in ("", "negative_")
        )
        return -_guided(cond, uncond)

    return velocity


def _lumina_velocity(family: SimpleNamespace) -> fs.Velocity:
    rotary = get_2d_rotary_pos_embed_lumina(family.pipe.transformer.head_dim, 384, 384)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        cond, uncond = (
            family.pipe.transformer(
                hidden_states=x,
                timestep=t.expand(2),
                encoder_hidden_states=family.call[f"{sign}prompt_embeds"],
                encoder_mask=family.call[f"{sign}prompt_attention_mask"],
                image_rotary_emb=rotary,
                cross_attention_kwargs={"base_sequence_length": 4},
            ).sample[:, :4]
            for sign in ("", "negative_")
        )
        return torch.cat([_guided(cond, uncond)[:, :3], cond[:, 3:]], 1)

    return velocity


def _lumina2_velocity(family: SimpleNamespace) -> fs.Velocity:
    def velocity(t: Tensor, x: Tensor) -> Tensor:
        cond, uncond = (
            family.pipe.transformer(
                hidden_states=x,
                timestep=t.expand(2),
                encoder_hidden_states=family.call[f"{sign}prompt_embeds"],
                encoder_attention_mask=family.call[f"{sign}prompt_attention_mask"],
            ).sample
            for sign in ("", "negative_")
        )
        return fs.guidance_rule("renorm")(cond, uncond, 3.0)

    return velocity


_VELOCITIES = {
    "flux": (_flux_velocity, fs.flux_shift(16)),
    "sd3": (_sd3_velocity, fs.shift(3.0)),
    "lumina": (_lumina_velocity, fs.shift(4.0)),
    "lumina2": (_lumina2_velocity, fs.shift(6.0)),
}


@pytest.mark.parametrize("solver", ["midpoint", "pec2"])
@pytest.mark.parametrize(
    ("family", "name"), [(name, name) for name in FAMILIES], indirect=["family"]
)
def test_a_pipeline_arrives_where_solve_does_on_its_transformer(family, name, solver) -> None:
    make, shift = _VELOCITIES[name]
    expected = fs.solve(make(family), family.latents, nfe=8, solver=solver, schedule=shift).x
    family.pipe.scheduler = _ours(family, solver=solver)
    found = _sample(family, num_inference_steps=8)
    assert (expected - family.latents).abs().max() > 0.1
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("strength", [0.325, 0.65])  # midpoint begins inside a step and at one
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("task", ["img2img", "inpaint"])
@pytest.mark.parametrize("family", ["flux", "sd3"], indirect=True)
def test_images_are_changed_by_strength(family, task, solver, strength, count) -> None:
    kinds = {
        ("FluxPipeline", "img2img"): diffusers.FluxImg2ImgPipeline,
        ("FluxPipeline", "inpaint"): diffusers.FluxInpaintPipeline,
        ("StableDiffusion3Pipeline", "img2img"): diffusers.StableDiffusion3Img2ImgPipeline,
        ("StableDiffusion3Pipeline", "inpaint"): diffusers.StableDiffusion3InpaintPipeline,
    }
    pipe = kinds[type(family.pipe).__name__, task](**family.parts)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "image": _noise(2, 3, 16, 16, seed=8).sigmoid(),
        "strength": strength,
        "latents": None,
    }
    if task == "inpaint":
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 4:12, 4:12] = 1.0
        settings["mask_image"] = mask

    def run(scheduler: Any, steps: int) -> Tensor:
        pipe.scheduler = scheduler
        sigmas = [1.0 - i / steps for i in range(steps)]
        generator = torch.Generator().manual_seed(9)
        given = settings | {"num_inference_steps": steps, "sigmas": sigmas}
        return _sample(family, pipe, generator=generator, **given)

    own, ours = family.parts["scheduler"], _ours(family, solver=solver)
    seen = count(pipe.transformer)
    coarse = run(ours, 8)
    assert len(seen) == 8 - int(8 - 8 * strength)
    assert coarse.isfinite().all()
    if solver == "euler":
        assert torch.equal(coarse, run(own, 8))
    else:  # with many steps the solvers meet
        expected = run(own, 60)
        assert (run(ours, 60) - expected).square().mean().sqrt() < 0.02 * expected.std()


def test_a_loaded_pipeline_has_the_scheduler_it_was_saved_with(tmp_path) -> None:
    family = _sd3()
    family.pipe.scheduler = _ours(family, solver="pec2", schedule="cosine")
    family.pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path, **{name: part for name, part in family.parts.items() if part is None}
    )
    loaded.set_progress_bar_config(disable=True)
    family.pipe.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, FlowScheduler)
    expected = _sample(family, num_inference_steps=4)
    assert torch.equal(_sample(family, loaded, num_inference_steps=4), expected)


def test_a_bfloat16_pipeline_runs_and_decodes() -> None:
    family = _flux()
    family.pipe.set_progress_bar_config(disable=True)
    family.pipe.scheduler = _ours(family, solver="pec2")
    family.pipe.to(torch.bfloat16)
    call = {
        key: value.bfloat16() if isinstance(value, Tensor) else value
        for key, value in family.call.items()
    }
    images = family.pipe(**call, num_inference_steps=4, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


def test_a_callback_may_replace_the_latents() -> None:
    family = _sd3()
    family.pipe.set_progress_bar_config(disable=True)
    found: list[Tensor] = []

    def doubled(pipe: Any, step: int, timestep: Tensor, state: dict[str, Tensor]):
        return {"latents": state["latents"] * 2} if step == 1 else {}

    for scheduler in (family.parts["scheduler"], _ours(family, solver="euler")):
        family.pipe.scheduler = scheduler
        sigmas = [1.0, 0.75, 0.5, 0.25]
        found.append(_sample(family, sigmas=sigmas, callback_on_step_end=doubled))
    assert torch.equal(*found)
