"""Our solvers as a scheduler of diffusers, for its flow-matching pipelines.

diffusers counts noise, sigma = 1 - t, a timestep is 1000·sigma, and the model gives noise - data,
which is -velocity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from flowsolvers.adapters.walk import Walk, from_evaluation
from flowsolvers.layout import plan as lay_out
from flowsolvers.method import Grid
from flowsolvers.piecewise import from_times
from flowsolvers.plan import Plan
from flowsolvers.registry import method
from flowsolvers.schedules import Schedule, schedule, shift, terminal

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
except ImportError as error:
    raise ImportError(
        "FlowScheduler needs diffusers, which is not installed: pip install flowsolvers[diffusers]"
    ) from error

__all__ = ["FlowScheduler"]

#: What a scheduler without a name for its solver runs.
_SOLVER = "auto"

#: Settings of diffusers' schedulers that change the result and have no part here, and what has.
_REFUSED = {
    "invert_sigmas": "our time runs one way only; keep the pipeline's own scheduler",
    "stochastic_sampling": "set it to False, or see flowsolvers.sample_sde",
    "use_karras_sigmas": "set it to False and take schedule='karras'",
    "use_exponential_sigmas": "set it to False and take schedule='polyexponential'",
    "use_beta_sigmas": "set it to False and take schedule='beta'",
}

#: How schedulers that are not for flows alone say that they are, and their shift.
_ELSEWHERE = ("prediction_type", "use_flow_sigmas", "flow_shift")


class _Settings(Protocol):
    """What the config holds; diffusers types it as a dict."""

    solver: str
    schedule: str | None
    num_train_timesteps: int
    shift: float
    use_dynamic_shifting: bool
    time_shift_type: str
    shift_terminal: float | None


class FlowScheduler(SchedulerMixin, ConfigMixin):
    """Any solver of this package as the scheduler of a diffusers pipeline.

    The number of inference steps is the number of model evaluations, met exactly: a step of a
    Runge-Kutta method takes as many turns of the pipeline's loop as it has stages. The state is
    kept in float32 here, whatever the pipeline's dtype; where the pipeline or a callback puts
    other values into the sample, those are taken, and what a multistep method knows of the past
    is replaced there by the straight line through them. No step waits for the device.

    Args:
        solver: One of `flowsolvers.solvers()`.
        schedule: The time grid before the shift, as `flowsolvers.schedule` reads it; the solver's
            own when None.
        num_train_timesteps: Timesteps are sigma times this.
        shift: Factor of the static shift, greater than 0; 1 is none.
        use_dynamic_shifting: Whether to shift by the `mu` that the pipeline finds for the
            resolution, in place of `shift`.
        base_shift: What the pipeline finds mu from, as are the next three.
        max_shift: See `base_shift`.
        base_image_seq_len: See `base_shift`.
        max_image_seq_len: See `base_shift`.
        time_shift_type: "exponential" shifts by e^mu, "linear" by mu.
        shift_terminal: Noise level to leave to the last step; None leaves the grid as it is.

    Raises:
        ValueError: The solver or the schedule is unknown, or a number is out of range.

    Convention: The config's names and defaults are those of `FlowMatchEulerDiscreteScheduler`, so
        that `FlowScheduler.from_config(pipe.scheduler.config, solver="pec2")` takes over a
        pipeline's shift.

    Example:
        >>> scheduler = FlowScheduler(solver="euler", shift=3.0)
        >>> scheduler.set_timesteps(3)
        >>> [round(t, 3) for t in scheduler.timesteps.tolist()]
        [1000.0, 857.143, 600.0]
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        solver: str = _SOLVER,
        schedule: str | None = None,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        lay_out(solver, nfe=1)
        self._own_schedule(1)
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(
                f"time_shift_type must be 'exponential' or 'linear', got {time_shift_type!r}"
            )
        if not (math.isfinite(shift) and shift > 0.0):
            raise ValueError(f"shift must be finite and greater than 0, got {shift!r}")
        if shift_terminal:
            terminal(shift_terminal)
        # Until set_timesteps, what training draws from.
        counts = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32)
        levels = counts / num_train_timesteps
        self.sigmas: Tensor = levels if use_dynamic_shifting else self._shifted(levels, None)
        self.timesteps: Tensor = self.sigmas * num_train_timesteps
        self.sigma_min: float = self.sigmas[-1].item()
        self.sigma_max: float = self.sigmas[0].item()
        self.num_inference_steps: int | None = None
        self._plan: Plan | None = None
        self._restart()

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Make one that takes over the shift of another flow-matching scheduler.

        Args:
            config: `scheduler.config` of a pipeline, or what a scheduler has saved.
            return_unused_kwargs: Whether to return also what was not used.
            **kwargs: Arguments of the class, in place of the config's.

        Returns:
            The scheduler, or with `return_unused_kwargs` a tuple of it and a dict.

        Raises:
            ValueError: The config is none, is of a model that does not predict a velocity, or
                asks for what changes the result and has no part here.
        """
        if not isinstance(config, dict):
            raise ValueError(
                f"from_config takes a scheduler's config, got {config!r}; a folder is read by "
                f"from_pretrained"
            )
        _check_flow({**config, **kwargs})
        # Read or refused here; kept so that the pipeline's own scheduler can be made from ours.
        aside = {key: value for key, value in config.items() if key in (*_REFUSED, *_ELSEWHERE)}
        rest = {key: value for key, value in config.items() if key not in aside}
        if aside.get("use_flow_sigmas"):
            rest["shift"] = aside.get("flow_shift") or 1.0
        for key in _REFUSED:
            kwargs.pop(key, None)
        scheduler, unused = super().from_config(rest, True, **kwargs)
        scheduler.register_to_config(**aside)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    @property
    def plan(self) -> Plan:
        """The table that `set_timesteps` laid out; `print(pipe.scheduler.plan)` shows it."""
        if self._plan is None:
            raise ValueError("there is no plan yet; call set_timesteps first, as in (20)")
        return self._plan

    @property
    def step_index(self) -> int | None:
        """Evaluations taken in, counted from the first timestep; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Which timestep the loop begins with, if the pipeline said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say with which timestep the loop will begin.

        Args:
            begin_index: Index in `timesteps`. From there the solver is laid out anew, over the
                timesteps that are left, as for a state that was never anywhere else.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Iterable[float] | None = None,
        mu: float | None = None,
        timesteps: Iterable[float] | None = None,
    ) -> None:
        """Lay out the solver.

        Args:
            num_inference_steps: Model evaluations, at least 1. May be left out if numbers are
                given.
            device: Where to put `timesteps` and `sigmas`.
            sigmas: Noise levels before the shift, falling from at most 1, without the final 0.
                Even ones, which pipelines pass when nobody asked for others, stand back behind
                the configured schedule and a solver's own grid.
            mu: Of dynamic shifting; ignored without it.
            timesteps: Noise levels times `num_train_timesteps`, after the shift, in place of
                `sigmas`.

        Raises:
            ValueError: Neither a number nor levels are given, both kinds of levels are, or fewer
                or more than the number; they do not fall, or leave (0, 1]; or `mu` is missing.
        """
        shifted = timesteps is not None
        if sigmas is not None and shifted:
            raise ValueError(
                "both sigmas and timesteps are given; a model that is told other times than its "
                "levels of noise has no part here, so give one of them"
            )
        count = self._settings.num_train_timesteps
        given = [float(t) / count for t in timesteps] if timesteps is not None else sigmas
        levels = None if given is None else _falling(given)
        if levels is None:
            if num_inference_steps is None:
                raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps")
            nfe = num_inference_steps
        else:
            nfe = len(levels)
        if num_inference_steps not in (None, nfe):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but {nfe} "
                f"{'timesteps' if shifted else 'sigmas'} are given; there is one for each "
                f"evaluation"
            )
        found = self._lay_out(nfe, levels, mu, shifted)
        rows = [row for step in found.steps for row in step.rows]
        self.num_inference_steps = nfe
        self._plan = found
        self._levels = [1.0 - row.t for row in rows]
        self.sigmas = torch.tensor([*self._levels, 0.0], dtype=torch.float32).to(device)
        self.timesteps = self.sigmas[:-1] * count
        self._restart()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take in one evaluation, and say where the model is wanted next.

        Args:
            model_output: noise - data as the model sees it at `sample`, of its shape.
            timestep: The one of `timesteps` that the model was given.
            sample: What the step before returned, or the noise. Other values than those returned
                are taken up.
            generator: Not used.
            return_dict: Whether to return a `SchedulerOutput` or a tuple.

        Returns:
            `prev_sample`: the point for the next timestep, which within a Runge-Kutta step is one
            of its stages, and after the last timestep the final state; in the sample's dtype.

        Raises:
            ValueError: `set_timesteps` was not called, all evaluations are done, the timestep is
                not the one expected (on an accelerator only the first is looked at), or the
                shapes differ.
        """
        del generator
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, sample "
                f"{tuple(sample.shape)}; they must be the same"
            )
        if self._step_index is None:
            self._begin(timestep, sample)
            replaced = moved = None
        else:
            self._check(timestep)
            replaced, moved = self._taken_up(sample)
        walk = self._walk
        if walk is None:
            raise ValueError(
                f"all {self.num_inference_steps} evaluations are done; call set_timesteps again "
                f"before the next sample"
            )
        # The minus makes a copy, so what a compiled model returned may be overwritten.
        walk.advance(-model_output.to(walk.point.dtype), replaced, moved)
        self._step_index = (self._step_index or 0) + 1
        aliased = walk.point.is_inference()  # such tensors do not tell whether they were written to
        returned = walk.point.to(sample.dtype, copy=aliased)
        self._returned = returned
        self._version = None if returned.is_inference() else returned._version
        if walk.done:
            self._walk = self._returned = None
        return SchedulerOutput(prev_sample=returned) if return_dict else (returned,)

    def scale_noise(
        self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Mix data with noise, sigma·noise + (1 - sigma)·sample.

        Args:
            sample: Data, `[B, ...]`.
            timestep: One, or one for each sample. Once `set_begin_index` was called, the level is
                that of the next evaluation.
            noise: Shaped like the sample.

        Returns:
            The noised sample, in the sample's dtype.

        Raises:
            ValueError: There is no noise.
        """
        if noise is None:
            raise ValueError("scale_noise needs noise; draw it, as in torch.randn_like(sample)")
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            sigma = self.sigmas[index].to(sample.device)
        else:
            levels = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
            sigma = (
                levels.reshape(-1, *[1] * (sample.ndim - 1)) / self._settings.num_train_timesteps
            )
        return (sigma * noise.float() + (1.0 - sigma) * sample.float()).to(sample.dtype)

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor
    ) -> Tensor:
        """Mix data with noise; `scale_noise` with the arguments of diffusers' older schedulers.

        Args:
            original_samples: Data, `[B, ...]`.
            noise: Shaped like them.
            timesteps: One, or one for each sample.

        Returns:
            The noised samples.
        """
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        """Return the number of timesteps in training."""
        return self._settings.num_train_timesteps

    @property
    def _settings(self) -> _Settings:
        return cast("_Settings", self.config)

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._walk: Walk | None = None
        self._returned: Tensor | None = None
        self._version: int | None = None

    def _own_schedule(self, nfe: int) -> Schedule:
        name = self._settings.schedule
        return schedule(lay_out(self._settings.solver, nfe=nfe).schedule if name is None else name)

    def _lay_out(self, nfe: int, levels: Tensor | None, mu: float | None, shifted: bool) -> Plan:
        if shifted and levels is not None:
            return self._planned(nfe, _through(levels), f"{nfe} given timesteps")
        own, factor = self._own_schedule(nfe), self._shift_factor(mu)
        warp = own if factor == 1.0 else shift(factor) @ own
        if self._settings.shift_terminal:
            warp = terminal(self._settings.shift_terminal) @ warp
        if levels is None:
            return self._planned(nfe, _rounded(warp), str(warp))
        found = self._shifted(levels, mu)
        if not _even(levels):
            return self._planned(nfe, _through(found), f"{nfe} given sigmas")
        if str(own) != "uniform":
            return self._planned(nfe, _rounded(warp), str(warp))
        return self._planned(nfe, _through(found, _rounded(warp)), str(warp))

    def _planned(self, nfe: int, grid: Grid, name: str) -> Plan:
        solver = self._settings.solver
        return Plan(solver, name, method(solver).lay_out(nfe, grid))

    def _shift_factor(self, mu: float | None) -> float:
        if not self._settings.use_dynamic_shifting:
            return self._settings.shift
        if mu is None:
            raise ValueError(
                "use_dynamic_shifting is on, so set_timesteps needs mu, which the pipeline finds "
                "for the resolution; or set use_dynamic_shifting=False and shift"
            )
        return math.exp(mu) if self._settings.time_shift_type == "exponential" else mu

    def _shifted(self, levels: Tensor, mu: float | None) -> Tensor:
        """Shift in float32, each operation rounded as diffusers rounds it."""
        factor = self._shift_factor(mu)
        if self._settings.use_dynamic_shifting:
            whole = torch.full_like(levels, factor)  # a number over a tensor would be its inverse
            levels = whole / (torch.full_like(levels, 1.0) / levels - 1.0 + factor)
        else:
            levels = factor * levels / (1.0 + (factor - 1.0) * levels)
        end = self._settings.shift_terminal
        if end and levels[-1] < 1.0:
            done = 1.0 - levels
            levels = 1.0 - done / (done[-1] / (1.0 - end))
        return levels.clamp(max=1.0)  # above 1 by rounding

    def _begin(self, timestep: float | Tensor, sample: Tensor) -> None:
        found = self.plan
        index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        if not 0 <= index < found.nfe:
            raise ValueError(f"begin index {index} is not one of the {found.nfe} timesteps")
        x = sample.to(torch.float64 if sample.dtype == torch.float64 else torch.float32)
        rest = from_evaluation(found, index) if index else found
        self._walk = Walk(found, x, index) if rest is None else Walk(rest, x)
        self._step_index = index
        self._check(timestep)

    def _index_of(self, timestep: float | Tensor) -> int:
        """Find a timestep; of equal ones the last, which begins a step if one of them does."""
        value = _host(timestep)
        known = [level * self._settings.num_train_timesteps for level in self._levels]
        near = [i for i, t in enumerate(known) if _close(t, value)]
        if not near:
            closest = min(known, key=lambda t: abs(t - value))
            raise ValueError(
                f"timestep {value:g} is not one of set_timesteps; the closest is {closest:g}. Pass "
                f"the elements of scheduler.timesteps"
            )
        return min(near, key=lambda i: (abs(known[i] - value), -i))

    def _check(self, timestep: float | Tensor) -> None:
        """Compare with what is expected, where that does not wait for the device."""
        index = self._step_index
        if index is None or index >= len(self._levels):
            return
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return
        value, expected = _host(timestep), self._levels[index] * self._settings.num_train_timesteps
        if not _close(expected, value):
            raise ValueError(
                f"timestep {value:g} does not come now; evaluation {index} is at {expected:g}. "
                f"Each element of scheduler.timesteps is wanted once, in order"
            )

    def _taken_up(self, sample: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Find out whether the sample is what the step before returned, without waiting for it."""
        walk, returned = self._walk, self._returned
        if walk is None or returned is None:
            return None, None
        same = sample is returned
        if same and self._version is not None and sample._version == self._version:
            return None, None
        values = sample.to(walk.point.dtype)
        overwritten = same and returned is walk.point  # what was there is gone
        if overwritten or sample.shape != walk.point.shape:
            return values, None
        return values, sample != walk.point.to(returned.dtype).to(sample.dtype)


def _check_flow(settings: dict[str, Any]) -> None:
    """Refuse what is not for a flow."""
    prediction = settings.get("prediction_type")
    if prediction not in (None, "flow_prediction"):
        raise ValueError(
            f"the config is of a model with prediction_type {prediction!r}; FlowScheduler is for "
            f"flow-matching models, which predict a velocity"
        )
    for key, instead in _REFUSED.items():
        if settings.get(key):
            raise ValueError(f"the config has {key}=True, which FlowScheduler does not: {instead}")


def _falling(given: Iterable[float]) -> Tensor:
    """Check levels of noise, and round them as the model will see them."""
    levels = torch.tensor([float(level) for level in given], dtype=torch.float32)
    values = levels.tolist()
    if not values:
        raise ValueError("no sigmas are given; give one for each evaluation")
    for i, (level, after) in enumerate(pairwise([*values, 0.0])):
        if not after < level <= 1.0:
            raise ValueError(
                f"sigmas must fall from at most 1 and stay above 0, but sigma {i} of {len(values)} "
                f"is {level:g} and {f'the next is {after:g}' if after else 'it is the last'}; the "
                f"final 0 is appended, so leave it out"
            )
    return levels


def _even(levels: Tensor) -> bool:
    nfe = len(levels)
    return all(abs(s - (1.0 - i / nfe)) < 1e-6 for i, s in enumerate(levels.tolist()))


def _rounded(warp: Schedule) -> Grid:
    """Round the grid's levels of noise to float32, so that the model sees the plan's."""

    def grid(steps: int) -> tuple[float, ...]:
        levels = torch.tensor([1.0 - t for t in warp.grid(steps)], dtype=torch.float64)
        return tuple(1.0 - level for level in levels.float().tolist())

    return grid


def _through(levels: Tensor, otherwise: Grid | None = None) -> Grid:
    """Take given levels of noise as the grid, and for other numbers of steps a curve."""
    times = (*(1.0 - level for level in levels.tolist()), 1.0)
    start, span = times[0], 1.0 - times[0]

    def grid(steps: int) -> tuple[float, ...]:
        if steps == len(times) - 1:
            return times
        if otherwise is not None:
            return otherwise(steps)
        curve = from_times([0.0, *((t - start) / span for t in times[1:-1]), 1.0])
        return (start, *(start + span * u for u in curve.grid(steps)[1:-1]), 1.0)

    return grid


def _host(timestep: float | Tensor) -> float:
    if isinstance(timestep, Tensor) and timestep.numel() != 1:
        raise ValueError(
            f"timestep must be one number, got shape {tuple(timestep.shape)}; all of a batch is at "
            f"the same time"
        )
    return float(timestep)


def _close(expected: float, value: float) -> bool:
    """Whether they are one number, also after a pass through bfloat16."""
    return abs(expected - value) <= max(expected, 1.0) / 128
