"""Fixed-budget ODE sampling for any flow-matching model.

A solver is a table of floats known before the first model call (`plan`), and one loop
(`solve`) carries it out. Everywhere t=0 is noise and t=1 is data.
"""

from importlib.metadata import version

from flowsolvers.fitting import fit_schedule, fitted
from flowsolvers.guidance import guided
from flowsolvers.layout import plan
from flowsolvers.method import Method
from flowsolvers.plan import Plan, Row, Step
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

__all__ = [
    "Method",
    "Plan",
    "Row",
    "Schedule",
    "Solution",
    "Step",
    "Tableau",
    "Velocity",
    "__version__",
    "beta",
    "cosine",
    "fit_schedule",
    "fitted",
    "flux_shift",
    "from_times",
    "guided",
    "karras",
    "linear_quadratic",
    "logistic",
    "lumina_rational",
    "lumina_sigmoid",
    "method",
    "plan",
    "polyexponential",
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
