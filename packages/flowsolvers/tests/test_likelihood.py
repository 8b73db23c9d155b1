"""Likelihood: densities in closed form."""

import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

import flowsolvers as fs
from flowsolvers.likelihood import with_divergence

DIM = 64


def mixture(components):
    """Log density and velocity of a 64-D mixture with a falling spectrum."""
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(components, DIM, dtype=torch.float64, generator=generator)
    deviations = torch.arange(1, DIM + 1, dtype=torch.float64).rsqrt().expand(components, -1) + 0.1
    data = MixtureSameFamily(
        Categorical(torch.ones(components, dtype=torch.float64)),
        Independent(Normal(means, deviations), 1),
    )

    def velocity(t, x):
        variance = t**2 * deviations**2 + (1 - t) ** 2
        offset = x[:, None] - t * means
        logits = -(offset.square() / variance + variance.log()).sum(-1) / 2
        each = means + (t * deviations**2 - (1 - t)) / variance * offset
        return (logits.softmax(-1)[..., None] * each).sum(1)

    torch.manual_seed(0)
    return data, velocity, data.sample((6,))


@pytest.mark.parametrize("components", [1, 5])
def test_exact_divergence_gives_the_density(components):
    data, velocity, x1 = mixture(components)
    found = fs.log_likelihood(velocity, x1, nfe=200, exact=True)  # 100 steps
    error = (found.log_density - data.log_prob(x1)).abs().max().item()
    assert error <= 0.005
    assert found.nfe == 200
    # The noise flows back to the data.
    back = fs.solve(velocity, found.x0, nfe=200).x
    torch.testing.assert_close(back, x1, atol=2e-3, rtol=0)


@pytest.mark.parametrize("components", [1, 5])
@pytest.mark.parametrize("solver", [None, "bosh3", "tsit5", "dopri8"])
def test_to_a_tolerance_the_density_is_within_it(components, solver):
    data, velocity, x1 = mixture(components)
    expected = data.log_prob(x1)
    counts = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        found = fs.log_likelihood(velocity, x1, rtol=0.0, atol=tolerance, solver=solver, exact=True)
        # The prior multiplies the error of the noise by the noise, which is 8 long.
        assert (found.log_density - expected).abs().max() < 50 * tolerance
        counts.append(found.nfe)
        back = fs.solve_adaptive(velocity, found.x0, rtol=1e-7, atol=1e-7).x
        assert (back - x1).abs().max() < 10 * tolerance
    if solver != "dopri8":  # at these tolerances its steps are bounded by stability
        assert counts == sorted(set(counts))


def test_figures_of_the_documentation():
    data, velocity, x1 = mixture(5)

    def error(**options):
        found = fs.log_likelihood(velocity, x1, exact=True, **options)
        return (found.log_density - data.log_prob(x1)).abs().max().item(), found.nfe

    assert 0.0032 < error(nfe=200)[0] < 0.0033
    nats, nfe = error(atol=1e-3, solver="dopri8")
    assert nats < 0.0001
    assert nfe < 200
    assert error(atol=1e-3)[0] < 0.027
    assert error(atol=1e-5)[0] < 0.0005


def test_the_density_counts_however_large_the_data():
    """Among 3072 numbers of each sample the one of its density is not lost."""
    deviation = torch.linspace(0.1, 0.5, 3072, dtype=torch.float64)

    def velocity(t, x):  # to N(0, deviation²), for which the noise is only scaled
        variance = t**2 * deviation**2 + (1 - t) ** 2
        return (t * deviation**2 - (1 - t)) / variance * x

    x1 = deviation * torch.randn(2, 3072, generator=torch.Generator().manual_seed(0)).double()
    expected = Independent(Normal(torch.zeros_like(deviation), deviation), 1).log_prob(x1)
    found = fs.log_likelihood(velocity, x1, atol=1e-4, generator=torch.Generator())
    assert (found.log_density - expected).abs().max() < 1e-2  # of 2000 nats


def test_to_a_tolerance_an_interval_of_guidance_is_stepped_on():
    _, velocity, x1 = mixture(5)
    x1 = x1[:2]
    options = {"atol": 1e-8, "solver": "dopri8", "exact": True}
    guided = fs.guided(velocity, lambda t, x: 0.5 * x, scale=2.0, interval=(0.3, 0.6))
    found = fs.log_likelihood(guided, x1, **options)
    # The same from one edge to the next, each part smooth.
    inside = fs.guided(velocity, lambda t, x: 0.5 * x, scale=2.0)
    state = x1, torch.zeros(len(x1), dtype=torch.float64)
    for part, start, end in ((velocity, 1.0, 0.6), (inside, 0.6, 0.3), (velocity, 0.3, 0.0)):
        flow = with_divergence(part, x1, None)
        state = fs.solve_adaptive(
            flow, state, rtol=0.0, atol=1e-11, pair="dopri8", start=start, end=end
        ).x
    x0, volume = state
    torch.testing.assert_close(found.x0, x0, atol=1e-7, rtol=0)
    prior = -0.5 * (x0.square().sum(1) + DIM * math.log(2 * math.pi))
    torch.testing.assert_close(found.log_density, prior + volume, atol=1e-6, rtol=0)
    blind = fs.log_likelihood(lambda t, x: guided(t, x), x1, **options)
    assert found.nfe < blind.nfe


def test_probes_estimate_the_divergence_without_bias():
    _, velocity, x1 = mixture(5)
    exact = fs.log_likelihood(velocity, x1[:1], nfe=20, exact=True).log_density[0]
    generator = torch.Generator().manual_seed(0)
    one = fs.log_likelihood(velocity, x1[:1].expand(400, -1), nfe=20, generator=generator)
    spread = one.log_density.std().item()
    assert abs((one.log_density.mean() - exact).item()) < 3 * spread / 20
    many = fs.log_likelihood(
        velocity, x1[:1].expand(400, -1), nfe=20, generator=generator, probes=9
    )
    assert many.log_density.std().item() == pytest.approx(spread / 3, rel=0.25)


def test_one_probe_is_exact_where_the_jacobian_is_diagonal():
    _, velocity, x1 = mixture(1)
    one = fs.log_likelihood(velocity, x1, nfe=60, generator=torch.Generator())
    exact = fs.log_likelihood(velocity, x1, nfe=60, exact=True)
    torch.testing.assert_close(one.log_density, exact.log_density)


def test_a_probe_is_fixed_for_the_whole_solve():
    # Rotation in a plane has no divergence, but z·Jz is 0 only for the signs' own reasons; with
    # J = [[0, 1], [1, 0]] it is ±2 at every time, so a fixed probe gives exactly ±2 in all.
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    x1 = torch.zeros(50, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = fs.log_likelihood(lambda t, x: x @ swap, x1, nfe=8, generator=generator)
    change = found.log_density + math.log(2 * math.pi)
    torch.testing.assert_close(change.abs(), torch.full_like(change, 2.0))
    assert len(change.sign().unique()) == 2


@pytest.mark.parametrize("solver", ["euler", "rk4", "ab2", "pec2"])
@pytest.mark.parametrize("schedule", [fs.uniform(), fs.shift(3.0), fs.logistic(4.0, 0.7)], ids=str)
def test_a_linear_flow_has_a_gaussians_density(solver, schedule):
    # dx/dt = A x maps N(0, 1) to N(0, e^A e^Aᵀ).
    matrix = 0.3 * torch.randn(
        3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    whole = torch.linalg.matrix_exp(matrix)
    data = MultivariateNormal(torch.zeros(3, dtype=torch.float64), whole @ whole.T)
    x1 = torch.randn(5, 3, dtype=torch.float64)
    found = fs.log_likelihood(
        lambda t, x: x @ matrix.T, x1, nfe=400, solver=solver, schedule=schedule, exact=True
    )
    tolerance = 2e-2 if solver == "euler" else 1e-4
    torch.testing.assert_close(found.log_density, data.log_prob(x1), atol=tolerance, rtol=0)


def test_times_are_those_of_sampling_read_backwards():
    seen = []

    def velocity(t, x):
        seen.append(t.item())
        return 0 * x

    x1 = torch.zeros(1, 2, dtype=torch.float64)
    grid = fs.from_times([0, 0.1, 0.5, 1])
    fs.log_likelihood(velocity, x1, nfe=3, solver="euler", schedule=grid, exact=True)
    assert seen == pytest.approx([1.0, 0.5, 0.1])


def test_shape_dtype_prior_and_grad_mode():
    x1 = torch.randn(4, 3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    prior = Independent(Normal(torch.ones(3, 2, 2), 2.0), 3)
    found = fs.log_likelihood(
        lambda t, x: torch.ones_like(x), x1, nfe=4, generator=generator, prior=prior.log_prob
    )
    torch.testing.assert_close(found.log_density, prior.log_prob(x1 - 1))
    torch.testing.assert_close(found.x0, x1 - 1)
    half = fs.log_likelihood(lambda t, x: x, x1.bfloat16(), nfe=4, generator=generator)
    assert (half.log_density.dtype, half.x0.dtype) == (torch.float32, torch.float32)
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        found = fs.log_likelihood(lambda t, x: weight * x, x1, nfe=4, generator=generator)
    assert not found.log_density.requires_grad


@pytest.mark.parametrize(
    ("x1", "options", "message"),
    [
        (torch.ones(2, 2).int(), {}, "floating point"),
        (torch.tensor(1.0), {}, "batch"),
        (torch.ones(2, 2), {"probes": 0, "generator": torch.Generator()}, "probes"),
        (torch.ones(2, 2), {}, "exact=True"),
        (torch.ones(2, 2, device="meta"), {"generator": torch.Generator()}, "on meta"),
        (torch.ones(2, 2), {"solver": "dpm2m", "exact": True}, "noise to data only"),
        (torch.ones(2, 2), {"solver": "midpiont", "exact": True}, "closest first: midpoint"),
        (torch.ones(2, 2), {"nfe": 0, "exact": True}, "nfe"),
        (torch.ones(2, 2), {"nfe": 9, "atol": 1e-3, "exact": True}, "of a budget"),
        (torch.ones(2, 2), {"rtol": 1e-3, "exact": True}, "needs atol"),
        (torch.ones(2, 2), {"atol": -1.0, "exact": True}, "rtol and atol must be finite"),
        (torch.ones(2, 2), {"atol": 1e-3, "solver": "rk4", "exact": True}, "unknown pair"),
    ],
)
def test_bad_settings_are_refused(x1, options, message):
    with pytest.raises(ValueError, match=message):
        fs.log_likelihood(lambda t, x: x, x1, **options)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        fs.log_likelihood(lambda t, x: x[:1], torch.ones(2, 2), exact=True)
