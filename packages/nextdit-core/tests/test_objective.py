"""Objectives on Gaussian data, whose optimal predictions are known, and their way to disk."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextdit_core import SDE, FlowMatching, Pipeline, Recipe, Tokens, UserError, train
from nextdit_core.training.run_folder import RunFolder

Make = Callable[..., Recipe]

PATHS = ["linear", "gvp", "vp"]
PREDICTIONS = ["velocity", "noise", "score", "data"]
MEAN, DEVIATION = 0.7, 0.4


def _alpha_sigma(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """SiT's paths, written again; t = 1 is data."""
    if path == "linear":
        return t, 1 - t
    if path == "gvp":
        return torch.sin(t * math.pi / 2), torch.cos(t * math.pi / 2)
    s = 1 - t  # ∫β of Song et al. with β from 0.1 to 20
    alpha = torch.exp(-0.5 * (0.1 * s + 0.5 * 19.9 * s**2))
    return alpha, (1 - alpha**2).sqrt()


def _slopes(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Their derivatives, by autograd."""
    with torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        alpha, sigma = _alpha_sigma(path, t)
        (of_alpha,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
        (of_sigma,) = torch.autograd.grad(sigma.sum(), t)
    return of_alpha, of_sigma


def _optimal(path: str, prediction: str, t: Tensor, x: Tensor) -> Tensor:
    """The conditional expectation, where the data are N(MEAN, DEVIATION²)."""
    alpha, sigma = _alpha_sigma(path, t)
    offset = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    data, noise = MEAN + alpha * DEVIATION**2 * offset, sigma * offset
    if prediction == "velocity":
        alpha_dot, sigma_dot = _slopes(path, t)
        return alpha_dot * data + sigma_dot * noise
    return {"data": data, "noise": noise, "score": -offset}[prediction]


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
def test_the_loss_is_least_at_the_conditional_expectation(
    path: str, prediction: str, weighting: str, random: torch.Generator
) -> None:
    """Its gradient there is uncorrelated with everything that x tells: 1 and x."""
    objective = FlowMatching(path, prediction, weighting)
    count = 200_000
    data = MEAN + DEVIATION * torch.randn(count, 1, dtype=torch.float64, generator=random)
    noise = torch.randn(count, 1, dtype=torch.float64, generator=random)
    for now in (0.1, 0.5, 0.9):
        t = torch.full_like(data, now)
        alpha, sigma = _alpha_sigma(path, t)
        x = alpha * data + sigma * noise
        assert torch.allclose(objective.curve.interpolate(data, noise, t), x, atol=1e-12)
        best = _optimal(path, prediction, t, x).requires_grad_()
        loss = objective.loss(best, data, noise, t)
        assert (loss >= 0).all()
        (slope,) = torch.autograd.grad(loss.sum(), best)
        for told in (slope, slope * x):
            error = told.std() / math.sqrt(count)
            assert told.mean().abs() <= 5 * error
        wrong = objective.loss(best.detach() + 0.3, data, noise, t)
        assert wrong.mean() > loss.mean()


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_weightings_are_sits(path: str, prediction: str, random: torch.Generator) -> None:
    shape = (1000, 1)
    data, noise, predicted = (
        torch.randn(shape, dtype=torch.float64, generator=random) for _ in range(3)
    )
    t = torch.rand(shape, dtype=torch.float64, generator=random) * 0.96 + 0.02
    alpha, sigma = _alpha_sigma(path, t)
    alpha_dot, sigma_dot = _slopes(path, t)
    x = alpha * data + sigma * noise
    true = alpha_dot * data + sigma_dot * noise
    if prediction == "velocity":
        velocity = predicted
        said = (velocity * alpha - alpha_dot * x) / (sigma_dot * alpha - alpha_dot * sigma)
    elif prediction == "data":
        said = (x - alpha * predicted) / sigma
        velocity = alpha_dot * predicted + sigma_dot * said
    else:
        said = predicted if prediction == "noise" else -sigma * predicted
        velocity = alpha_dot / alpha * (x - sigma * said) + sigma_dot * said

    def loss(weighting: str) -> Tensor:
        return FlowMatching(path, prediction, weighting).loss(predicted, data, noise, t)

    own = {"velocity": velocity - true, "data": predicted - data}.get(prediction, said - noise)
    torch.testing.assert_close(loss("none"), own**2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss("velocity"), (velocity - true) ** 2, rtol=1e-7, atol=1e-9)
    drift_var = alpha_dot / alpha * sigma**2 - sigma * sigma_dot
    expected = drift_var / sigma**2 * (said - noise) ** 2
    torch.testing.assert_close(loss("likelihood"), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_a_perfect_prediction_becomes_the_velocity(path: str, prediction: str) -> None:
    objective = FlowMatching(path, prediction)
    velocity = objective.velocity(lambda t, x: _optimal(path, prediction, t, x))
    x = torch.linspace(-3, 3, 21, dtype=torch.float64)
    for now in (*objective.sampling_times, 0.05, 0.3, 0.7, 0.95):
        t = torch.tensor(now, dtype=torch.float64)
        expected = _optimal(path, "velocity", t, x)
        torch.testing.assert_close(velocity(t, x), expected, rtol=1e-7, atol=1e-7)


def test_the_default_is_what_was_trained_before(random: torch.Generator) -> None:
    """x1 - x0 at t·x1 + (1 - t)·x0, bit for bit."""
    data, noise, predicted = (torch.randn(50, 3, generator=random) for _ in range(3))
    t = torch.rand(50, 1, generator=random)
    objective = FlowMatching()
    assert torch.equal(objective.curve.interpolate(data, noise, t), t * data + (1 - t) * noise)
    loss = objective.loss(predicted, data, noise, t)
    assert torch.equal(loss, (predicted - (data - noise)).square())
    assert objective.training_times == objective.sampling_times == (0.0, 1.0)
    assert [objective.time(now) for now in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]


@pytest.fixture
def gaussian(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Pipeline]:
    """Make pipelines whose backbone is the optimal prediction for Gaussian data."""
    found = Pipeline.from_pretrained(train(recipe(steps=1)), device="cpu")

    def make(path: str, prediction: str) -> Pipeline:
        def forward(tokens: Tokens, t: Tensor, *others: Any, **options: Any) -> Tensor:
            return _optimal(path, prediction, t[0].double(), tokens.values.double()).float()

        monkeypatch.setattr(found.model.backbone, "forward", forward)
        card = dataclasses.replace(found.card, objective=FlowMatching(path, prediction))
        return Pipeline(found.model, found.modality, card)

    return make


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_the_ode_takes_each_noise_to_its_own_datum(
    gaussian: Callable[[str, str], Pipeline], path: str, prediction: str
) -> None:
    pipe = gaussian(path, prediction)
    noise = pipe._noise([(400,)], [(0, 0)]).values
    for guidance in (1.0, 3.0):  # both conditions say the same, so guidance changes nothing
        options: dict[str, Any] = {"nfe": 400, "solver": "rk4", "guidance": guidance}
        (found,) = pipe("up", size=(400,), output="latent", **options)
        # The flow of a Gaussian keeps a sample's distance from the mean in deviations.
        assert (found - (MEAN + DEVIATION * noise)).abs().max() < 0.02
    (quick,) = pipe("up", size=(400,), output="latent", nfe=40)  # the default solver
    assert abs(quick.mean() - (MEAN + DEVIATION * noise.mean())) < 0.03
    assert abs(quick.std() / (DEVIATION * noise.std()) - 1) < 0.05


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_the_sde_recovers_the_distribution(
    gaussian: Callable[[str, str], Pipeline], path: str, prediction: str
) -> None:
    pipe = gaussian(path, prediction)
    for sde in ("sigma", SDE("sbdm", last_step="tweedie", last_size=0.01)):
        (found,) = pipe("up", size=(4000,), output="latent", nfe=200, sde=sde, guidance=1.0)
        count = found.numel()
        assert abs(found.mean() - MEAN) < 5 * DEVIATION / math.sqrt(count) + 0.01
        assert abs(found.std() / DEVIATION - 1) < 5 / math.sqrt(2 * count) + 0.03
        # It is not the ODE: noise and datum are no longer the same draw.
        noise = pipe._noise([(4000,)], [(0, 0)]).values
        assert torch.corrcoef(torch.stack([noise.flatten(), found.flatten()]))[0, 1] < 0.9


def test_sde_samples_depend_on_their_seed_and_not_on_the_batch(recipe: Make) -> None:
    pipe = Pipeline.from_pretrained(train(recipe()), device="cpu")
    options: dict[str, Any] = {"sde": "sigma:0.5", "nfe": 6}
    counts: list[int] = []
    one, two = pipe(
        ["up", "down"], size=[(5,), (7,)], seed=[3, 4], progress=counts.append, **options
    )
    assert counts == [1, 2, 3, 4, 5, 6]
    (again,) = pipe("down", size=(7,), seed=[4], **options)
    assert (two - again).abs().max() <= 1e-5
    (other,) = pipe("down", size=(7,), seed=[5], **options)
    assert (two - other).abs().max() > 1e-3
    (ode,) = pipe("up", size=(5,), seed=[3], nfe=6)
    assert (one - ode).abs().max() > 1e-3
    (late,) = pipe("up", seed=5, latents=[one], start=0.9, output="latent", **options)
    (early,) = pipe("up", seed=5, latents=[one], start=0.1, output="latent", **options)
    assert (late - one).abs().mean() < (early - one).abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sde": "sgima"}, r"sde: unknown form 'sgima'; accepted, closest first: sigma"),
        ({"sde": "sigma:lots"}, r"'sigma:lots'; expected FORM or FORM:SCALE"),
        ({"sde": "sigma:-1"}, r"sde: scale"),
        ({"sde": "sigma", "solver": "heun"}, "solver and on_step are of the ODE"),
        (
            {"sde": "sigma", "latents": [torch.zeros(4, 2)], "start": 0.97},
            r"sde: start is 0.97; expected less than 0.96",
        ),
    ],
)
def test_bad_requests_are_refused(recipe: Make, options: dict[str, Any], message: str) -> None:
    pipe = Pipeline.from_pretrained(train(recipe(steps=1)), device="cpu")
    with pytest.raises(UserError, match=message):
        pipe("up", **options)


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(PATHS, PREDICTIONS)))
def test_every_objective_is_trained_saved_resumed_and_sampled(
    recipe: Make, tmp_path: Path, path: str, prediction: str
) -> None:
    objective = {"path": path, "prediction": prediction, "weighting": "velocity"}
    whole = recipe(out=str(tmp_path / "whole"), objective=objective, steps=8)
    train(whole)
    train(recipe(out=str(tmp_path / "parts"), objective=objective, steps=4))
    parts = recipe(out=str(tmp_path / "parts"), objective=objective, steps=8)
    folder = train(parts)
    rows = [RunFolder(r.out).rows() for r in (whole, parts)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert all(math.isfinite(row["loss"]) and "skipped" not in row for row in rows[0])
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    assert pipe.card.objective == FlowMatching(path, prediction, "velocity")
    for options in ({}, {"sde": "sigma"}):
        (found,) = pipe("up", seed=1, **options)
        assert found.isfinite().all()


def test_a_model_that_predicts_noise_learns(recipe: Make) -> None:
    run = recipe(
        steps=200,
        checkpoint_every=200,
        log_every=50,
        objective={"path": "vp", "prediction": "noise"},
    )
    train(run)
    losses = [row["loss"] for row in RunFolder(run.out).rows()]
    assert sum(losses[-40:]) < 0.75 * sum(losses[:40])


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = folder / "nextdit.json"
    values = json.loads(card.read_text())
    change(values)
    card.write_text(json.dumps(values))
    marker = folder / "complete.json"
    sizes = json.loads(marker.read_text())
    sizes["files"]["nextdit.json"] = card.stat().st_size
    marker.write_text(json.dumps(sizes))


def test_a_folder_without_an_objective_is_velocity_on_the_straight_path(recipe: Make) -> None:
    folder = train(recipe(steps=1))
    before = Pipeline.from_pretrained(folder, device="cpu")("up")[0]
    _edit(folder, lambda values: values.pop("objective"))
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    assert pipe.card.objective == FlowMatching("linear", "velocity")
    assert torch.equal(pipe("up")[0], before)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"prediction": "nose"}, r"nextdit.json: unknown prediction 'nose'; accepted: noise,"),
        ({"path": "gpv"}, r"unknown path 'gpv'; accepted: gvp,"),
        ({"weighting": "velocty"}, r"unknown weighting 'velocty'; accepted: velocity,"),
        ({"pth": "vp"}, r"unknown objective key 'pth'; accepted: path,"),
        ({"path": 3}, r"objective.path is 3; expected a name"),
        ("noise", r"lacks 'objective', or it is no dict"),
    ],
)
def test_an_unknown_objective_names_the_closest(
    recipe: Make, objective: object, message: str
) -> None:
    folder = train(recipe(steps=1))
    _edit(folder, lambda values: values.update(objective=objective))
    with pytest.raises(UserError, match=message):
        Pipeline.from_pretrained(folder, device="cpu")


def test_a_run_that_is_older_than_the_choice_resumes_and_another_objective_does_not(
    recipe: Make,
) -> None:
    run = recipe(steps=4)
    train(run)
    file = RunFolder(run.out).recipe_file
    text = file.read_text()
    old = text[: text.index("[objective]")] + text[text.index("[sampling]") :]
    assert "prediction" not in old
    file.write_text(old)
    with pytest.raises(UserError, match=r"objective.prediction = 'velocity'.*has 'noise'"):
        train(recipe(steps=8, objective={"prediction": "noise"}))
    assert train(recipe(steps=8)).name == "step_00000008"
