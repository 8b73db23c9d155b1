"""What a model learns to predict, along which path, and how that becomes a velocity.

x_t = α(t)·data + σ(t)·noise. The paths and the conversions are flowsolvers'.

Source: Lumina-Next (arXiv 2406.18583) §2 trains the velocity on the linear path; the other paths,
predictions, weightings and limits of time are those of Ma et al., SiT, arXiv 2401.08740, and of its
released code (willisma/SiT, transport/).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

import flowsolvers
from flowsolvers.paths import Prediction
from nextdit_core.errors import UserError, unknown_name

__all__ = ["PREDICTIONS", "WEIGHTINGS", "FlowMatching"]

PATHS: Mapping[str, flowsolvers.Path] = {
    "linear": flowsolvers.Linear(),
    "gvp": flowsolvers.GVP(),
    "vp": flowsolvers.VP(),
}
PREDICTIONS = ("velocity", "noise", "score", "data")
WEIGHTINGS = ("none", "velocity", "likelihood")

#: How far training and sampling stay from times at which a conversion is singular: SiT's numbers.
_OFF, _OFF_VP_TRAINING = 1e-3, 1e-5


@dataclass(frozen=True)
class FlowMatching:
    """The objective of training, which is also what sampling has to know.

    Args:
        path: "linear" (α = t, σ = 1 - t), "gvp" (sin and cos of πt/2) or "vp" (variance-preserving
            diffusion).
        prediction: What the backbone's output is: "velocity", "noise", "score" or "data".
        weighting: Of the squared error. "none": of the prediction itself; a score counts as the
            noise -σ·score. "velocity": as the error of the velocity that it becomes. "likelihood":
            the noise's error times w/σ², w = σ²·α'/α - σ·σ', with which the loss bounds the
            likelihood.

    Raises:
        UserError: A name is none of these.

    Convention: t=0 is noise and t=1 is data; the score is -noise/σ.

    Source: SiT, arXiv 2401.08740, §2 and `transport.py`, `training_losses`. SiT has no prediction
        of the data and weighs no velocity; both are the same formulas here. The bound: Song et al.,
        arXiv 2101.09258, theorem 1, for times that are drawn uniformly.

    >>> FlowMatching("vp", "noise").sampling_times
    (0.0, 0.999)
    """

    path: str = "linear"
    prediction: str = "velocity"
    weighting: str = "none"

    def __post_init__(self) -> None:
        """Check the names."""
        for kind, name, accepted in (
            ("path", self.path, PATHS),
            ("prediction", self.prediction, PREDICTIONS),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if name not in accepted:
                raise unknown_name(kind, name, accepted)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowMatching:
        """Read what `to_dict` gave; what is left out is as it is by default.

        Raises:
            UserError: A key or a name is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key, value in values.items():
            if key not in names:
                raise unknown_name("objective key", key, names)
            if not isinstance(value, str):
                raise UserError(f"objective.{key} is {value!r}; expected a name")
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        """Give the names as JSON-able values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.prediction} on the {self.path} path"

    @property
    def curve(self) -> flowsolvers.Path:
        """The path."""
        return PATHS[self.path]

    @property
    def training_times(self) -> tuple[float, float]:
        """First and last time that is trained."""
        if self.path == "vp":
            return 0.0, 1.0 - _OFF_VP_TRAINING
        finite = self.prediction == "velocity" and self.weighting != "likelihood"
        return (0.0, 1.0) if finite else (_OFF, 1.0 - _OFF)

    @property
    def sampling_times(self) -> tuple[float, float]:
        """First and last time of sampling, between which the velocity is finite."""
        if self.path == "vp":
            return 0.0, 1.0 - _OFF
        return (0.0, 1.0) if self.prediction == "velocity" else (_OFF, 1.0 - _OFF)

    def time(self, t: float) -> float:
        """Spread a time of [0, 1] over the times that are trained."""
        first, last = self.training_times
        return first + (last - first) * t

    def loss(self, predicted: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weigh the squared error of a prediction at x_t = α·data + σ·noise.

        Args:
            predicted: `[..., token_dim]`, the backbone's output at x_t.
            data: Of the same shape.
            noise: Of the same shape.
            t: `[..., 1]`, within `training_times`.

        Returns:
            `[..., token_dim]`.
        """
        path = self.curve
        if self.prediction == "velocity":
            error = predicted - (path.alpha_dot(t) * data + path.sigma_dot(t) * noise)
        elif self.prediction == "noise":
            error = predicted - noise
        elif self.prediction == "score":
            error = path.sigma(t) * predicted + noise
        else:
            error = predicted - data
        weight = self._weight(t)
        return error.square() if weight is None else weight * error.square()

    def _weight(self, t: Tensor) -> Tensor | None:
        """Give the factor of the squared error, whose unit is the noise for a score."""
        unit = cast("Prediction", "noise" if self.prediction == "score" else self.prediction)
        if self.weighting in ("none", unit):
            return None
        if self.weighting == "velocity":
            return self.curve.weights(t, t, unit, "velocity")[1].square()
        as_noise = self.curve.weights(t, t, unit, "noise")[1]
        # A velocity is a·x - (w/σ)·noise.
        w_over_sigma = -self.curve.weights(t, t, "noise", "velocity")[1]
        return as_noise.square() * w_over_sigma / self.curve.sigma(t)

    def velocity(self, model: flowsolvers.Velocity) -> flowsolvers.Velocity:
        """Make a velocity of a model that was trained so.

        Args:
            model: `model(t, x)` gives the prediction.

        Returns:
            `velocity(t, x) -> dx/dt`, finite within `sampling_times`.
        """
        if self.prediction == "velocity":
            return model
        return self.curve.velocity(model, cast("Prediction", self.prediction))
