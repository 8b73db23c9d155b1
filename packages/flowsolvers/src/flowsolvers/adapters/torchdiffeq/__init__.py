"""torchdiffeq's functions on flowsolvers' methods; put this module in place of torchdiffeq.

>>> import torch
>>> from flowsolvers.adapters.torchdiffeq import odeint
>>> odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), rtol=1e-6)
tensor([[1.0000],
        [0.3679]])

The same steps are taken as there, so that results agree to rounding, with these differences: the
state is float32 or float64 whatever y0 is, and so is the time that the function gets; states may
be any trees; between steps bosh3 and adaptive_heun interpolate with a cubic that has the slopes of
both ends; adaptive_heun, fehlberg2 and tsit5 start each step with the slope of the state that
they start from.
"""

from flowsolvers.adapters.torchdiffeq.adjoint import odeint_adjoint
from flowsolvers.adapters.torchdiffeq.dense import odeint_dense
from flowsolvers.adapters.torchdiffeq.event import odeint_event
from flowsolvers.adapters.torchdiffeq.integrate import METHODS, odeint

__all__ = ["METHODS", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
