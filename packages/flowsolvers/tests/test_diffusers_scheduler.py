"""FlowScheduler against diffusers' own Euler, and against `solve`."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import flowsolvers as fs

pytest.importorskip("diffusers")

from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from flowsolvers.adapters.diffusers import FlowScheduler

#: Settings of FlowMatchEulerDiscreteScheduler, and mu.
SHIFTS = {
    "none": ({}, None),
    "static 3": ({"shift": 3.0}, None),
    "static 1.15": ({"shift": 1.15}, None),
    "exponential": ({"use_dynamic_shifting": True}, 0.63),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.3),
    "terminal": ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, 0.9),
}


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
    """What a model of diffusers might give: minus a velocity."""
    return torch.cos(2.0 * sample) * (0.3 + timestep / 1000) - 0.5 * sample


def _velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return -_model(x, 1000.0 * (1.0 - t))


def _run(scheduler: FlowScheduler, x: torch.Tensor, timesteps: torch.Tensor | None = None):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(_model(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("uneven", [False, True], ids=["even sigmas", "uneven sigmas"])
@pytest.mark.parametrize("steps", [2, 3, 8, 28, 50])
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_equals_flow_match_euler_bit_for_bit(shift, steps, uneven) -> None:
    settings, mu = SHIFTS[shift]
    generator = torch.Generator().manual_seed(steps)
    sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
    if uneven:
        sigmas = torch.rand(steps, generator=generator).sort(descending=True)[0].tolist()
    theirs = FlowMatchEulerDiscreteScheduler(**settings)
    ours = FlowScheduler.from_config(theirs.config, solver="euler")
    theirs.set_timesteps(sigmas=sigmas, mu=mu)
    ours.set_timesteps(sigmas=sigmas, mu=mu)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = torch.randn(2, 4, 8, 8, generator=generator)
    for t in theirs.timesteps:
        output = torch.randn(2, 4, 8, 8, generator=generator)
        x = theirs.step(output, t, x).prev_sample
        y = ours.step(output, t, y).prev_sample
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["uniform", "sigmoid", "karras", "lumina-sigmoid"])
def test_euler_on_our_grids_equals_flow_match_euler_at_the_same_sigmas(name) -> None:
    ours = FlowScheduler(solver="euler", schedule=name, shift=2.0)
    ours.set_timesteps(17)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=ours.sigmas[:-1].tolist())
    x = y = _noise(3, 16)
    for t in theirs.timesteps:
        x = theirs.step(_model(x, t), t, x).prev_sample
        y = ours.step(_model(y, t), t, y).prev_sample
    assert torch.equal(x, y)


def test_without_sigmas_the_shift_is_applied_once() -> None:
    scheduler = FlowScheduler(solver="euler", shift=3.0)
    scheduler.set_timesteps(10)
    expected = 1.0 - torch.tensor(fs.shift(3.0).grid(10))
    assert (scheduler.sigmas - expected).abs().max() < 1e-7
    assert scheduler.sigmas[0] == 1.0
    assert scheduler.sigmas[-1] == 0.0


@pytest.mark.parametrize("nfe", [1, 5, 12])
@pytest.mark.parametrize("solver", fs.solvers())
def test_every_solver_spends_its_steps_and_arrives_where_solve_does(solver, nfe) -> None:
    scheduler = FlowScheduler(solver=solver, schedule="cosine", shift=2.0)
    scheduler.set_timesteps(nfe)
    assert len(scheduler.timesteps) == scheduler.plan.nfe == nfe
    x = _noise(2, 16).double()
    found = _run(scheduler, x)
    expected = fs.solve(_velocity, x, plan=scheduler.plan).x
    # the model is told float32 times here, float64 ones there
    assert (found - expected).abs().max() < 1e-5
    assert scheduler.step_index == nfe


@pytest.mark.parametrize("solver", ["midpoint", "pec2", "rk4"])
def test_given_sigmas_are_the_grid(solver) -> None:
    sigmas = [1.0, 0.9, 0.7, 0.65, 0.4, 0.3, 0.2, 0.05]
    scheduler = FlowScheduler(solver=solver)
    scheduler.set_timesteps(sigmas=sigmas)
    assert len(scheduler.timesteps) == 8
    times = [1.0 - torch.tensor(sigma).item() for sigma in sigmas] + [1.0]
    expected = fs.plan(solver, nfe=8, schedule=fs.from_times(times))
    rows = [row.t for step in expected.steps for row in step.rows]
    assert [1.0 - level for level in scheduler._levels] == pytest.approx(rows, abs=1e-12)


def test_a_loop_may_begin_below_pure_noise() -> None:
    scheduler = FlowScheduler(solver="midpoint")
    scheduler.set_timesteps(sigmas=[0.5, 0.4, 0.2, 0.1])
    assert scheduler.plan.steps[0].t == pytest.approx(0.5)
    assert scheduler.timesteps[0] == 500.0


def test_even_sigmas_give_way_to_the_configured_schedule() -> None:
    """Flux and Lumina-2 pass them when nobody asked for any."""
    scheduler = FlowScheduler(solver="euler", schedule="cosine", use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=0.8)
    expected = 1.0 - torch.tensor((fs.shift(np.exp(0.8)) @ fs.cosine()).grid(7))
    assert (scheduler.sigmas - expected).abs().max() < 1e-6
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.3], mu=0.0)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.8, 0.3, 0.0])


def test_timesteps_are_taken_after_the_shift_and_not_rounded() -> None:
    scheduler = FlowScheduler(solver="euler", shift=3.0)
    scheduler.set_timesteps(timesteps=[1000.0, 954.25, 300.5])
    assert scheduler.timesteps.tolist() == pytest.approx([1000.0, 954.25, 300.5], abs=1e-4)


@pytest.mark.parametrize("begin", [1, 3, 4, 6])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "pec2", "unipc2", "ab3", "heun"])
def test_a_later_beginning_is_a_clean_start(solver, begin) -> None:
    scheduler = FlowScheduler(solver=solver)
    scheduler.set_timesteps(8)
    timesteps = scheduler.timesteps[begin:]
    scheduler.set_begin_index(begin)
    assert scheduler.begin_index == begin
    x = _noise(2, 16)
    found = _run(scheduler, x, timesteps)
    start = 1.0 - timesteps[0].item() / 1000
    # a fine solution from there
    fine = fs.Plan("rk4", "fine", fs.method("rk4").lay_out(200, _span(start)))
    error = (found - fs.solve(_velocity, x, plan=fine).x).abs().max()
    euler = fs.Plan("euler", "rest", fs.method("euler").lay_out(8 - begin, _span(start)))
    coarse = (
        (fs.solve(_velocity, x, plan=euler).x - fs.solve(_velocity, x, plan=fine).x).abs().max()
    )
    assert error <= 1.6 * coarse
    if solver == "pec2" and begin < 6:
        assert error < 0.4 * coarse


def _span(start: float):
    def grid(n: int) -> tuple[float, ...]:
        return (*(start + (1.0 - start) * i / n for i in range(n)), 1.0)

    return grid


def test_the_first_timestep_is_looked_up_when_no_index_is_set() -> None:
    by_index, by_value = FlowScheduler(solver="pec2"), FlowScheduler(solver="pec2")
    x = _noise(2, 16)
    for scheduler in (by_index, by_value):
        scheduler.set_timesteps(8)
    by_index.set_begin_index(3)
    a = _run(by_index, x, by_index.timesteps[3:])
    assert torch.equal(a, _run(by_value, x, by_value.timesteps[3:]))


def test_the_state_stays_float32_in_a_bfloat16_pipeline() -> None:
    x = _noise(4, 64)
    errors: dict[str, float] = {}
    for steps in (30, 100):
        ours = FlowScheduler(solver="euler")
        theirs = FlowMatchEulerDiscreteScheduler()
        exact = fs.solve(_velocity, x.double(), nfe=steps, solver="euler").x
        for name, scheduler in (("ours", ours), ("theirs", theirs)):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
            y = x.bfloat16()
            for t in scheduler.timesteps:
                y = scheduler.step(_model(y, t).bfloat16(), t, y).prev_sample
                assert y.dtype == torch.bfloat16
            errors[f"{name} {steps}"] = (y.double() - exact).square().mean().sqrt().item()
    assert errors["ours 30"] < 0.5 * errors["theirs 30"]
    assert errors["ours 100"] < 0.5 * errors["theirs 100"]
    assert errors["ours 100"] < 1.5 * errors["ours 30"]  # does not grow with the steps


def _masked(x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(x)
    mask[:, ::2] = 1.0
    return mask * 0.25 + (1.0 - mask) * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_values_are_taken_and_others_keep_their_precision(dtype) -> None:
    """A mask as of inpainting, whose free half must not see that its sample was rebuilt."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return _model(x.float(), t).to(dtype)

    free, masked = FlowScheduler(solver="pec2"), FlowScheduler(solver="pec2")
    for scheduler in (free, masked):
        scheduler.set_timesteps(9)
    x = y = _noise(2, 16).to(dtype)
    for t in free.timesteps:
        x = free.step(model(x, t), t, x).prev_sample
        y = _masked(masked.step(model(y, t), t, y).prev_sample)
    assert torch.equal(x[:, 1::2], y[:, 1::2])
    assert (y[:, ::2] == 0.25).all()


def test_euler_with_replaced_values_equals_flow_match_euler() -> None:
    ours, theirs = FlowScheduler(solver="euler"), FlowMatchEulerDiscreteScheduler()
    x = y = _noise(2, 16)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2])
    for i, t in enumerate(ours.timesteps):
        x = ours.step(_model(x, t), t, x).prev_sample
        y = theirs.step(_model(y, t), t, y).prev_sample
        if i == 1:
            x, y = x + 1.0, y + 1.0
        if i == 2:  # in place
            x *= 0.5
            y *= 0.5
    assert torch.equal(x, y)


def test_inference_mode_and_values_written_in_place() -> None:
    ours, theirs = FlowScheduler(solver="euler"), FlowMatchEulerDiscreteScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2])
    with torch.inference_mode():
        x, y = _noise(2, 16), _noise(2, 16)
        for t in ours.timesteps:
            x = ours.step(_model(x, t), t, x).prev_sample
            y = theirs.step(_model(y, t), t, y).prev_sample
            x[:, 3] = 0.1
            y[:, 3] = 0.1
    assert torch.equal(x, y)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "pec2", "unipc3"])
def test_no_step_waits_for_the_device(solver) -> None:
    """Tensors without values: whatever reads one on the host raises."""
    scheduler = FlowScheduler(solver=solver)
    scheduler.set_timesteps(6, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 16, dtype=torch.bfloat16, device="meta")
    data = torch.empty_like(x)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
        x = 0.5 * x + 0.5 * scheduler.scale_noise(data, t, data)
    assert x.dtype == torch.bfloat16


def test_a_model_may_overwrite_what_it_returned() -> None:
    plain, reused = FlowScheduler(solver="ab2"), FlowScheduler(solver="ab2")
    x = y = _noise(2, 16)
    buffer = torch.empty(2, 16)
    for scheduler in (plain, reused):
        scheduler.set_timesteps(6)
    for t in plain.timesteps:
        x = plain.step(_model(x, t), t, x).prev_sample
        y = reused.step(buffer.copy_(_model(y, t)), t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("begin", [None, 0, 4])
def test_scale_noise_equals_flow_match_euler(begin) -> None:
    ours = FlowScheduler(solver="euler", shift=3.0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    data, noise = _noise(3, 4, 8, 8, seed=1), _noise(3, 4, 8, 8, seed=2)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 10).tolist())
        if begin is not None:
            scheduler.set_begin_index(begin)
    at = ours.timesteps[4:5].repeat(3) if begin is None else ours.timesteps[begin : begin + 1]
    a, b = ours.scale_noise(data, at, noise), theirs.scale_noise(data, at, noise)
    # without an index ours divides the timestep, theirs looks it up
    assert torch.equal(a, b) if begin is not None else (a - b).abs().max() < 1e-6
    assert torch.equal(ours.add_noise(data, noise, at), a)


def test_scale_noise_takes_a_level_for_each_sample_in_training() -> None:
    scheduler = FlowScheduler(shift=3.0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(scheduler.timesteps, theirs.timesteps)
    assert torch.equal(scheduler.sigmas, theirs.sigmas)
    assert (scheduler.sigma_min, scheduler.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    data, noise = _noise(3, 4, 8, seed=1), _noise(3, 4, 8, seed=2)
    at = theirs.timesteps[[10, 500, 900]]
    a, b = scheduler.scale_noise(data, at, noise), theirs.scale_noise(data, at, noise)
    assert (a - b).abs().max() < 1e-6


def test_it_is_saved_and_loaded(tmp_path) -> None:
    settings = {"solver": "unipc2", "schedule": "sigmoid:0.5,4,8", "shift": 2.5}
    FlowScheduler(**settings).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert settings.items() <= written.items()
    loaded = FlowScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(7)
    assert loaded.plan == _planned(FlowScheduler(**settings), 7)
    back = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    assert back.shift == 2.5


def _planned(scheduler: FlowScheduler, nfe: int) -> fs.Plan:
    scheduler.set_timesteps(nfe)
    return scheduler.plan


def test_the_folder_of_another_scheduler_is_read(tmp_path) -> None:
    FlowMatchEulerDiscreteScheduler(shift=3.0, max_shift=1.3).save_pretrained(tmp_path)
    loaded = FlowScheduler.from_pretrained(tmp_path, solver="pec1")
    config = loaded.config
    assert (config.solver, config.shift, config.max_shift) == ("pec1", 3.0, 1.3)


def test_a_solvers_own_grid_goes_before_even_sigmas(monkeypatch) -> None:
    def own(solver: str, *, nfe: int) -> fs.Plan:
        return fs.plan(solver, nfe=nfe, schedule=fs.cosine())

    monkeypatch.setattr("flowsolvers.adapters.diffusers.lay_out", own)
    scheduler = FlowScheduler(solver="euler", shift=2.0)
    for given in ({"num_inference_steps": 6}, {"sigmas": np.linspace(1.0, 1 / 6, 6)}):
        scheduler.set_timesteps(**given)
        assert scheduler.plan.schedule == "shift:2@cosine"
        assert scheduler.plan.steps[2].t == pytest.approx((fs.shift(2.0) @ fs.cosine())(1 / 3))


def test_the_shift_of_other_flow_schedulers_is_taken_over() -> None:
    for theirs in (
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ):
        ours = FlowScheduler.from_config(theirs.config, solver="pec2")
        assert (ours.config.shift, ours.config.solver) == (3.0, "pec2")
        back = type(theirs).from_config(ours.config)
        assert back.config.shift == 3.0 if "shift" in back.config else back.config.flow_shift == 3.0


def test_a_second_run_knows_nothing_of_the_first() -> None:
    scheduler = FlowScheduler(solver="pec3")
    x = _noise(2, 16)
    found: list[torch.Tensor] = []
    for _ in range(2):
        scheduler.set_timesteps(7)
        found.append(_run(scheduler, x))
    assert torch.equal(*found)


def test_it_has_what_pipelines_look_for() -> None:
    scheduler = FlowScheduler()
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.get("max_shift") == 1.15
    assert scheduler.step_index is None
    assert scheduler.begin_index is None


def test_errors_say_what_to_do() -> None:
    x = _noise(2, 4)
    with pytest.raises(ValueError, match="unknown solver 'midpiont'; accepted, closest first: mid"):
        FlowScheduler(solver="midpiont")
    with pytest.raises(ValueError, match="unknown schedule 'sigmid'"):
        FlowScheduler(schedule="sigmid")
    with pytest.raises(ValueError, match="shift must be finite and greater than 0"):
        FlowScheduler(shift=0.0)
    with pytest.raises(ValueError, match="'exponential' or 'linear'"):
        FlowScheduler(time_shift_type="square")
    scheduler = FlowScheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="needs num_inference_steps, sigmas or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="must fall from at most 1"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.6])
    with pytest.raises(ValueError, match="leave it out"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="must fall from at most 1"):
        scheduler.set_timesteps(sigmas=[1.5, 0.5])
    with pytest.raises(ValueError, match="must fall"):
        scheduler.set_timesteps(sigmas=[1.0, float("nan")])
    with pytest.raises(ValueError, match="one for each evaluation"):
        scheduler.set_timesteps(3, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="give one of them"):
        scheduler.set_timesteps(sigmas=[1.0], timesteps=[1000.0])
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="needs mu"):
        FlowScheduler(use_dynamic_shifting=True).set_timesteps(4)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 3 is not one of set_timesteps"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="must be one number"):
        scheduler.step(x, torch.tensor([1000.0, 1000.0]), x)
    with pytest.raises(ValueError, match="they must be the same"):
        scheduler.step(x, 1000.0, x[:1])
    scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="begin index 4 is not one of the 4 timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="does not come now"):
        for t in scheduler.timesteps[[0, 2]]:
            scheduler.step(x, t, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="all 4 evaluations are done"):
        for t in scheduler.timesteps[[0, 1, 2, 3, 3]]:
            scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="scale_noise needs noise"):
        scheduler.scale_noise(x, 1000.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"invert_sigmas": True}, "one way only"),
        ({"stochastic_sampling": True}, "sample_sde"),
        ({"use_karras_sigmas": True}, "schedule='karras'"),
    ],
)
def test_settings_without_a_part_here_are_refused(config, message) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    with pytest.raises(ValueError, match=message):
        FlowScheduler.from_config(theirs.config)
    without = dict.fromkeys(config, False)
    assert FlowScheduler.from_config(theirs.config, schedule="beta", **without)


def test_models_that_predict_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type 'epsilon'"):
        FlowScheduler.from_config(EulerDiscreteScheduler().config)


def test_a_folder_is_no_config(tmp_path) -> None:
    with pytest.raises(ValueError, match="read by from_pretrained"):
        FlowScheduler.from_config(str(tmp_path))


def test_without_diffusers_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import flowsolvers, flowsolvers.adapters\n"
        "import flowsolvers.adapters.diffusers"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: FlowScheduler needs diffusers" in run.stderr
    assert "pip install flowsolvers[diffusers]" in run.stderr


def test_importing_the_package_imports_none_of_it() -> None:
    code = "import flowsolvers, flowsolvers.adapters, sys; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
