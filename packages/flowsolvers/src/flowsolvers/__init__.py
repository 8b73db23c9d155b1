"""Fixed-budget ODE sampling for any flow-matching model.

A solver is a table of floats known before the first model call (`plan`), and one loop
(`solve`) carries it out. Everywhere t=0 is noise and t=1 is data.
"""

from importlib.metadata import version

from flowsolvers.guidance import guided
from flowsolvers.layout import plan
from flowsolvers.method import Method
from flowsolvers.plan import Plan, Row, Step
from flowsolvers.registry import method, solvers
from flowsolvers.schedules import Schedule, cosine, schedule, shift, sigmoid, uniform
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
    "cosine",
    "guided",
    "method",
    "plan",
    "schedule",
    "shift",
    "sigmoid",
    "solve",
    "solvers",
    "uniform",
]

__version__ = version("flowsolvers")
