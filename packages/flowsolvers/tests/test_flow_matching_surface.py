"""The surface of flow_matching's ODESolver: against torchdiffeq, and a Gaussian's closed form."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from flowsolvers.adapters.flow_matching import ODESolver

METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def _model(x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
    return torch.cos(2.0 * x) * (0.3 + t) - scale * x


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _peer(x: Tensor, times: Tensor, method: str, **options: float) -> Tensor:
    peer = pytest.importorskip("torchdiffeq", reason="the peer is torchdiffeq")
    return peer.odeint(lambda t, y: _model(y, t), x, times, method=method, options=options)


@pytest.mark.parametrize(
    "grid",
    [[0.0, 0.1, 0.4, 0.5, 1.0], [1.0, 0.7, 0.0], [0.25, 0.5, 0.75], [0.9, 0.3]],
    ids=["forward", "backward", "part", "part backward"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_grid_it_equals_torchdiffeq(method, dtype, tolerance, grid) -> None:
    x, times = _noise(5, 3).to(dtype), torch.tensor(grid, dtype=dtype)
    solver = ODESolver(_model)
    expected = _peer(x, times, method)
    found = solver.sample(x, method=method, time_grid=times, return_intermediates=True)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(solver.sample(x, method=method, time_grid=times), found[-1])
    assert torch.equal(solver.sample(x, method=method, time_grid=times.tolist()), found[-1])


@pytest.mark.parametrize("step_size", [0.1, 0.05, 0.3, 0.125, 2.0])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_with_a_step_size_it_equals_torchdiffeq(method, backward, step_size) -> None:
    """0.3 leaves a shorter last step, 2.0 is longer than the interval."""
    x = _noise(5, 3).double()
    times = torch.tensor([1.0, 0.0] if backward else [0.0, 1.0], dtype=torch.float64)
    expected = _peer(x, times, method, step_size=step_size)[-1]
    found = ODESolver(_model).sample(x, step_size, method, time_grid=times)
    assert (found - expected).abs().max() <= 1e-12


ADAPTIVE = ["dopri5", "bosh3", "tsit5", "dopri8"]


def _adaptive_peer(x: Tensor, times: Tensor, method: str, tolerance: float) -> Tensor:
    peer = pytest.importorskip("torchdiffeq", reason="the peer is torchdiffeq")
    flow = lambda t, y: _model(y, t)  # noqa: E731
    return peer.odeint(flow, x, times, method=method, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", [[0.0, 0.1, 0.45, 1.0], [1.0, 0.7, 0.0], [0.2, 0.9]])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_to_a_tolerance_it_is_as_near_to_the_solution_as_torchdiffeq(
    method, tolerance, grid
) -> None:
    x, times = _noise(5, 3).double(), torch.tensor(grid, dtype=torch.float64)
    exact = _peer(x, times, "rk4", step_size=1e-3)
    peer = _adaptive_peer(x, times, "dopri5" if method == "tsit5" else method, tolerance)
    found = ODESolver(_model).sample(
        x, None, method, tolerance, tolerance, times, return_intermediates=True
    )
    assert torch.equal(found[0], x)
    error, theirs = ((one - exact).abs().max().item() for one in (found, peer))
    assert error < max(5 * tolerance, 2 * theirs)


def test_dopri5_takes_the_steps_that_torchdiffeq_takes_but_for_the_last() -> None:
    x = _noise(5, 3).double()
    times = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    expected = _adaptive_peer(x, times, "dopri5", 1e-7)
    found = ODESolver(_model).sample(x, None, "dopri5", 1e-7, 1e-7, times, True)
    assert (found - expected)[:-3].abs().max() < 1e-13
    assert (found - expected)[-3:].abs().max() < 1e-6


@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_flow_through_adaptive_methods_when_asked_for(method) -> None:
    x = _noise(2, 3).double().requires_grad_()
    solver = ODESolver(_model)
    assert not solver.sample(x, method=method).requires_grad
    solver.sample(x, method=method, atol=1e-9, rtol=1e-9, enable_grad=True).sum().backward()
    y = x.detach().clone().requires_grad_()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    _peer(y, times, "rk4", step_size=1e-3)[-1].sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad - y.grad).abs().max() < 1e-7


def test_a_step_size_for_an_adaptive_method_is_said_to_be_idle() -> None:
    x = _noise(2, 3)
    with pytest.warns(UserWarning, match="step_size is of no use"):
        found = ODESolver(_model).sample(x, 0.1, "dopri5")
    assert torch.equal(found, ODESolver(_model).sample(x, method="dopri5"))


def test_intermediate_states_are_states_of_the_solution() -> None:
    x, grid = _noise(4, 3), torch.tensor([0.0, 0.33, 1.0])
    found = ODESolver(_model).sample(x, 0.01, "rk4", time_grid=grid, return_intermediates=True)
    expected = _peer(x.double(), grid.double(), "rk4", step_size=0.01)
    assert found.shape == (3, 4, 3)
    assert (found - expected).abs().max() < 1e-6


def test_extras_reach_the_model_and_evaluations_are_the_stages() -> None:
    for method, stages in METHODS.items():
        seen: list[tuple[torch.Size, float]] = []

        def model(x: Tensor, t: Tensor, *, scale: float, log: list) -> Tensor:
            log.append((t.shape, scale))
            return -scale * x

        ODESolver(model).sample(_noise(2, 3), 0.25, method, scale=0.5, log=seen)
        assert seen == [(torch.Size([]), 0.5)] * (4 * stages)


def test_gradients_flow_when_asked_for() -> None:
    x = _noise(2, 3).requires_grad_()
    solver = ODESolver(_model)
    assert not solver.sample(x, 0.1, "midpoint").requires_grad
    solver.sample(x, 0.1, "midpoint", enable_grad=True).sum().backward()
    y = x.detach().clone().requires_grad_()
    _peer(y, torch.tensor([0.0, 1.0]), "midpoint", step_size=0.1)[-1].sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad - y.grad).abs().max() < 1e-5


def test_the_dtype_of_the_state_comes_back() -> None:
    for dtype, whole, method in product(
        (torch.bfloat16, torch.float64), (False, True), ("euler", "dopri5")
    ):
        found = ODESolver(_model).sample(
            _noise(2, 3).to(dtype), method=method, return_intermediates=whole
        )
        assert found.dtype == dtype
        assert found.shape == ((2, 2, 3) if whole else (2, 3))


#: Data N(m, s²) in 3 dimensions; x_t = (1 - t)·noise + t·data.
_MEAN, _DEVIATION = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([0.7, 0.4, 1.3]).double()


def _gaussian(x: Tensor, t: Tensor) -> Tensor:
    variance = (t * _DEVIATION) ** 2 + (1.0 - t) ** 2
    return _MEAN + (t * _DEVIATION**2 - (1.0 - t)) / variance * (x - t * _MEAN)


def _standard(x: Tensor) -> Tensor:
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))


@pytest.mark.parametrize(("method", "tolerance"), [("midpoint", 2e-3), ("rk4", 1e-6)])
def test_the_likelihood_of_a_gaussian_is_its_density(method, tolerance) -> None:
    x_1 = _MEAN + _DEVIATION * _noise(64, 3).double()
    expected = torch.distributions.Normal(_MEAN, _DEVIATION).log_prob(x_1).sum(-1)
    solver = ODESolver(_gaussian)
    x_0, log_p = solver.compute_likelihood(
        x_1, _standard, step_size=0.02, method=method, exact_divergence=True
    )
    assert (log_p - expected).abs().max() < tolerance
    assert (x_0 - (x_1 - _MEAN) / _DEVIATION).abs().max() < tolerance


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_adaptive_likelihood_is_within_its_tolerance(method, tolerance) -> None:
    x_1 = _MEAN + _DEVIATION * _noise(64, 3).double()
    expected = torch.distributions.Normal(_MEAN, _DEVIATION).log_prob(x_1).sum(-1)
    states, log_p = ODESolver(_gaussian).compute_likelihood(
        x_1,
        _standard,
        method=method,
        atol=tolerance,
        rtol=tolerance,
        time_grid=[1.0, 0.4, 0.0],
        return_intermediates=True,
        exact_divergence=True,
    )
    assert (log_p - expected).abs().max() < 30 * tolerance
    assert states.shape == (3, 64, 3)
    assert (states[-1] - (x_1 - _MEAN) / _DEVIATION).abs().max() < 30 * tolerance


def test_an_estimated_likelihood_follows_torchs_seed() -> None:
    x_1 = _MEAN + _DEVIATION * _noise(64, 3).double()
    expected = torch.distributions.Normal(_MEAN, _DEVIATION).log_prob(x_1).sum(-1)
    found: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(ODESolver(_gaussian).compute_likelihood(x_1, _standard, 0.02, method="rk4")[1])
    assert torch.equal(*found)
    # the Jacobian is diagonal here, so that signs give its trace exactly
    assert (found[0] - expected).abs().max() < 1e-5


def test_a_likelihood_gives_its_intermediate_states() -> None:
    x_1, grid = _noise(8, 3).double(), [1.0, 0.6, 0.25, 0.0]
    solver = ODESolver(_gaussian)
    states, log_p = solver.compute_likelihood(
        x_1,
        _standard,
        step_size=0.05,
        method="heun3",
        time_grid=grid,
        return_intermediates=True,
        exact_divergence=True,
    )
    expected = solver.sample(
        x_1, step_size=0.05, method="heun3", time_grid=grid, return_intermediates=True
    )
    assert log_p.shape == (8,)
    assert (states - expected).abs().max() < 1e-12


def test_errors_say_what_to_do() -> None:
    solver, x = ODESolver(_model), _noise(2, 3)
    with pytest.raises(ValueError, match="unknown method 'dopri6'; accepted, closest first: dop"):
        solver.sample(x, method="dopri6")
    with pytest.raises(ValueError, match="accepted, closest first: heun2, heun3"):
        solver.sample(x, method="heun")
    with pytest.raises(ValueError, match="unknown method 'dopri6'"):
        solver.compute_likelihood(x, _standard, method="dopri6")
    with pytest.raises(ValueError, match="step_size must be greater than 0"):
        solver.sample(x, step_size=0.0)
    for grid in ([0.0], [0.0, 0.5, 0.4], [0.0, 2.0], [0.0, 0.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match="time_grid must be at least two times"):
            solver.sample(x, time_grid=grid)
    with pytest.raises(ValueError, match="from 1 to 0"):
        solver.compute_likelihood(x, _standard, time_grid=[0.0, 1.0])
    with pytest.raises(ValueError, match="no gradient"):
        solver.compute_likelihood(x, _standard, enable_grad=True)
