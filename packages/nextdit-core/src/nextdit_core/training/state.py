"""Everything that training changes, and its way to disk and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nextdit_core.checkpoints.shards import load_weights, save_weights
from nextdit_core.errors import UserError
from nextdit_core.flow_model import FlowModel
from nextdit_core.folder import read_json, write_json
from nextdit_core.recipe import OptimizerRecipe

__all__ = ["TrainState", "learning_rate"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Give the rate of one step; a pure function, so there is no scheduler state.

    Args:
        recipe: Peak rate, warm-up and shape.
        step: From 0.
        steps: Steps in all.

    Returns:
        The learning rate.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    share = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@dataclass
class TrainState:
    """Weights, their running average, the optimiser and the position in the data.

    Args:
        model: What is trained.
        optimizer: AdamW over the parameters that learn.
        average: Exponential moving average of these, by name.
        step: Optimiser steps done.
        epoch: Epoch of the next batch.
        batch: Index in that epoch of the next batch.
        left_out: Steps before the next one, in a row, whose gradients were not finite.
    """

    model: FlowModel
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    step: int = 0
    epoch: int = 0
    batch: int = 0
    left_out: int = 0

    @classmethod
    def fresh(cls, model: FlowModel, recipe: OptimizerRecipe) -> TrainState:
        """Start from a model's initial weights."""
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        average = {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        return cls(model, optimizer, average)

    def update(self, norm: Tensor) -> None:
        """Take a step along the gradients, unless one of them is not finite.

        The step is left out on the device: nothing waits for the number.

        Args:
            norm: Of all gradients.
        """
        # The fused optimiser's own switch, which mixed precision in float16 uses too.
        vars(self.optimizer)["found_inf"] = norm.isfinite().logical_not().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the weights; early on faster than `decay` says."""
        rate = 1 - min(decay, (1 + self.step) / (10 + self.step))
        weights = [value.detach() for value in self.model.parameters() if value.requires_grad]
        torch._foreach_lerp_(list(self.average.values()), weights, rate)

    def save(self, folder: Path) -> None:
        """Write raw weights, moments and position into an empty folder.

        The average is not written here: it is the model that the checkpoint shows.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for moment in MOMENTS if parameter.requires_grad else ():
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        save_weights(folder / "state.safetensors", tensors)
        position = {"step": self.step, "epoch": self.epoch, "batch": self.batch}
        write_json(folder / "position.json", position)

    def load(self, folder: Path, average: dict[str, Tensor]) -> None:
        """Continue from what `save` wrote.

        Args:
            folder: The folder.
            average: The averaged weights, by name.

        Raises:
            UserError: A tensor is missing or has another shape.
        """
        tensors = load_weights(folder / "state.safetensors", torch.device("cpu"))
        position = read_json(folder / "position.json")
        step = torch.tensor(float(position["step"]))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                try:
                    parameter.copy_(tensors[f"model.{name}"])
                    if not parameter.requires_grad:
                        continue
                    self.average[name].copy_(average[name])
                    self.optimizer.state[parameter] = {
                        "step": step.clone(),
                        **{m: tensors[f"{m}.{name}"].to(parameter) for m in MOMENTS},
                    }
                except (KeyError, RuntimeError) as error:
                    raise UserError(f"{folder} does not fit this model: {error}") from error
        self.step, self.epoch, self.batch = (
            position["step"],
            position["epoch"],
            position["batch"],
        )
