"""From prompts to media: the whole way through a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

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
from nextdit_core.folder import new_folder
from nextdit_core.guidance import Guidance
from nextdit_core.lumina_pipeline import load_lumina
from nextdit_core.modality import Modality, Size
from nextdit_core.model_folder import is_saved_model
from nextdit_core.packed_prediction import PackedPrediction
from nextdit_core.sampling_plan import check_sampling, named_schedule
from nextdit_core.saved_model import ModelCard, load_model, write_model
from nextdit_core.sde import SDE
from nextdit_core.step import Step, stream
from nextdit_core.tokens import Tokens
from nextdit_core.training.draws import generator

if TYPE_CHECKING:
    from nextdit_core.text_encoders import TextEncoder

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
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        text_encoder: str | Path | None = None,
        autoencoder: str | Path | None = None,
        ema: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a saved model, or Lumina-Next as others save it: text encoder, backbone, modality.

        Args:
            path: A saved model, a run, whose newest complete checkpoint is taken, or a diffusers
                pipeline of Lumina-Next (`LuminaPipeline`); or OWNER/NAME of one on the Hugging
                Face hub. Or Lumina-Next's backbone alone, such as the authors' folder, which
                needs the next two.
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: Of the backbone's weights. A text encoder of the transformers library is loaded
                in float32 or, beside 16-bit weights, in bfloat16. Image autoencoders stay
                in float32, and so does the ODE state.
            text_encoder: Folder, or name on the hub, of a language model, in place of the
                diffusers pipeline's: "google/gemma-2b".
            autoencoder: Folder, or name on the hub, of an image autoencoder of diffusers,
                likewise: "stabilityai/sdxl-vae". Either may be a whole pipeline, of which that
                part is taken.
            ema: Take the authors' averaged weights.
            revision: Branch, tag or commit on the hub.
            token: Access token of the hub; True takes the stored one.
            cache_dir: Where downloads are kept.
            local_files_only: Take what was downloaded before.

        Returns:
            The pipeline. Of Lumina-Next it guides as the authors do, by 4 and the first three of
            four channels, on the time grid that the scheduler's shift says (4 for the authors'
            folder), at the size that its config says.

        Raises:
            UserError: The folder is not a complete model of this format, or needs a part
                that is not installed; a pipeline is of another class (Lumina-2 is named), lacks a
                part or has parts that do not fit one another; or a backbone came alone.
        """
        place = local_path(
            path,
            pipeline=True,
            alone=text_encoder is not None and autoencoder is not None,
            ema=ema,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        given = {"text_encoder": text_encoder, "autoencoder": autoencoder}
        if not is_saved_model(place):
            found = load_lumina(place, pick_device(str(device)), dtype, ema=ema, **given)
            return cls(*found)
        asked = [name for name, value in given.items() if value is not None] + ["ema"] * ema
        if asked:
            raise UserError(
                f"{path} is a saved model with parts of its own; leave out {' and '.join(asked)}"
            )
        return cls(*load_model(place, pick_device(str(device)), dtype))

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `from_pretrained` reads: a saved model of this package.

        What was put together from several places, such as the authors' backbone, a language model
        and an autoencoder, is then found at one. Frozen parts keep their names and options and
        stay where they are.

        Args:
            path: Where it shall stand; it must not exist.

        Raises:
            UserError: The place is taken or not writable, or the disk is full.
        """
        encoder, config = self.model.text_encoder, self.model.backbone.config
        card = replace(self.card, modality_options=self.modality.options)
        if encoder is not None:
            card = replace(card, text_encoder_options=cast("TextEncoder", encoder).options)
        with new_folder(Path(path)) as folder:
            write_model(folder, self.model.state_dict(), config, card)

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
        schedule: str | flowsolvers.Schedule | None = None,
        guidance: float | Guidance | None = None,
        negative_prompt: str | Sequence[str] = "",
        extrapolate: Extrapolation | str | None = None,
        context_drop: ContextDrop | str | None = None,
        latents: Sequence[Tensor] | None = None,
        start: float = 0.0,
        sde: SDE | str | None = None,
        output: Literal["media", "tensor", "latent"] = "media",
        on_step: Callable[[Step], object] | None = None,
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
            schedule: A flowsolvers time grid or its name, such as "shift:4"; "auto" is the
                solver's own.
            guidance: Classifier-free guidance scale, 1 is no guidance; or a `Guidance`, for
                another rule, an interval or chosen channels. A number guides the channels that
                the model's card says, a `Guidance` those that it says itself.
            negative_prompt: What guidance leads away from; one for all, or one per prompt.
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
            output: "media"; "tensor", the numbers of media, such as pixels in [-1, 1], unrounded;
                or "latent", to leave out the decoding.
            on_step: Called with a `Step` at each step's end: the latents, a preview, and a way
                to stop.
            progress: Called at each step's end with the number of evaluations so far.

        Returns:
            The media, as the modality's `decode` makes them; or tensors on the CPU.

        Raises:
            UserError: A name, size or number is not acceptable.
            flowsolvers.NotFiniteError: The state became NaN or infinite; says when, and holds the
                last one that was finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("no prompt given; give at least one")
        if output not in ("media", "tensor", "latent"):
            raise UserError(f"output is {output!r}; expected 'media', 'tensor' or 'latent'")
        alone = isinstance(negative_prompt, str)
        negatives = [negative_prompt] * len(prompts) if alone else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise UserError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one "
                f"each"
            )
        sizes = self._sizes(size, latents, len(prompts))
        seeds = _seeds(seed, len(prompts))
        sampling = self.card.sampling
        guided = guidance if isinstance(guidance, Guidance) else self.guidance(guidance)
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
            prompts, noise, guided, negatives, drop or ContextDrop(()), options
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
                on_step=self._told(on_step, progress, noise, sizes),
            ).x
        samples = noise.with_values(x).split()
        found = [
            self.modality.detokenize(values.float().cpu(), one)
            for values, one in zip(samples, sizes, strict=True)
        ]
        if output == "latent":
            return found
        decode = self.modality.decode if output == "media" else self.modality.decode_tensor
        return [decode(one) for one in found]

    def stream(self, prompt: str | Sequence[str], **request: Any) -> Iterator[Step]:
        """Sample step by step: `for step in pipe.stream(prompt): show(step.preview()[0])`.

        Args:
            prompt: One or several.
            request: The other arguments of a call, but `output` and `on_step`.

        Returns:
            An iterator over each step's end, the last at t = 1, where `preview()` is the media
            and `data()` the latents that a call would return. Leaving the loop stops the request,
            and so does `step.stop()`.

        Raises:
            UserError: From the first step on: see a call.
        """
        taken = [name for name in ("output", "on_step") if name in request]
        if taken:
            raise UserError(
                f"stream takes no {' or '.join(taken)}: each step has latents(), data() and "
                f"preview()"
            )
        return stream(lambda look: self(prompt, output="latent", on_step=look, **request))

    def guidance(self, scale: float | None = None, **settings: Any) -> Guidance:
        """Guide as the model's card says, unless told otherwise.

        Args:
            scale: The card's when None.
            settings: Other arguments of `Guidance`.

        Returns:
            The guidance.

        Raises:
            UserError: See `Guidance`.
        """
        sampling = self.card.sampling
        settings.setdefault("channels", sampling.get("guidance_channels"))
        return Guidance(sampling["guidance"] if scale is None else scale, **settings)

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
        negatives: Sequence[str],
        drop: ContextDrop,
        options: Mapping[str, Any],
    ) -> flowsolvers.Velocity:
        """Make the velocity of the guided ODE; text is encoded and projected once, here."""
        backbone, encoder = self.model.backbone, self.model.text_encoder
        guided = guidance.guides and encoder is not None
        condition: Conditioning | None = None
        if encoder is not None:
            asked = [*prompts, *negatives] if guided else prompts
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
        modality = self.modality
        return guidance.velocity(
            both, alone, noise.lengths, modality.token_dim, modality.latent_channels
        )

    def _told(
        self,
        on_step: Callable[[Step], object] | None,
        progress: Callable[[int], None] | None,
        layout: Tokens,
        sizes: Sequence[Size],
    ) -> Callable[[flowsolvers.Reached[Tensor]], object] | None:
        """Tell both of a step's end."""
        if on_step is None and progress is None:
            return None

        def tell(reached: flowsolvers.Reached[Tensor]) -> None:
            if progress is not None:
                progress(reached.evaluations)
            if on_step is not None:
                on_step(Step(reached, layout, self.modality, sizes, self.card.objective.curve))

        return tell


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


def _seeds(seed: int | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Give each sample its seed and its place among those that share it."""
    if isinstance(seed, int):
        return [(seed, place) for place in range(count)]
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds for {count} prompts; give one each")
    return [(one, 0) for one in seed]
