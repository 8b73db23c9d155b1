"""Fixed-budget ODE sampling for any flow-matching model.

A solver is a table of floats known before the first model call (`plan`), and one loop
(`solve`) carries it out. Everywhere t=0 is noise and t=1 is data.
"""

from importlib.metadata import version

from flowsolvers.guidance import guided
from flowsolvers.plan import Plan, Row, Step, plan
from flowsolvers.registry import solvers, tableau
from flowsolvers.schedules import Schedule, cosine, schedule, shift, sigmoid, uniform
from flowsolvers.solve import Solution, solve
from flowsolvers.tableaus import Tableau
from flowsolvers.velocity import Velocity

__all__ = [
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
    "plan",
    "schedule",
    "shift",
    "sigmoid",
    "solve",
    "solvers",
    "tableau",
    "uniform",
]

__version__ = version("flowsolvers")
