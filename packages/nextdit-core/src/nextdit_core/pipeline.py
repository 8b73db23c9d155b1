"""From prompts to media: the whole way through a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import flowsolvers
from nextdit_core.checkpoints.hub import local_path
from nextdit_core.conditioning import Conditioning
from nextdit_core.engines.local import pick_device
from nextdit_core.errors import UserError
from nextdit_core.flow_model import FlowModel
from nextdit_core.modality import Modality, Size
from nextdit_core.sampling_plan import check_sampling
from nextdit_core.saved_model import ModelCard, load_model
from nextdit_core.tokens import Tokens
from nextdit_core.training.draws import generator

__all__ = ["Pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """A trained model, ready to be asked.

    Args:
        model: Backbone and text encoder.
        modality: Turns tokens into media.
        card: Where the sampling defaults come from.

    `Pipeline.from_pretrained("runs/digits")("a handwritten seven", seed=0)` gives a list with
    one picture.
    """

    model: FlowModel
    modality: Modality
    card: ModelCard

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str = "auto", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a saved model: backbone, text encoder and modality.

        Args:
            path: A saved model, a run, whose newest complete checkpoint is taken, or OWNER/NAME
                of a saved model on the Hugging Face hub. A backbone alone, the authors' and
                diffusers' included, says nothing of its modality: `NextDiT.from_pretrained`.
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: Of the weights; the ODE state is float32 whatever this is.

        Returns:
            The pipeline.

        Raises:
            UserError: The folder is not a complete model of this format, or needs a part
                that is not installed.
        """
        place = local_path(path, pipeline=True)
        return cls(*load_model(place, pick_device(device), dtype))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.backbone.x_embedder.weight.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        size: Size | Sequence[Size] | None = None,
        seed: int | Sequence[int] = 0,
        nfe: int | None = None,
        solver: str | None = None,
        schedule: str | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Sample one medium per prompt, all in one packed batch.

        Args:
            prompt: One or several.
            size: One size for all, or one per prompt; the modality's default when None.
            seed: One seed, from which sample i takes its own noise, or one seed per prompt.
                The noise of a sample depends only on its seed, place and size.
            nfe: Velocity evaluations, counted per sample without the guidance factor.
            solver: A flowsolvers solver name.
            schedule: A flowsolvers time grid name.
            guidance: Classifier-free guidance scale; 1 is no guidance.
            negative_prompt: What guidance leads away from.
            progress: Called with the number of evaluations done so far.

        Returns:
            The media, as the modality's `decode` makes them.

        Raises:
            UserError: A name, size or number is not acceptable.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("no prompt given; give at least one")
        sizes = self._sizes(size, len(prompts))
        seeds = _seeds(seed, len(prompts))
        plan = check_sampling(
            self.card.sampling["solver"] if solver is None else solver,
            self.card.sampling["schedule"] if schedule is None else schedule,
            self.card.sampling["nfe"] if nfe is None else nfe,
        )
        scale = self.card.sampling["guidance"] if guidance is None else guidance
        noise = self._noise(sizes, seeds)
        velocity = self._velocity(prompts, noise, scale, negative_prompt, progress)
        result = flowsolvers.solve(velocity, noise.values, plan=plan)
        samples = noise.with_values(result.x).split()
        return [
            self.modality.decode(self.modality.detokenize(values.float().cpu(), one))
            for values, one in zip(samples, sizes, strict=True)
        ]

    def _sizes(self, size: Size | Sequence[Size] | None, count: int) -> list[Size]:
        if size is None:
            return [tuple(self.modality.default_size)] * count
        extents = [one for one in size if isinstance(one, int)]
        if len(extents) == len(size):
            return [tuple(extents)] * count
        sizes = [tuple(one) for one in size if not isinstance(one, int)]
        if len(sizes) != count:
            raise UserError(f"{len(size)} sizes for {count} prompts; give one, or one each")
        return sizes

    def _noise(self, sizes: Sequence[Size], seeds: Sequence[tuple[int, int]]) -> Tokens:
        samples = []
        for size, (seed, place) in zip(sizes, seeds, strict=True):
            positions = self.modality.positions(size)
            shape = (len(positions), self.modality.token_dim)
            values = torch.randn(shape, generator=generator(seed, "sample", place))
            samples.append(Tokens(values, positions, (len(positions),)))
        packed = Tokens.pack(samples)
        device = self.device
        return Tokens(packed.values.to(device), packed.positions.to(device), packed.lengths)

    def _velocity(
        self,
        prompts: Sequence[str],
        noise: Tokens,
        scale: float,
        negative_prompt: str,
        progress: Callable[[int], None] | None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Make the velocity of the guided ODE; text is encoded and projected once, here."""
        backbone, encoder = self.model.backbone, self.model.text_encoder
        guided = scale != 1.0 and encoder is not None
        condition: Conditioning | None = None
        if encoder is not None:
            asked = [*prompts, *[negative_prompt] * len(prompts)] if guided else prompts
            condition = encoder(asked)
        prepared = backbone.prepare(condition)
        both = Tokens.pack([noise, noise]) if guided else noise
        done = 0

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            nonlocal done
            values = torch.cat([x, x]) if guided else x
            out = backbone(both.with_values(values), t.float().expand(both.batch), prepared)
            if progress is not None:
                done += 1
                progress(done)
            if not guided:
                return out
            with_prompt, without = out.chunk(2)
            return without + scale * (with_prompt - without)

        return velocity


def _seeds(seed: int | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Give each sample its seed and its place among those that share it."""
    if isinstance(seed, int):
        return [(seed, place) for place in range(count)]
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds for {count} prompts; give one each")
    return [(one, 0) for one in seed]
