"""Fixed-budget ODE sampling for any flow-matching model.

A solver is a table of floats known before the first model call (`plan`), and one loop
(`solve`) carries it out. Everywhere t=0 is noise and t=1 is data.
"""

from importlib.metadata import version

from flowsolvers.context import Context, contextual, evaluate, model_rows
from flowsolvers.diffusion import diffusion_coefficient, sample_sde
from flowsolvers.fitting import fit_schedule, fitted
from flowsolvers.guidance import Guided, composed, guided, guided_batch
from flowsolvers.layout import plan
from flowsolvers.likelihood import Likelihood, log_likelihood
from flowsolvers.method import Method
from flowsolvers.paths import GVP, VP, Linear, Path
from flowsolvers.plan import Plan, Row, Step
from flowsolvers.registry import method, solvers
from flowsolvers.rules import APG, Momentum, Renorm, guidance_rule
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

__all__ = [
    "APG",
    "GVP",
    "VP",
    "Context",
    "Guided",
    "Likelihood",
    "Linear",
    "Method",
    "Momentum",
    "Path",
    "Plan",
    "Renorm",
    "Row",
    "Schedule",
    "Solution",
    "Step",
    "Tableau",
    "Velocity",
    "__version__",
    "beta",
    "composed",
    "contextual",
    "cosine",
    "diffusion_coefficient",
    "evaluate",
    "fit_schedule",
    "fitted",
    "flux_shift",
    "from_times",
    "guidance_rule",
    "guided",
    "guided_batch",
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
    "sample_sde",
    "schedule",
    "sd3_shift",
    "shift",
    "sigmoid",
    "solve",
    "solvers",
    "terminal",
    "uniform",
]

__version__ = version("flowsolvers")
