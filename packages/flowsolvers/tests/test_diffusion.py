"""Sampling with noise: SiT's coefficients, and marginals of a mixture."""

import math
from contextlib import ExitStack

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowsolvers as fs

FORMS = ["constant", "sigma", "sbdm", "decreasing", "increasing-decreasing"]
LAST = ["mean", "euler", "tweedie"]


@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.95])
def test_coefficients_are_sits_on_the_linear_path(t):
    expected = {
        "constant": 0.7,
        "sigma": 0.7 * (1 - t),
        "sbdm": 0.7 * (1 - t) / t,
        "decreasing": 0.25 * (0.7 * math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": 0.7 * math.sin(math.pi * t) ** 2,
    }
    assert sorted(expected) == sorted(FORMS)
    for form, value in expected.items():
        assert fs.diffusion_coefficient(form, t, 0.7) == pytest.approx(value, rel=1e-12)


def test_sbdm_on_the_vp_path_is_half_the_rate_of_noising():
    # dx = -β/2·x ds + √β dW in Song et al., and 2w = β: √(2w) dW here.
    path = fs.VP()
    for t in (0.1, 0.6, 0.9):
        beta = 0.1 + (1 - t) * (20 - 0.1)
        assert fs.diffusion_coefficient("sbdm", t, path=path) == pytest.approx(beta / 2, rel=1e-9)


def test_ends():
    assert fs.diffusion_coefficient("sbdm", 0.0) == math.inf
    assert fs.diffusion_coefficient("sbdm", 0.0, 0.0) == 0.0
    assert fs.diffusion_coefficient("sbdm", 1.0) == fs.diffusion_coefficient("sigma", 1.0) == 0.0


def mixture(path=None):
    """Eight Gaussians on a ring: the velocity on a path, and exact samples."""
    path = path or fs.Linear()
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = 1.35 * torch.stack([angles.cos(), angles.sin()], 1)
    variance = 0.15**2

    def velocity(t, x):
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = alpha**2 * variance + sigma**2
        offset = x[:, None] - alpha * means
        share = (-offset.square().sum(-1) / (2 * total)).softmax(-1)[..., None]
        data = (share * (means + alpha * variance / total * offset)).sum(1)
        noise = (share * (sigma / total * offset)).sum(1)
        return path.alpha_dot(t) * data + path.sigma_dot(t) * noise

    def draw(n, generator):
        which = torch.randint(8, (n,), generator=generator)
        noise = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        return means[which] + math.sqrt(variance) * noise

    return velocity, draw


def sliced_w2(a, b):
    angles = torch.arange(64, dtype=torch.float64) * math.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    gap = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return gap.square().mean().sqrt().item()


@pytest.mark.parametrize("form", FORMS)
def test_marginals_are_the_mixtures(form):
    velocity, draw = mixture()
    floor = ours = 0.0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.randn(4096, 2, dtype=torch.float64, generator=generator)
        x1 = fs.sample_sde(velocity, x0, nfe=250, form=form, generator=generator)
        a, b = draw(4096, generator), draw(4096, generator)
        ours, floor = ours + sliced_w2(x1, a), floor + sliced_w2(b, a)
    assert ours < 1.15 * floor


@pytest.mark.parametrize("path", [fs.GVP(), fs.VP()], ids=str)
@pytest.mark.parametrize("last_step", LAST)
def test_other_paths_and_last_steps_reach_the_same_data(path, last_step):
    velocity, draw = mixture(path)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4096, 2, dtype=torch.float64, generator=generator)
    options = {"path": path, "last_step": last_step, "last_size": 0.01}
    x1 = fs.sample_sde(velocity, x0, nfe=300, generator=generator, **options)
    a, b = draw(4096, generator), draw(4096, generator)
    assert sliced_w2(x1, a) < 1.5 * sliced_w2(a, b) + 0.02


def test_without_noise_it_is_eulers_method():
    velocity, _ = mixture()
    x0 = torch.randn(8, 2, dtype=torch.float64)
    generator = torch.Generator()
    schedule = fs.from_times([0, 0.2, 0.5, 1])
    x = fs.sample_sde(
        velocity, x0, nfe=4, scale=0.0, generator=generator, schedule=schedule, last_step="euler"
    )
    grid = fs.from_times([0, 0.96 * 0.2, 0.96 * 0.5, 0.96, 1])
    expected = fs.solve(velocity, x0, nfe=4, solver="euler", schedule=grid).x
    torch.testing.assert_close(x, expected)


def test_on_the_linear_path_tweedies_step_is_eulers():
    velocity, _ = mixture()
    x0 = torch.randn(8, 2, dtype=torch.float64)

    def sample(last_step):
        generator = torch.Generator().manual_seed(1)
        return fs.sample_sde(velocity, x0, nfe=9, generator=generator, last_step=last_step)

    torch.testing.assert_close(sample("tweedie"), sample("euler"))
    assert not torch.equal(sample("mean"), sample("euler"))


@pytest.mark.parametrize("nfe", [1, 2, 7])
def test_the_budget_is_met_and_the_context_is_given(nfe):
    seen = []

    @fs.contextual
    def velocity(t, x, *, context=None):
        assert t.item() == pytest.approx(context.t)
        assert x.dtype == torch.bfloat16
        seen.append(context)
        return x

    generator = torch.Generator().manual_seed(0)
    x0 = torch.ones(3, dtype=torch.bfloat16)
    x1 = fs.sample_sde(velocity, x0, nfe=nfe, generator=generator)
    assert x1.dtype == torch.float32
    assert [one.evaluation for one in seen] == list(range(nfe))
    assert [one.is_last for one in seen] == [False] * (nfe - 1) + [True]
    assert seen[-1].t_next == 1.0
    assert x0.tolist() == [1.0] * 3


def test_the_loop_reads_nothing_from_the_device():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func), "the host reads a tensor"
            return func(*args, **(kwargs or {}))

    with ExitStack() as stack:

        def velocity(t, x):
            if not calls:  # the table of weights is made before
                stack.enter_context(Watch())
            calls.append(t)
            return x * t

        calls = []
        fs.sample_sde(velocity, torch.ones(3), nfe=9, generator=torch.Generator())
    assert len(calls) == 9


def test_one_seed_gives_one_sample():
    velocity, _ = mixture()
    x0 = torch.randn(8, 2, dtype=torch.float64)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return fs.sample_sde(velocity, x0, nfe=9, generator=generator)

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))


def test_noise_may_come_from_a_function():
    velocity, _ = mixture()
    x0 = torch.randn(8, 2, dtype=torch.float64)
    source = torch.Generator().manual_seed(3)

    def noise(x):
        return torch.randn(x.shape, generator=source, dtype=x.dtype)

    ours = fs.sample_sde(velocity, x0, nfe=9, generator=noise)
    assert torch.equal(
        ours, fs.sample_sde(velocity, x0, nfe=9, generator=torch.Generator().manual_seed(3))
    )


@pytest.mark.parametrize("start", [0.001, 0.4])
def test_it_may_start_at_any_time(start):
    """From x_t itself, the marginals further on are the mixture's."""
    velocity, draw = mixture()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4096, 2, dtype=torch.float64, generator=generator)
    begin = start * draw(4096, generator) + (1 - start) * x0
    times = []

    def noted(t, x):
        times.append(t.item())
        return velocity(t, x)

    x1 = fs.sample_sde(noted, begin, nfe=100, generator=generator, start=start)
    a, b = draw(4096, generator), draw(4096, generator)
    assert sliced_w2(x1, a) < 1.5 * sliced_w2(a, b) + 0.02
    assert times[0] == pytest.approx(start)
    assert len(times) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe"),
        ({"form": "sigmoid"}, "closest first: sigma"),
        ({"scale": -1.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"last_step": "mena"}, "closest first: mean"),
        ({"last_size": 0.0}, "last_size"),
        ({"start": 0.96}, "start must be in"),
        ({"start": -0.1}, "start must be in"),
        ({"generator": lambda x: x[:1]}, r"noise returned shape \(1,\)"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fs.sample_sde(
            lambda t, x: x, torch.ones(2), **{"nfe": 5, "generator": torch.Generator(), **options}
        )


def test_bad_states_are_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="floating point"):
        fs.sample_sde(lambda t, x: x, torch.ones(2).int(), nfe=2, generator=generator)
    with pytest.raises(ValueError, match=r"torch.Generator\('meta'\)"):
        fs.sample_sde(lambda t, x: x, torch.ones(2, device="meta"), nfe=2, generator=generator)
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        fs.sample_sde(lambda t, x: x[:1], torch.ones(2), nfe=2, generator=generator)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        fs.diffusion_coefficient("sigma", 1.5)
