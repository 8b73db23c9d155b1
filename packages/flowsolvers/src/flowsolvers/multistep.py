"""The multistep solvers by name, as the entry points name them."""

from __future__ import annotations

from flowsolvers.adams import PEC, Adams
from flowsolvers.exponential import DPMSolver, Exponential, UniPC

__all__ = [
    "AB1",
    "AB2",
    "AB3",
    "AB4",
    "DPM2M",
    "DPM3M",
    "PEC1",
    "PEC2",
    "PEC3",
    "RES2",
    "RES3",
    "UNIPC2",
    "UNIPC3",
]

AB1, AB2, AB3, AB4 = Adams(1), Adams(2), Adams(3), Adams(4)
PEC1, PEC2, PEC3 = PEC(1), PEC(2), PEC(3)
DPM2M, DPM3M = DPMSolver(), Exponential(3, "log-snr")
RES2, RES3 = Exponential(2), Exponential(3)
UNIPC2, UNIPC3 = UniPC(2), UniPC(3)
