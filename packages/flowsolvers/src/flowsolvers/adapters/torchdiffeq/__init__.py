"""torchdiffeq's functions on flowsolvers' methods; put this module in place of torchdiffeq.

>>> import torch
>>> from flowsolvers.adapters.torchdiffeq import odeint
>>> odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), rtol=1e-6)
tensor([[1.0000],
        [0.3679]])

Methods on a grid and dopri5 take the same steps as there, so that results agree to rounding. What
differs: the state is added up in float32 or float64 whatever y0 is, and the function gets the time
in that; states may be any trees; tsit5 carries on the solution of order 5; between steps bosh3 and
dopri8 interpolate with the order that their authors gave them; adaptive_heun and fehlberg2 start
each step with the slope of the state that they start from, at one more evaluation.
"""

from flowsolvers.adapters.torchdiffeq.adjoint import odeint_adjoint
from flowsolvers.adapters.torchdiffeq.dense import odeint_dense
from flowsolvers.adapters.torchdiffeq.event import odeint_event
from flowsolvers.adapters.torchdiffeq.integrate import METHODS, odeint

__all__ = ["METHODS", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
