"""Sampling by the stochastic equation that shares the flow's marginals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

import flowsolvers
from flowsolvers.diffusion import DiffusionForm, LastStep
from nextdit_core.errors import UserError
from nextdit_core.training.draws import generator

__all__ = ["SDE"]


@dataclass(frozen=True)
class SDE:
    """How much noise is put in and taken out again on the way.

    Args:
        form: Of the diffusion coefficient w(t): "constant", "sigma", "sbdm", "decreasing" or
            "increasing-decreasing".
        scale: Factor of w(t), at least 0.
        last_step: "mean", "euler" or "tweedie".
        last_size: Length of the last step, in (0, 1).

    Raises:
        UserError: A name is unknown, or a number out of range.

    Source: Ma et al., SiT, arXiv 2401.08740; see `flowsolvers.sample_sde`.

    >>> SDE.parse("sbdm:0.5")
    SDE(form='sbdm', scale=0.5, last_step='mean', last_size=0.04)
    """

    form: str = "sigma"
    scale: float = 1.0
    last_step: str = "mean"
    last_size: float = 0.04

    def __post_init__(self) -> None:
        """Check the names and numbers by one small sample."""
        try:
            self._sample(lambda t, x: x, torch.ones(1), torch.randn_like, 2, None, None, 0.0)
        except ValueError as error:
            raise UserError(f"sde: {error}") from error

    @classmethod
    def parse(cls, text: str) -> SDE:
        """Read a form, or FORM:SCALE.

        Raises:
            UserError: It is neither.
        """
        form, colon, scale = text.partition(":")
        try:
            return cls(form, float(scale) if colon else 1.0)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"sde is {text!r}; expected FORM or FORM:SCALE: sigma:0.5") from error

    def sample(
        self,
        velocity: flowsolvers.Velocity,
        x: Tensor,
        *,
        lengths: Sequence[int],
        seeds: Sequence[tuple[int, int]],
        nfe: int,
        schedule: flowsolvers.Schedule | None,
        path: flowsolvers.Path,
        start: float,
    ) -> Tensor:
        """Sample packed tokens, each sample with noise of its own.

        Args:
            velocity: Of `[total_tokens, token_dim]`.
            x: The state at the start, of that shape.
            lengths: Tokens of each sample.
            seeds: Seed and place of each sample.
            nfe: Velocity evaluations.
            schedule: Time grid; uniform when None.
            path: That the model was trained on.
            start: Time of x.

        Returns:
            The state at t=1.

        Raises:
            UserError: The start is too late.
        """
        sources = [generator(seed, "sde", place) for seed, place in seeds]

        def noise(state: Tensor) -> Tensor:
            drawn = [
                torch.randn(length, state.shape[-1], generator=source)
                for length, source in zip(lengths, sources, strict=True)
            ]
            return torch.cat(drawn).to(state)

        try:
            return self._sample(velocity, x, noise, nfe, schedule, path, start)
        except ValueError as error:
            raise UserError(f"sde: {error}") from error

    def _sample(
        self,
        velocity: flowsolvers.Velocity,
        x: Tensor,
        noise: Callable[[Tensor], Tensor],
        nfe: int,
        schedule: flowsolvers.Schedule | None,
        path: flowsolvers.Path | None,
        start: float,
    ) -> Tensor:
        return flowsolvers.sample_sde(
            velocity,
            x,
            nfe=nfe,
            generator=noise,
            form=cast("DiffusionForm", self.form),
            scale=self.scale,
            last_step=cast("LastStep", self.last_step),
            last_size=self.last_size,
            schedule=schedule,
            path=path,
            start=start,
        )
