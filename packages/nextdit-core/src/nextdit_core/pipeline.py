"""From prompts to media: the whole way through a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

import flowsolvers
from nextdit_core.backbone import PreparedConditioning
from nextdit_core.checkpoints.hub import local_path
from nextdit_core.conditioning import Conditioning
from nextdit_core.context_drop import ContextDrop
from nextdit_core.engines.local import pick_device
from nextdit_core.errors import UserError
from nextdit_core.extrapolation import Extrapolation
from nextdit_core.flow_model import FlowModel
from nextdit_core.guidance import Guidance
from nextdit_core.modality import Modality, Size
from nextdit_core.packed_prediction import PackedPrediction
from nextdit_core.sampling_plan import check_sampling, named_schedule
from nextdit_core.saved_model import ModelCard, load_model
from nextdit_core.sde import SDE
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
        guidance: float | Guidance | None = None,
        negative_prompt: str = "",
        extrapolate: Extrapolation | str | None = None,
        context_drop: ContextDrop | str | None = None,
        latents: Sequence[Tensor] | None = None,
        start: float = 0.0,
        sde: SDE | str | None = None,
        output: Literal["media", "latent"] = "media",
        on_step: Callable[[flowsolvers.Reached[Tensor]], object] | None = None,
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
            schedule: A flowsolvers time grid name; "auto" is the solver's own.
            guidance: Classifier-free guidance scale, 1 is no guidance; or a `Guidance`, for
                another rule or an interval.
            negative_prompt: What guidance leads away from.
            extrapolate: For sizes beyond the trained one: an `Extrapolation`, or its method, such
                as "time-aware"; None takes positions as they are.
            context_drop: Attend to averages of tokens early in sampling, such as
                `ContextDrop()` or "0.5:2"; None does not.
            latents: One latent per prompt, as `modality.encode` makes them, to begin from; their
                sizes are then the sizes. At `start` 0 they are the noise itself.
            start: Time at which to begin, in [0, 1), 0 = noise. Above 0, latents are data, to
                which this much of each sample's noise is added first; 1 - start is known as
                strength.
            sde: Sample with noise on the way, such as `SDE("sigma")` or "sigma:0.5", in `nfe`
                steps of Euler and Maruyama's method; None follows the ODE with `solver`.
            output: "media", or "latent" to leave out the decoding.
            on_step: Called with a `flowsolvers.Reached` at each step's end; its x are packed
                tokens, and it can stop.
            progress: Called at each step's end with the number of evaluations so far.

        Returns:
            The media, as the modality's `decode` makes them; or latents.

        Raises:
            UserError: A name, size or number is not acceptable.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("no prompt given; give at least one")
        if output not in ("media", "latent"):
            raise UserError(f"output is {output!r}; expected 'media' or 'latent'")
        sizes = self._sizes(size, latents, len(prompts))
        seeds = _seeds(seed, len(prompts))
        sampling = self.card.sampling
        guided = (
            guidance
            if isinstance(guidance, Guidance)
            else Guidance(sampling["guidance"] if guidance is None else guidance)
        )
        drop = ContextDrop.parse(context_drop) if isinstance(context_drop, str) else context_drop
        solve: dict[str, Any] = {
            "solver": sampling["solver"] if solver is None else solver,
            "schedule": sampling["schedule"] if schedule is None else schedule,
            "nfe": sampling["nfe"] if nfe is None else nfe,
        }
        objective = self.card.objective
        begin_at, end_at = max(start, objective.sampling_times[0]), objective.sampling_times[1]
        if start and not start < end_at:
            raise UserError(f"start is {start}; expected less than {end_at}, where sampling ends")
        check_sampling(**solve, start=begin_at, end=end_at)
        sde = SDE.parse(sde) if isinstance(sde, str) else sde
        if sde is not None and (solver is not None or on_step is not None):
            raise UserError("solver and on_step are of the ODE; leave them out, or leave out sde")
        if sde is not None and not begin_at < 1.0 - sde.last_size:
            raise UserError(f"sde: start is {start}; expected less than {1.0 - sde.last_size:g}")
        if isinstance(extrapolate, str):
            extrapolate = Extrapolation(extrapolate)
        options: dict[str, Any] = {}
        if extrapolate is not None:
            options = extrapolate.options(self.modality, sizes, self.model.backbone.rope)
        noise = self._noise(sizes, seeds)
        begin = self._begin(noise, latents, start)
        velocity = self._velocity(
            prompts, noise, guided, negative_prompt, drop or ContextDrop(()), options
        )
        grid = named_schedule(solve["schedule"])
        if sde is not None:
            x = sde.sample(
                velocity if progress is None else _Counted(velocity, progress),
                begin,
                lengths=noise.lengths,
                seeds=seeds,
                nfe=solve["nfe"],
                schedule=grid,
                path=objective.curve,
                start=begin_at,
            )
        else:
            x = flowsolvers.solve(
                velocity,
                begin,
                nfe=solve["nfe"],
                solver=solve["solver"],
                schedule=grid,
                start=begin_at,
                end=end_at,
                on_step=_told(on_step, progress),
            ).x
        samples = noise.with_values(x).split()
        found = [
            self.modality.detokenize(values.float().cpu(), one)
            for values, one in zip(samples, sizes, strict=True)
        ]
        return found if output == "latent" else [self.modality.decode(one) for one in found]

    def _sizes(
        self, size: Size | Sequence[Size] | None, latents: Sequence[Tensor] | None, count: int
    ) -> list[Size]:
        if latents is not None:
            if size is not None:
                raise UserError("latents have sizes of their own; give size or latents, not both")
            if len(latents) != count:
                raise UserError(f"{len(latents)} latents for {count} prompts; give one each")
            return [self.modality.size(one) for one in latents]
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

    def _begin(self, noise: Tokens, latents: Sequence[Tensor] | None, start: float) -> Tensor:
        """Give the tokens to begin from."""
        if latents is None:
            if start:
                raise UserError(f"start is {start}, which needs latents of data to begin from")
            return noise.values
        given = torch.cat([self.modality.tokenize(one.float()) for one in latents])
        given = given.to(noise.values)
        if not start:
            return given
        return self.card.objective.curve.interpolate(given, noise.values, start)

    def _velocity(
        self,
        prompts: Sequence[str],
        noise: Tokens,
        guidance: Guidance,
        negative_prompt: str,
        drop: ContextDrop,
        options: Mapping[str, Any],
    ) -> flowsolvers.Velocity:
        """Make the velocity of the guided ODE; text is encoded and projected once, here."""
        backbone, encoder = self.model.backbone, self.model.text_encoder
        guided = guidance.guides and encoder is not None
        condition: Conditioning | None = None
        if encoder is not None:
            asked = [*prompts, *[negative_prompt] * len(prompts)] if guided else prompts
            condition = encoder(asked)
        prepared = backbone.prepare(condition)

        def velocity(text: PreparedConditioning, layout: Tokens) -> flowsolvers.Velocity:
            return self.card.objective.velocity(
                PackedPrediction(backbone, text, layout, drop, options)
            )

        alone = velocity(prepared.first(noise.batch), noise)
        if not guided:
            return alone
        both = velocity(prepared, Tokens.pack([noise, noise]))
        return guidance.velocity(both, alone, noise.lengths)


class _Counted:
    """A velocity that tells how often it was evaluated."""

    takes_context = True

    def __init__(self, velocity: flowsolvers.Velocity, progress: Callable[[int], None]) -> None:
        self.velocity, self.progress, self.count = velocity, progress, 0

    def __call__(
        self, t: Tensor, x: Tensor, *, context: flowsolvers.Context | None = None
    ) -> Tensor:
        found = flowsolvers.evaluate(self.velocity, t, x, context)
        self.count += 1
        self.progress(self.count)
        return found


def _told(
    on_step: Callable[[flowsolvers.Reached[Tensor]], object] | None,
    progress: Callable[[int], None] | None,
) -> Callable[[flowsolvers.Reached[Tensor]], object] | None:
    """Tell both of a step's end."""
    if progress is None:
        return on_step

    def tell(event: flowsolvers.Reached[Tensor]) -> None:
        progress(event.evaluations)
        if on_step is not None:
            on_step(event)

    return tell


def _seeds(seed: int | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Give each sample its seed and its place among those that share it."""
    if isinstance(seed, int):
        return [(seed, place) for place in range(count)]
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds for {count} prompts; give one each")
    return [(one, 0) for one in seed]
