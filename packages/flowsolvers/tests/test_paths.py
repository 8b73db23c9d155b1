"""Paths: derivatives by autograd, predictions in closed form on a Gaussian."""

import itertools
import math

import pytest
import torch

import flowsolvers as fs

PATHS = [fs.Linear(), fs.GVP(), fs.VP(), fs.VP(0.0, 5.0)]
KINDS = ["velocity", "score", "noise", "data"]


def slope(value, t):
    """The derivative of an elementwise function, by autograd."""
    t = t.clone().requires_grad_()
    out = value(t)
    if not out.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(out.sum(), t)[0]


def gaussian(path, t, x, mean=0.7, deviation=0.4):
    """The four predictions where the data are N(mean, deviation²), by conditioning."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * deviation**2 + sigma**2
    offset = (x - alpha * mean) / variance
    data, noise = mean + alpha * deviation**2 * offset, sigma * offset
    # The velocity of a Gaussian's mean and deviation, from autograd's derivatives.

    def spread(s):
        return path.alpha(s) ** 2 * deviation**2 + path.sigma(s) ** 2

    velocity = slope(lambda s: path.alpha(s) * mean, t) + 0.5 * slope(spread, t) * offset
    return {"velocity": velocity, "score": -offset, "noise": noise, "data": data}


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_are_autograds(path):
    t = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    for value, dot in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        torch.testing.assert_close(dot(t), slope(value, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_ends_are_noise_and_data(path):
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    at_noise = math.exp(-0.25 * (path.sigma_max + path.sigma_min)) if isinstance(path, fs.VP) else 0
    assert path.alpha(zero).item() == pytest.approx(at_noise, abs=1e-15)
    assert path.sigma(zero).item() == pytest.approx(math.sqrt(1 - at_noise**2))
    assert (path.alpha(one).item(), path.sigma(one).item()) == pytest.approx((1, 0), abs=1e-15)
    data, noise = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(path.interpolate(data, noise, 1.0), data)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(KINDS, KINDS)))
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_conversions_are_exact_on_a_gaussian(path, source, target):
    x = torch.linspace(-3, 3, 21, dtype=torch.float64)
    for t in (0.02, 0.3, 0.7, 0.98):
        known = gaussian(path, torch.tensor(t, dtype=torch.float64), x)
        converted = path.convert(known[source], t, x, source, target)
        torch.testing.assert_close(converted, known[target], rtol=1e-9, atol=1e-10)


def test_a_velocity_says_what_the_data_are_at_the_noise_and_the_other_way_round():
    x, v = torch.randn(2, 5, dtype=torch.float64)
    path = fs.Linear()
    torch.testing.assert_close(path.convert(v, 0.0, x, "velocity", "data"), x + v)
    torch.testing.assert_close(path.convert(v, 1.0, x, "velocity", "noise"), x - v)
    torch.testing.assert_close(path.convert(x, 0.0, v, "score", "noise"), -x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_anything_is_solved_as_a_velocity(kind):
    path = fs.GVP()
    velocity = path.velocity(lambda t, x: gaussian(path, t, x)[kind], kind)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(9, dtype=torch.float64, generator=generator)
    plan = fs.plan("rk4", nfe=1600)
    inner = fs.Plan("rk4", "uniform", plan.steps[4:-4])  # away from the singular ends
    start, end = inner.steps[0].t, inner.steps[-1].t_next
    means, deviations = [], []
    for t in (start, end):
        alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (path.alpha, path.sigma))
        means.append(0.7 * alpha)
        deviations.append((0.16 * alpha**2 + sigma**2).sqrt())
    x = fs.solve(velocity, means[0] + deviations[0] * noise, plan=inner).x
    # Along the flow of a Gaussian, a sample keeps its distance in deviations.
    torch.testing.assert_close(x, means[1] + deviations[1] * noise, rtol=1e-7, atol=1e-7)


def test_a_guided_prediction_keeps_its_context_and_its_count():
    # Conversions are affine, so that guidance of the noise is guidance of the velocity.
    path, x, t = fs.VP(), torch.randn(3, 2, dtype=torch.float64), torch.tensor(0.4)
    cond, uncond = (lambda t, x: x.sin()), (lambda t, x: x.cos())
    late = fs.Context(0.9, 1.0, 0, 1, 0, 0, 1, is_last=True)
    options = {"scale": 3.0, "interval": (0.0, 0.5)}
    v = path.velocity(fs.guided(cond, uncond, **options), "noise")
    inner = fs.guided(path.velocity(cond, "noise"), path.velocity(uncond, "noise"), **options)
    for seen, rows in ((None, 2), (late, 1)):
        torch.testing.assert_close(v(t, x, context=seen), inner(t, x, context=seen))
        assert fs.model_rows(v, seen) == fs.model_rows(inner, seen) == rows


def test_times_of_samples_broadcast():
    x, v = torch.randn(2, 3, 4)
    t = torch.tensor([0.1, 0.5, 0.9])[:, None]
    each = [fs.VP().convert(v[i], float(t[i]), x[i], "velocity", "score") for i in range(3)]
    together = fs.VP().convert(v, t, x, "velocity", "score")
    torch.testing.assert_close(together, torch.stack(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.VP(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: fs.VP(-1.0, 1.0), "0 <= sigma_min"),
        (lambda: fs.Linear().velocity(lambda t, x: x, "epsilon"), "accepted, closest first"),
        (
            lambda: fs.GVP().convert(torch.ones(1), 0.5, torch.ones(1), "nose", "data"),
            "closest first: noise",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
