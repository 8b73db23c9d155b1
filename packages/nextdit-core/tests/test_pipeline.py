"""What a request may ask for: guidance, extrapolation, context drop, latents, callbacks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowsolvers
from nextdit_core import (
    ContextDrop,
    Extrapolation,
    Guidance,
    Pipeline,
    Recipe,
    Step,
    Tokens,
    UserError,
    train,
)

Make = Callable[..., Recipe]
OPTIONS: dict[str, Any] = {"nfe": 6, "solver": "pec2", "schedule": "uniform"}


@pytest.fixture
def pipe(recipe: Make) -> Pipeline:
    """A trained pipeline whose every weight matters."""
    found = Pipeline.from_pretrained(train(recipe()), device="cpu")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=random))
    return found


def _spied(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, dict]]:
    """Note the samples, the time and the options of every call of the backbone."""
    seen: list[tuple[int, float, dict]] = []
    forward = pipe.model.backbone.forward

    def note(tokens: Tokens, t: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append((tokens.batch, t[0].item(), options))
        return forward(tokens, t, *others, **options)

    monkeypatch.setattr(pipe.model.backbone, "forward", note)
    return seen


def test_outside_its_interval_guidance_costs_nothing(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _spied(pipe, monkeypatch)
    some = Guidance(3.0, interval=(0.0, 0.5))
    half = pipe("up", guidance=some, **OPTIONS)[0]
    assert [batch for batch, _, _ in seen] == [2, 2, 2, 1, 1, 1]
    always, never = (pipe("up", guidance=scale, **OPTIONS)[0] for scale in (3.0, 1.0))
    assert (half - always).abs().max() > 1e-4
    assert (half - never).abs().max() > 1e-4


@pytest.mark.parametrize(
    "rule",
    ["cfg", "cfg-zero*", "apg", "renorm", flowsolvers.APG(momentum=flowsolvers.Momentum(-0.3))],
    ids=str,
)
def test_no_rule_sees_other_samples(pipe: Pipeline, rule: Any) -> None:
    pipe.model.double()  # what is left are other samples, and no rounding
    guidance = Guidance(3.0, rule)
    sizes = [(5,), (9,), (5,)]
    together = pipe(["up", "down", "up"], size=sizes, seed=[1, 2, 3], guidance=guidance, **OPTIONS)
    for i, prompt in enumerate(["up", "down", "up"]):
        (alone,) = pipe(prompt, size=sizes[i], seed=[i + 1], guidance=guidance, **OPTIONS)
        assert (together[i] - alone).abs().max() <= 1e-5


def test_rules_are_those_of_flowsolvers(pipe: Pipeline) -> None:
    """One Euler step, from velocities that are read off unguided ones."""
    options: dict[str, Any] = {"nfe": 1, "solver": "euler", "output": "latent"}
    noise = pipe._noise([(6,)], [(0, 0)]).values
    c, u = (pipe(text, guidance=1.0, **options)[0] - noise for text in ("up", ""))
    for name in ("cfg-zero*", "apg", "renorm"):
        expected = flowsolvers.guidance_rule(name)(c[None], u[None], 3.0, None)[0]
        found = pipe("up", guidance=Guidance(3.0, name), **options)[0] - noise
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("channels", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("rule", ["cfg", "cfg-zero*", "apg", "renorm-clip"])
def test_chosen_channels_are_guided_and_others_follow_the_condition(
    pipe: Pipeline, rule: str, channels: tuple[int, ...]
) -> None:
    """One Euler step, from velocities read off unguided ones; the rule sees no other channel."""
    options: dict[str, Any] = {"nfe": 1, "solver": "euler", "output": "latent"}
    noise = pipe._noise([(6,)], [(0, 0)]).values
    c, u = (pipe(text, guidance=1.0, **options)[0] - noise for text in ("up", ""))
    picked = list(channels)
    expected = c.clone()
    led = flowsolvers.guidance_rule(rule)(c[None, :, picked], u[None, :, picked], 3.0, None)[0]
    expected[:, picked] = led
    guidance = Guidance(3.0, rule, channels=channels)
    found = pipe("up", guidance=guidance, **options)[0] - noise
    assert (found - expected).abs().max() <= 1e-5
    # A packed batch of other lengths changes nothing.
    both = pipe(["up", "down"], size=[(6,), (9,)], guidance=guidance, **options)
    assert (both[0] - noise - found).abs().max() <= 1e-5


def test_a_scale_may_follow_the_time(pipe: Pipeline) -> None:
    """By 5 and then by 2: as a request guided by 2 that is put where one guided by 5 was."""
    times: list[float] = []

    def scale(t: float) -> float:
        times.append(t)
        return 5.0 if t < 0.5 else 2.0

    options = OPTIONS | {"solver": "euler", "output": "latent"}
    (found,) = pipe("up", guidance=Guidance(scale), **options)
    assert times == pytest.approx([i / 6 for i in range(6)])
    states: list[list[Tensor]] = []
    pipe("up", guidance=5.0, on_step=lambda step: states.append(step.latents()), **options)

    def put(step: Step) -> None:
        if step.step == 2:
            step.go_on_from(states[2])

    (expected,) = pipe("up", guidance=2.0, on_step=put, **options)
    assert (found - expected).abs().max() <= 1e-6
    assert (found - states[-1][0]).abs().max() > 1e-3


def test_a_number_guides_the_channels_of_the_card(pipe: Pipeline) -> None:
    sampling = {**pipe.card.sampling, "guidance_channels": [0]}
    some = replace(pipe, card=replace(pipe.card, sampling=sampling))
    expected = pipe("up", guidance=Guidance(2.0, channels=(0,)), **OPTIONS)[0]
    assert torch.equal(some("up", guidance=2.0, **OPTIONS)[0], expected)
    assert torch.equal(some("up", guidance=some.guidance(2.0), **OPTIONS)[0], expected)
    every = some("up", guidance=Guidance(2.0), **OPTIONS)[0]
    assert torch.equal(every, pipe("up", guidance=2.0, **OPTIONS)[0])
    with pytest.raises(UserError, match=r"are \(0, 2\); latents have 2: expected 0 to 1"):
        pipe("up", guidance=Guidance(2.0, channels=(0, 2)), **OPTIONS)


def test_a_time_grid_may_be_one_or_its_name(pipe: Pipeline) -> None:
    options = OPTIONS | {"schedule": "shift:4"}
    grid = OPTIONS | {"schedule": flowsolvers.shift(4.0)}
    assert torch.equal(pipe("up", **options)[0], pipe("up", **grid)[0])


def test_extrapolation_by_area_takes_one_ratio_for_all_axes(pipe: Pipeline) -> None:
    """The modality has one axis, where area and axis are the same."""
    by_axis, by_area = (
        pipe("up", size=(24,), extrapolate=Extrapolation("ntk", by=by), **OPTIONS)[0]
        for by in ("axis", "area")
    )
    assert torch.equal(by_axis, by_area)


def test_extrapolation_reaches_the_backbone(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _spied(pipe, monkeypatch)
    usual = pipe("up", size=(24,), **OPTIONS)[0]
    found = pipe("up", size=(24,), extrapolate="time-aware", **OPTIONS)[0]
    options = seen[-1][2]
    assert (options["scale"], options["trained_tokens"]) == ("proportional", 6)
    expected = pipe.model.backbone.rope.extrapolate("time-aware", scale=(4.0, 1.0, 1.0))
    t = torch.tensor([0.3])
    positions = pipe.modality.positions((24,))[None]
    a, b = (rope.rotation(positions, t) for rope in (options["rope"], expected))
    assert torch.equal(a.cos, b.cos)
    assert torch.equal(a.sin, b.sin)
    assert (usual - found).abs().max() > 1e-4
    # Within the trained size nothing changes.
    small = pipe("up", size=(4,), extrapolate=Extrapolation("ntk"), **OPTIONS)[0]
    assert (small - pipe("up", size=(4,), **OPTIONS)[0]).abs().max() <= 1e-6
    with pytest.raises(UserError, match="one size at a time"):
        pipe(["up", "up"], size=[(12,), (24,)], extrapolate="ntk", **OPTIONS)
    with pytest.raises(UserError, match=r"extrapolation: .*nkt"):
        pipe("up", extrapolate="nkt", **OPTIONS)


def test_context_drop_ends_steps_where_it_changes(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _spied(pipe, monkeypatch)
    options = OPTIONS | {"nfe": 7, "guidance": 1.0}
    found = pipe("up", context_drop="0.45:2", **options)[0]
    times = [t for _, t, _ in seen]
    pooled = [options["pooling"] is not None for _, _, options in seen]
    assert len(seen) == 7
    assert any(abs(t - 0.45) < 1e-6 for t in times)
    assert pooled == [t < 0.45 - 1e-6 for t in times[:-1]] + [False] or pooled[0]
    assert not pooled[-1]
    assert (found - pipe("up", **options)[0]).abs().max() > 1e-5
    none = pipe("up", context_drop=ContextDrop(()), **options)[0]
    assert torch.equal(none, pipe("up", **options)[0])


def test_latents_go_in_and_come_out(pipe: Pipeline) -> None:
    (latent,) = pipe("up", seed=3, output="latent", **OPTIONS)
    (media,) = pipe("up", seed=3, **OPTIONS)
    (numbers,) = pipe("up", seed=3, output="tensor", **OPTIONS)
    assert torch.equal(numbers, pipe.modality.decode_tensor(latent))
    assert torch.equal(pipe.modality.decode(latent), media)
    noise = pipe._noise([(6,)], [(3, 0)]).values
    given = pipe.modality.detokenize(noise, (6,))
    (again,) = pipe("up", latents=[given], output="latent", **OPTIONS)
    assert (again - latent).abs().max() <= 1e-5
    # From late on, what comes out is nearly what went in.
    (late,) = pipe("up", seed=5, latents=[latent], start=0.98, output="latent", **OPTIONS)
    (early,) = pipe("up", seed=5, latents=[latent], start=0.1, output="latent", **OPTIONS)
    assert (late - latent).abs().max() < 0.5 * (early - latent).abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5}, "needs latents"),
        ({"latents": []}, "0 latents for 1 prompts"),
        ({"latents": [torch.zeros(3, 2)], "size": (3,)}, "size or latents, not both"),
        ({"latents": [torch.zeros(3, 2)], "start": 1.5}, "1.5"),
        ({"output": "picture"}, "'media', 'tensor' or 'latent'"),
        ({"context_drop": "2"}, "context drop '2'"),
    ],
)
def test_requests_that_mean_nothing_are_refused(
    pipe: Pipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipe("up", **OPTIONS, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "cfgzero"}, "cfg-zero"),
        ({"interval": (0.5, 0.2)}, "interval"),
        ({"scale": float("nan")}, "finite"),
        ({"channels": ()}, "counted from 0"),
        ({"channels": (-1,)}, "counted from 0"),
        ({"zero_until": 2.0}, "zero_until"),
    ],
)
def test_guidance_that_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Guidance(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"by": "pixel"}, "accepted: axis, area"), ({"watershed": 1.5}, "1.5; expected 0 to 1")],
)
def test_extrapolation_that_means_nothing_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Extrapolation(**arguments)


def test_a_step_can_be_seen_and_the_request_stopped(pipe: Pipeline) -> None:
    counts: list[int] = []
    times: list[float] = []

    def on_step(event: Step) -> None:
        times.append(event.t)
        if event.step == 2:
            event.stop()

    (stopped,) = pipe("up", on_step=on_step, progress=counts.append, **OPTIONS)
    assert times == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert counts == [2, 3, 4]  # pec2 evaluates at both ends of its first step
    assert stopped.isfinite().all()


def test_threads_share_a_model(pipe: Pipeline) -> None:
    """Different times, sizes and settings at once, as if alone."""
    requests: list[dict[str, Any]] = [
        {"seed": 1, "extrapolate": "time-aware", "size": (24,)},
        {"seed": 2, "context_drop": "0.5:2"},
        {"seed": 3, "guidance": Guidance(2.0, "apg")},
        {"seed": 4, "extrapolate": "ntk", "size": (12,), "guidance": 1.0},
    ]
    alone = [pipe("up", **OPTIONS, **request)[0] for request in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: pipe("up", **OPTIONS, **request)[0], requests * 3))
    for one, expected in zip(found, alone * 3, strict=True):
        assert torch.equal(one, expected)
