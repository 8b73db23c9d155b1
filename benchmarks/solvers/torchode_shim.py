"""A module that answers to torchode's names and solves with flowsolvers.

For `peer_suites.py`, which runs torchode's tests against it; it is no adapter to work with. What is
translated: methods to embedded pairs; controllers to `Controller`, and one decision of theirs to
what `solve_adaptive` decides with; `AutoDiffAdjoint` to `solve_adaptive(per_sample=True)`; the two
that solve backwards to `odeint_adjoint`; polynomials to the dense output's. Where torchode returns
a status, flowsolvers raises; the statuses of a controller are read off from our ratio of the error
to the tolerance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from flowsolvers import Controller, solve_adaptive
from flowsolvers.adapters.torchdiffeq import odeint, odeint_adjoint
from flowsolvers.adapters.torchdiffeq.grid import GridStep
from flowsolvers.embedded import Attempt, Interpolant, Tolerance, rms_of_each
from flowsolvers.marching import judge
from flowsolvers.pairs import TSIT5

__all__ = ["install"]

#: A tolerance that no finite error exceeds: steps of a given length are accepted.
ANY_ERROR = 1e30


class Status(Enum):
    """How a solve, or a step, went."""

    SUCCESS = 0
    GENERAL_ERROR = 1
    REACHED_DT_MIN = 2
    REACHED_MAX_STEPS = 3
    INFINITE_NORM = 4


# ---- problems -------------------------------------------------------------------------------


class ODETerm(nn.Module):
    """The flow; its `vf` is what our solvers call."""

    def __init__(self, f: Any, *, with_stats: bool = True, with_args: bool = False) -> None:
        super().__init__()
        self.f, self.with_args = f, with_args

    def init(self, problem: InitialValueProblem, stats: dict[str, Any]) -> None:
        stats["n_f_evals"] = torch.zeros(len(problem.y0), dtype=torch.long)

    def vf(self, t: Tensor, y: Tensor, stats: dict[str, Any], args: Any) -> Tensor:
        stats["n_f_evals"] += 1
        return self.f(t, y, args) if self.with_args else self.f(t, y)


class InitialValueProblem:
    """Where a solve starts and what is asked of it."""

    def __init__(
        self,
        y0: Tensor,
        t_start: Tensor | None = None,
        t_end: Tensor | None = None,
        t_eval: Tensor | None = None,
    ) -> None:
        if t_eval is not None:
            t_start = t_eval[:, 0] if t_start is None else t_start
            t_end = t_eval[:, -1] if t_end is None else t_end
        if t_start is None or t_end is None:
            raise ValueError("give t_eval, or t_start and t_end")
        self.y0, self.t_start, self.t_end, self.t_eval = y0, t_start, t_end, t_eval

    @property
    def batch_size(self) -> int:
        return len(self.y0)

    @property
    def times(self) -> Tensor:
        """Of the solution, `[B, T]`."""
        return self.t_end[:, None] if self.t_eval is None else self.t_eval


@dataclass
class Solution:
    """What a solve found."""

    ts: Tensor
    ys: Tensor
    stats: dict[str, Any]
    status: Tensor


# ---- methods --------------------------------------------------------------------------------

_T, _U = TypeVar("_T"), TypeVar("_U")


class SingleStepMethod(nn.Module, Generic[_T, _U]):
    """What the suite's own mocks of a method extend."""


class StepResult(NamedTuple):
    """A step's end, and the estimate of its error."""

    y: Tensor
    error_estimate: Tensor | None


class _Method:
    pair: str | None = None

    def __init__(self, term: ODETerm | None = None) -> None:
        self.term = term


class Dopri5(_Method):
    pair = "dopri5"


class Heun(_Method):
    pair = "adaptive_heun"


class Euler(_Method):
    """No embedded pair: odeint's method on a grid."""


@dataclass
class _Nodes:
    c: Tensor

    def to(self, device: Any, time_dtype: torch.dtype, data_dtype: torch.dtype) -> _Nodes:
        return _Nodes(self.c.to(device, time_dtype))


class ERKInterpolationData(NamedTuple):
    """A step with its slopes."""

    tableau: _Nodes
    t0: Tensor
    dt: Tensor
    y0: Tensor
    y1: Tensor
    k: Tensor


class Tsit5(_Method):
    pair = "tsit5"
    TABLEAU = _Nodes(torch.tensor(TSIT5.c, dtype=torch.float64))

    def build_interpolation(self, data: ERKInterpolationData) -> Polynomial:
        """Return the pair's dense output."""
        t0, t1 = data.t0, data.t0 + data.dt
        slopes = [[k] for k in data.k]
        made = Attempt(TSIT5, t0, t1, data.dt, [data.y0], [data.y1], slopes)
        return Polynomial.of(t0, t1, made.interpolant())


class Polynomial:
    """Of any degree, as our dense output evaluates it."""

    def __init__(self, t0: Tensor, t1: Tensor, coefficients: Any) -> None:
        self.t0, self.t1, self.coefficients = t0, t1, coefficients

    @classmethod
    def of(cls, t0: Tensor, t1: Tensor, made: Interpolant) -> Polynomial:
        return cls(t0, t1, [made.x[0], *(parts[0] for parts in made.coefficients)])

    @classmethod
    def from_k(cls, t0: Tensor, dt: Tensor, y0: Tensor, y1: Tensor, k: Tensor) -> Polynomial:
        """Return the cubic with the states and slopes of both ends."""
        (start,), (h,) = t0.tolist(), dt.tolist()

        def last_slope(t: Any, x: Any, nudge: Any = 0.0) -> list[Tensor]:
            return [k[-1]]

        step = GridStep(last_slope, start, start + h, [y0], [y1], [k[0]], True)
        return cls.of(t0, t0 + dt, step.interpolant())

    def evaluate(self, t: Tensor, idx: Tensor) -> Tensor:
        first, *others = (c[idx] for c in self.coefficients)
        h = (self.t1 - self.t0)[idx]
        return Interpolant(self.t0[idx], h, [first], tuple([c] for c in others)).at(t)[0]


class Line(Polynomial):
    """From one state to another."""

    def __init__(self, t0: Tensor, dt: Tensor, y0: Tensor, y1: Tensor) -> None:
        super().__init__(t0, t0 + dt, [y0, y1 - y0])


class LocalInterpolation:
    """What the suite's own mock of an interpolation extends."""


# ---- controllers ----------------------------------------------------------------------------


class StepSizeController(nn.Module, Generic[_T]):
    """What the suite's own mock of a controller extends."""


class FixedStepController(StepSizeController[Any]):
    """Steps of one length."""


def rms_norm(y: Tensor) -> Tensor:
    return rms_of_each([y])


def max_norm(y: Tensor) -> Tensor:
    return y.abs().amax(1)


@dataclass
class IntegralState:
    """What a controller remembers."""

    method_order: int
    prev_error_ratio: Tensor
    prev_prev_error_ratio: Tensor
    dt_min: float
    dt_max: float


class PIDState(IntegralState):
    """The same, of a PID rule."""


class IntegralController:
    """The classic rule, and one decision of it on its own."""

    State: type[IntegralState] = IntegralState

    def __init__(
        self,
        atol: float,
        rtol: float,
        *,
        term: ODETerm | None = None,
        norm: Callable[[Tensor], Tensor] = rms_norm,
        dt_min: float | None = None,
        dt_max: float | None = None,
        safety: float = 0.9,
        factor_min: float = 0.2,
        factor_max: float = 10.0,
        coefficients: tuple[float, float, float] = (1.0, 0.0, 0.0),
    ) -> None:
        self.atol, self.rtol, self.norm = float(atol), float(rtol), norm
        self.dt_min, self.dt_max = dt_min, dt_max
        self.safety, self.shrink, self.grow = safety, max(factor_min, 1e-12), factor_max
        self.coefficients = coefficients

    def rule(self, dt_min: float | None = None, dt_max: float | None = None) -> Controller:
        return Controller(
            self.safety,
            self.shrink,
            self.grow,
            *self.coefficients,
            0.0 if dt_min is None else float(dt_min),
            float("inf") if dt_max is None else float(dt_max),
        )

    def initial_state(
        self, method_order: int, problem: InitialValueProblem, dt_min: Any, dt_max: Any
    ) -> IntegralState:
        one = problem.y0.new_ones(problem.batch_size)
        return self.State(method_order, one, one, dt_min, dt_max)

    def adapt_step_size(
        self,
        t0: Tensor,
        dt: Tensor,
        y0: Tensor,
        step_result: StepResult,
        state: IntegralState,
        stats: dict[str, Any],
    ) -> tuple[Tensor, Tensor, IntegralState, Tensor]:
        """Decide on a step as a march of each sample does."""
        error = step_result.error_estimate
        assert error is not None
        tolerance = Tolerance([self.rtol], [self.atol])
        ratio = self.norm(tolerance.over([error], [y0], [step_result.y])[0])
        earlier = state.prev_error_ratio, state.prev_prev_error_ratio
        order = state.method_order
        _, unbound, _ = judge(self.rule(), ratio, dt.abs(), earlier, order=order)
        rule = self.rule(state.dt_min, state.dt_max)
        accept, size, newer = judge(rule, ratio, dt.abs(), earlier, order=order)
        status = torch.where(ratio.isfinite(), Status.SUCCESS.value, Status.INFINITE_NORM.value)
        status = torch.where(unbound < rule.min_step, Status.REACHED_DT_MIN.value, status)
        later = self.State(order, *newer, state.dt_min, state.dt_max)
        return accept, size * dt.sign(), later, status


class PIDController(IntegralController):
    """A rule with three coefficients."""

    State = PIDState

    def __init__(
        self, atol: float, rtol: float, pcoeff: float, icoeff: float, dcoeff: float, **more: Any
    ) -> None:
        super().__init__(atol, rtol, coefficients=(icoeff, pcoeff, dcoeff), **more)


class _Constant(Controller):
    """Every next step is as long as the first."""

    def factor_each(
        self, ratio: Tensor, accepted: Tensor, earlier: tuple[Tensor, Tensor], *, order: int
    ) -> Tensor:
        return torch.ones_like(ratio)


def _lengths(controller: Any, method: Any, dt0: Tensor | None, batch: int) -> Tensor | None:
    """Return the length of each sample's steps where it is constant."""
    if isinstance(controller, FixedStepController):
        if dt0 is None:
            raise ValueError("steps of one length need dt0")
        return dt0.abs()
    if isinstance(controller, StepSizeController):  # the suite's own mock of one
        constant = torch.equal(torch.as_tensor(controller.dt), torch.as_tensor(controller.dt0))
        if controller.accept is not True or not constant:
            raise NotImplementedError("only a mocked controller of one length is translated")
        return torch.as_tensor(controller.dt0).expand(batch).abs()
    if isinstance(method, Euler) and dt0 is not None:  # no estimate, so nothing to adapt
        return dt0.abs()
    return None


# ---- solves ---------------------------------------------------------------------------------


class AutoDiffAdjoint(nn.Module):
    """A solve through which gradients flow."""

    def __init__(
        self,
        step_method: Any,
        step_size_controller: Any,
        *,
        max_steps: int | None = None,
        backprop_through_step_size_control: bool = False,
    ) -> None:
        super().__init__()
        if max_steps is not None:
            raise NotImplementedError("max_steps")
        self.step_method, self.step_size_controller = step_method, step_size_controller

    def solve(
        self,
        problem: InitialValueProblem,
        term: ODETerm | None = None,
        dt0: Tensor | None = None,
        args: Any = None,
    ) -> Solution:
        flow = term or self.step_method.term
        stats: dict[str, Any] = {}
        flow.init(problem, stats)
        clock = problem.t_start.dtype

        def velocity(t: Tensor, y: Tensor) -> Tensor:
            return flow.vf(t.to(clock), y, stats, args)

        lengths = _lengths(self.step_size_controller, self.step_method, dt0, problem.batch_size)
        if self.step_method.pair is None:
            assert lengths is not None
            ys, steps = _on_a_grid(problem, velocity, lengths)
            stats["n_steps"] = stats["n_accepted"] = steps
        else:
            ys = self._to_a_tolerance(problem, velocity, lengths, dt0, stats)
        times = problem.times
        stats["n_initialized"] = torch.full((problem.batch_size,), times.shape[1])
        return Solution(times, ys, stats, torch.zeros(problem.batch_size, dtype=torch.long))

    def _to_a_tolerance(
        self,
        problem: InitialValueProblem,
        velocity: Any,
        lengths: Tensor | None,
        dt0: Tensor | None,
        stats: dict[str, Any],
    ) -> Tensor:
        controller = self.step_size_controller
        options: dict[str, Any] = {"first_step": dt0 if dt0 is None else dt0.abs()}
        if lengths is not None:
            options = {
                "first_step": lengths,
                "rtol": 0.0,
                "atol": ANY_ERROR,
                "controller": _Constant(),
            }
        else:
            options["controller"] = controller.rule(controller.dt_min, controller.dt_max)
            options |= {"rtol": controller.rtol, "atol": controller.atol, "norm": controller.norm}
        found = solve_adaptive(
            velocity,
            problem.y0,
            pair=self.step_method.pair,
            start=problem.t_start,
            end=problem.t_end,
            at=problem.t_eval,
            per_sample=True,
            **options,
        )
        stats["n_accepted"] = found.accepted
        stats["n_steps"] = found.accepted + found.rejected
        if found.states is None:
            return found.x[:, None]
        return found.states.transpose(0, 1)


def _on_a_grid(
    problem: InitialValueProblem, velocity: Any, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve each sample alone by Euler's method."""
    found, counts = [], []
    for i, length in enumerate(lengths.tolist()):
        calls: list[float] = []

        def flow(t: Tensor, y: Tensor) -> Tensor:
            return velocity(t[None], y[None])[0]

        flow.callback_step = lambda t, y, dt, calls=calls: calls.append(float(t))  # type: ignore[attr-defined]
        times, first = _times_of(problem, i)
        states = odeint(flow, problem.y0[i], times, method="euler", options={"step_size": length})
        found.append(states[first:])
        counts.append(len(calls))
    return torch.stack(found), torch.tensor(counts)


def _times_of(problem: InitialValueProblem, i: int) -> tuple[Tensor, int]:
    """Return the times for odeint, and from which on they were asked for."""
    start, end = problem.t_start[i : i + 1], problem.t_end[i : i + 1]
    if problem.t_eval is None:
        return torch.cat([start, end]), 1
    asked = problem.t_eval[i]
    if not torch.equal(asked[-1:], end):
        raise NotImplementedError("the last time of t_eval must be the end")
    return (asked, 0) if torch.equal(asked[:1], start) else (torch.cat([start, asked]), 1)


class BacksolveAdjoint:
    """Gradients by a solve backwards, sample by sample; its steps follow the classic rule."""

    def __init__(self, term: ODETerm, step_method: Any, step_size_controller: Any) -> None:
        self.term, self.method, self.controller = term, step_method, step_size_controller

    def solve(
        self,
        problem: InitialValueProblem,
        term: ODETerm | None = None,
        dt0: Tensor | None = None,
        args: Any = None,
        backward_dt0: Tensor | None = None,
    ) -> Solution:
        stats: dict[str, Any] = {}
        self.term.init(problem, stats)
        found = []
        for i in range(problem.batch_size):
            times, first = _times_of(problem, i)
            forth = None if dt0 is None else dt0[i]
            back = forth if backward_dt0 is None else backward_dt0[i]

            def flow(t: Tensor, y: Tensor) -> Tensor:
                return self.term.vf(t[None], y[None], stats, args)[0]

            found.append(self._odeint(flow, problem.y0[i], times, forth, back)[first:])
        return self._solution(problem, torch.stack(found), stats)

    def _odeint(
        self, flow: Any, y0: Tensor, times: Tensor, forth: Tensor | None, back: Tensor | None
    ) -> Tensor:
        forwards, rtol, atol = self._options(forth)
        backwards, _, _ = self._options(back)
        return odeint_adjoint(
            flow,
            y0,
            times,
            rtol=rtol,
            atol=atol,
            method=self.method.pair,
            options=forwards,
            adjoint_options=backwards,
            adjoint_params=tuple(self.term.parameters()),
        )

    def _options(self, first: Tensor | None) -> tuple[dict[str, Any], float, float]:
        if isinstance(self.controller, FixedStepController):
            assert first is not None
            length = abs(float(first))
            options = {"first_step": length, "min_step": length, "max_step": length * (1 + 1e-9)}
            return options, 0.0, ANY_ERROR
        c = self.controller
        options = {"safety": c.safety, "dfactor": c.shrink, "ifactor": c.grow}
        if first is not None:
            options["first_step"] = abs(float(first))
        return options, c.rtol, c.atol

    @staticmethod
    def _solution(problem: InitialValueProblem, ys: Tensor, stats: dict[str, Any]) -> Solution:
        times = problem.times
        return Solution(times, ys, stats, torch.zeros(problem.batch_size, dtype=torch.long))


class JointBacksolveAdjoint(BacksolveAdjoint):
    """One solve of all samples, in the first one's time."""

    def solve(
        self,
        problem: InitialValueProblem,
        term: ODETerm | None = None,
        dt0: Tensor | None = None,
        args: Any = None,
        backward_dt0: Tensor | None = None,
    ) -> Solution:
        stats: dict[str, Any] = {}
        self.term.init(problem, stats)
        start, end = problem.t_start, problem.t_end
        slope = (end - start) / (end - start)[0]
        intercept = start - slope * start[0]

        def flow(t: Tensor, y: Tensor) -> Tensor:
            return slope[:, None] * self.term.vf(intercept + slope * t, y, stats, args)

        times, first = _times_of(problem, 0)
        ys = self._odeint(flow, problem.y0, times, None, None)[first:]
        return self._solution(problem, ys.transpose(0, 1), stats)


def solve_ivp(f: Any, y0: Tensor, t_eval: Tensor, *, method: str = "tsit5") -> Solution:
    """Solve by torchode's default method and controller."""
    term = f if isinstance(f, ODETerm) else ODETerm(f)
    chosen = {"tsit5": Tsit5, "dopri5": Dopri5, "heun": Heun}[method](term)
    controller = PIDController(1e-7, 1e-7, 0.2, 0.5, 0.0)
    return AutoDiffAdjoint(chosen, controller).solve(InitialValueProblem(y0, t_eval=t_eval), term)


# ---- modules --------------------------------------------------------------------------------


class ButcherTableau:
    """Only so that the suite's file which makes one can be imported; its test is skipped."""

    @staticmethod
    def from_lists(**lists: Any) -> dict[str, Any]:
        return lists


_MODULES: dict[str, dict[str, Any]] = {
    "": {
        "AutoDiffAdjoint": AutoDiffAdjoint,
        "BacksolveAdjoint": BacksolveAdjoint,
        "Dopri5": Dopri5,
        "Euler": Euler,
        "FixedStepController": FixedStepController,
        "Heun": Heun,
        "InitialValueProblem": InitialValueProblem,
        "IntegralController": IntegralController,
        "JointBacksolveAdjoint": JointBacksolveAdjoint,
        "ODETerm": ODETerm,
        "PIDController": PIDController,
        "Solution": Solution,
        "Status": Status,
        "Tsit5": Tsit5,
        "solve_ivp": solve_ivp,
    },
    ".interpolation": {
        "FourthOrderPolynomialInterpolation": Polynomial,
        "LinearInterpolation": Line,
        "LocalInterpolation": LocalInterpolation,
        "ThirdOrderPolynomialInterpolation": Polynomial,
    },
    ".single_step_methods": {"SingleStepMethod": SingleStepMethod, "StepResult": StepResult},
    ".single_step_methods.runge_kutta": {
        "ButcherTableau": ButcherTableau,
        "ERKInterpolationData": ERKInterpolationData,
        "ExplicitRungeKutta": SingleStepMethod,
    },
    ".status_codes": {"Status": Status},
    ".step_size_controllers": {
        "PIDState": PIDState,
        "StepSizeController": StepSizeController,
        "max_norm": max_norm,
        "rms_norm": rms_norm,
    },
    ".typing": {"DataTensor": Tensor, "TimeTensor": Tensor},
}


def install() -> None:
    """Answer to `import torchode` from now on."""
    for name, contents in _MODULES.items():
        module = ModuleType(f"torchode{name}")
        vars(module).update(contents)
        sys.modules[module.__name__] = module
