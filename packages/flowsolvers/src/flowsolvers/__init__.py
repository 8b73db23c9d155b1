"""Fixed-budget ODE sampling for any flow-matching model.

A solver is a table of floats known before the first model call (`plan`), and one loop
(`solve`) carries it out. Everywhere t=0 is noise and t=1 is data.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from flowsolvers.context import Context, contextual, evaluate, model_rows
from flowsolvers.layout import plan
from flowsolvers.method import Method
from flowsolvers.plan import Limiter, Plan, Row, Step
from flowsolvers.registry import method, solvers
from flowsolvers.schedules import (
    Schedule,
    beta,
    cosine,
    flux_shift,
    from_times,
    karras,
    linear_quadratic,
    logistic,
    lumina_rational,
    lumina_sigmoid,
    polyexponential,
    schedule,
    sd3_shift,
    shift,
    sigmoid,
    terminal,
    uniform,
)
from flowsolvers.solve import Solution, solve
from flowsolvers.tableaus import Tableau
from flowsolvers.velocity import Velocity
from flowsolvers.watch import NotFiniteError, Reached

if TYPE_CHECKING:
    from flowsolvers.adaptive import AdaptiveError, AdaptiveSolution, solve_adaptive
    from flowsolvers.bar import progress
    from flowsolvers.citations import citation
    from flowsolvers.control import Controller
    from flowsolvers.diffusion import diffusion_coefficient, sample_sde
    from flowsolvers.fitting import fit_schedule, fitted
    from flowsolvers.guidance import Guided, composed, guided, guided_batch
    from flowsolvers.inpainting import inpainted
    from flowsolvers.likelihood import Likelihood, log_likelihood
    from flowsolvers.pairs import Pair, embedded_pair
    from flowsolvers.paths import GVP, VP, Linear, Path
    from flowsolvers.rules import APG, Momentum, Renorm, guidance_rule

__all__ = [
    "APG",
    "GVP",
    "VP",
    "AdaptiveError",
    "AdaptiveSolution",
    "Context",
    "Controller",
    "Guided",
    "Likelihood",
    "Limiter",
    "Linear",
    "Method",
    "Momentum",
    "NotFiniteError",
    "Pair",
    "Path",
    "Plan",
    "Reached",
    "Renorm",
    "Row",
    "Schedule",
    "Solution",
    "Step",
    "Tableau",
    "Velocity",
    "__version__",
    "beta",
    "citation",
    "composed",
    "contextual",
    "cosine",
    "diffusion_coefficient",
    "embedded_pair",
    "evaluate",
    "fit_schedule",
    "fitted",
    "flux_shift",
    "from_times",
    "guidance_rule",
    "guided",
    "guided_batch",
    "inpainted",
    "karras",
    "linear_quadratic",
    "log_likelihood",
    "logistic",
    "lumina_rational",
    "lumina_sigmoid",
    "method",
    "model_rows",
    "plan",
    "polyexponential",
    "progress",
    "sample_sde",
    "schedule",
    "sd3_shift",
    "shift",
    "sigmoid",
    "solve",
    "solve_adaptive",
    "solvers",
    "terminal",
    "uniform",
]

__version__ = version("flowsolvers")

#: What a sampler may do without is imported when it is first named.
_LATER = {
    "APG": "rules",
    "AdaptiveError": "adaptive",
    "AdaptiveSolution": "adaptive",
    "Controller": "control",
    "GVP": "paths",
    "VP": "paths",
    "Guided": "guidance",
    "Likelihood": "likelihood",
    "Linear": "paths",
    "Momentum": "rules",
    "Pair": "pairs",
    "Path": "paths",
    "Renorm": "rules",
    "citation": "citations",
    "composed": "guidance",
    "diffusion_coefficient": "diffusion",
    "embedded_pair": "pairs",
    "fit_schedule": "fitting",
    "fitted": "fitting",
    "guidance_rule": "rules",
    "guided": "guidance",
    "guided_batch": "guidance",
    "inpainted": "inpainting",
    "log_likelihood": "likelihood",
    "progress": "bar",
    "sample_sde": "diffusion",
    "solve_adaptive": "adaptive",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"flowsolvers.{_LATER[name]}"), name)
