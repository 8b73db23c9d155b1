"""The training loop: one function, the same for every engine."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextdit_core.backbone import NextDiT
from nextdit_core.checkpoints.checkpoint import open_checkpoint
from nextdit_core.checkpoints.shards import load_weights, save_weights
from nextdit_core.config import NextDiTConfig
from nextdit_core.dataset import TokenDataset, load_dataset
from nextdit_core.errors import UserError
from nextdit_core.flow_model import FlowModel
from nextdit_core.folder import new_folder
from nextdit_core.modality import Modality, load_modality
from nextdit_core.model_folder import check_format
from nextdit_core.objective import FlowMatching
from nextdit_core.progress import Progress
from nextdit_core.recipe import Recipe
from nextdit_core.sampling_plan import check_sampling
from nextdit_core.saved_model import ModelCard, load_parts, write_model
from nextdit_core.text_encoders import load_text_encoder
from nextdit_core.text_encoders.cached import CachedTextEncoder
from nextdit_core.training.activations import checkpoint_blocks
from nextdit_core.training.batch import batch_loss, make_batch
from nextdit_core.training.board import Board, check_board
from nextdit_core.training.draws import draw, time_shift
from nextdit_core.training.flops import FlopMeter
from nextdit_core.training.lora import add_adapters, check_adapters, merged, save_adapter
from nextdit_core.training.peak import peak_tflops
from nextdit_core.training.plan import Batch, batches_from, epoch_plan, micro_batches, rank_slice
from nextdit_core.training.run_folder import RunFolder
from nextdit_core.training.runtime import Runtime
from nextdit_core.training.start import GivenWeights, check_sizes
from nextdit_core.training.state import TrainState, learning_rate
from nextdit_core.training.throughput import Throughput

__all__ = ["Ingredients", "prepare", "train"]

#: So many steps in a row whose gradients are not finite end a run.
_PATIENCE = 10

#: The averaged adapters of a checkpoint.
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Ingredients:
    """What a recipe's names stand for, built before any expensive work."""

    recipe: Recipe
    modality: Modality
    data: TokenDataset
    config: NextDiTConfig
    objective: FlowMatching
    text_encoder_options: Mapping[str, Any]
    given: GivenWeights | None = None

    def new_model(self) -> FlowModel:
        """Build the model that a run starts with: of given weights, else of the seed's."""
        recipe = self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            if self.given is None:
                model = FlowModel(NextDiT(self.config), _text_encoder(recipe))
            else:
                encoder = _text_encoder(recipe)
                model = FlowModel(self.given.read(encoder), encoder)
            if recipe.lora is not None:
                model.requires_grad_(False)
                add_adapters(model.backbone, recipe.lora)
        return model

    def card(self, step: int) -> ModelCard:
        """Describe the model after some steps."""
        recipe = self.recipe
        return ModelCard(
            modality=recipe.modality,
            modality_options=dict(self.modality.options),
            text_encoder=recipe.text_encoder,
            text_encoder_options=self.text_encoder_options,
            sampling=recipe.sampling.model_dump(),
            objective=self.objective,
            step=step,
            example_prompts=sorted(set(self.data.captions))[:20],
        )


def prepare(recipe: Recipe) -> Ingredients:
    """Resolve every name of a recipe and check that the parts fit.

    Args:
        recipe: The recipe.

    Returns:
        The parts.

    Raises:
        UserError: A name is unknown, an option is wrong, or sizes do not fit.
    """
    objective = FlowMatching(**recipe.objective.model_dump())
    sampling = recipe.sampling
    first, last = objective.sampling_times
    check_sampling(sampling.solver, sampling.schedule, sampling.nfe, start=first, end=last)
    time_shift(recipe.time_shift, 1)
    if recipe.tensorboard:
        check_board()
    modality = load_modality(recipe.modality, recipe.modality_options)
    encoder: Any = _text_encoder(recipe)
    needed = {
        "token_dim": modality.token_dim,
        "axes": modality.axes,
        "text_dim": encoder.text_dim,
    }
    given = None
    if recipe.init_from is None:
        config = NextDiTConfig(**needed, **recipe.model.to_fields())
    else:
        newest = RunFolder(recipe.out).newest()
        if newest is None:
            given = GivenWeights.open(recipe.init_from)
            given.check(recipe, encoder, objective)
            config = given.checkpoint.config
        else:  # a run that stands somewhere goes on from there
            config = open_checkpoint(newest).config
        check_sizes(config, needed, recipe.model, None if given is None else given.card)
    if recipe.lora is not None:
        if recipe.init_from is None:
            raise UserError("lora adapts given weights; say which: init_from=...")
        check_adapters(recipe.lora, config)
    data = TokenDataset(load_dataset(recipe.dataset, recipe.dataset_options), modality)
    epoch_plan(data.lengths, recipe.batch_tokens, recipe.seed, 0)
    return Ingredients(recipe, modality, data, config, objective, encoder.options, given)


def _text_encoder(recipe: Recipe) -> nn.Module:
    encoder = load_text_encoder(recipe.text_encoder, recipe.text_encoder_options)
    return encoder if recipe.text_cache is None else CachedTextEncoder(encoder, recipe.text_cache)


def train(recipe: Recipe, runtime: Runtime) -> None:
    """Train one worker's share of a run until its last step, from where it stands.

    Resumes from the newest complete checkpoint in the run folder. Which samples a step sees
    and what is random about them is computed from the seed, so that a killed and resumed run
    draws the same curve. Rank 0 writes the run folder.

    Args:
        recipe: The run.
        runtime: This worker's surroundings.

    Raises:
        UserError: The recipe or the run folder cannot be used.
    """
    parts = prepare(recipe)
    run = RunFolder(recipe.out)
    state = TrainState.fresh(parts.new_model().to(runtime.device), recipe.optimizer)
    _resume(state, run, lora=recipe.lora is not None)
    workers = _workers(runtime)
    if runtime.rank == 0:
        run.rewind(state.step)
        run.event("start", step=state.step, steps=recipe.steps, workers=workers)
        if parts.given is not None:
            place = parts.given.checkpoint
            run.event("init_from", place=str(place.place), layout=place.layout.value)
    if not _fill_text_cache(state.model.text_encoder, parts, run, runtime):
        return
    if recipe.checkpoint_activations:
        checkpoint_blocks(state.model.backbone)
    board = None
    if recipe.tensorboard and runtime.rank == 0:
        board = Board(run.board_folder, state.step)
    try:
        _steps(state, parts, run, board, runtime)
    finally:
        if board is not None:
            board.close()


def _steps(
    state: TrainState, parts: Ingredients, run: RunFolder, board: Board | None, runtime: Runtime
) -> None:
    """Take one step after the other, until the last or until a stop."""
    recipe = parts.recipe
    model = _parallel(state.model, runtime)
    precision = (
        torch.autocast(runtime.device.type, torch.bfloat16)
        if recipe.precision == "bfloat16"
        else nullcontext()
    )
    lengths = parts.data.lengths
    walk = batches_from(lengths, recipe.batch_tokens, recipe.seed, state.epoch, state.batch)
    meter = FlopMeter(state.model.backbone, text_learns=_text_learns(state.model))
    rates = Throughput(_peak(recipe, runtime))
    pending: list[tuple[dict[str, Any], Tensor]] = []
    while state.step < recipe.steps:
        with rates.making_data():
            epoch, index, batch = next(walk)
        rate = learning_rate(recipe.optimizer, state.step, recipe.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = _backward(model, parts, epoch, batch, runtime, precision, rates)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.optimizer.grad_clip)
        state.update(norm)
        state.step, state.epoch, state.batch = state.step + 1, epoch, index + 1
        state.update_average(recipe.ema_decay)
        done = meter.take() if rank_slice(batch, runtime.rank, runtime.world_size) else 0
        rates.step(len(batch), sum(lengths[one] for one in batch), done)
        row = {"step": state.step, "epoch": epoch, "lr": rate}
        pending.append((row, torch.stack([loss, norm.to(loss) / runtime.world_size])))

        last = state.step == recipe.steps
        save = last or state.step % recipe.checkpoint_every == 0
        if save or state.step % recipe.log_every == 0:
            stop, speed = _flush(pending, state, run, board, runtime, rates)
            written = _save(state, parts, run, runtime) if save or stop else None
            now = {"step": float(state.step), "loss": _last_loss(pending)}
            runtime.report(now | speed, written)
            pending.clear()
            rates.resume()
            if stop and not last:
                if runtime.rank == 0:
                    run.event("stop", step=state.step)
                return
    if runtime.rank == 0:
        run.event("end", step=state.step)


def _fill_text_cache(
    encoder: nn.Module | None, parts: Ingredients, run: RunFolder, runtime: Runtime
) -> bool:
    """Encode the captions that no run has encoded before; False where training was stopped."""
    if not isinstance(encoder, CachedTextEncoder):
        return True
    captions = {"", *parts.data.captions}  # a dropped caption is the empty one
    encoding = encoder.fill(captions, begin=runtime.rank / runtime.world_size)
    stop = False
    if runtime.rank > 0:
        stop = any(runtime.stop_requested() for _ in encoding)
    else:
        with Progress("encoding captions", len(captions), unit="caption") as progress:
            for done, made in encoding:
                note = f"{made} new"
                if done == len(captions):
                    kept, size = encoder.cache.size()
                    note += f"; {kept} take {size / 1e6:.1f} MB in {encoder.cache.folder}"
                    run.event("text_cache", made=made, captions=kept, bytes=size)
                progress.to(done, note)
                stop = runtime.stop_requested()
                if stop:
                    break
    votes = torch.tensor(float(stop), device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(votes)
    return votes.item() == 0


def _backward(
    model: nn.Module,
    parts: Ingredients,
    epoch: int,
    batch: Batch,
    runtime: Runtime,
    precision: AbstractContextManager[object],
    rates: Throughput,
) -> Tensor:
    """Add up the gradients of this rank's share of one global batch, and give its loss."""
    own: Sequence[int] = rank_slice(batch, runtime.rank, runtime.world_size)
    # A rank without samples still has to take part in the reduction: one sample, weight 0.
    weight, indices = (1.0, own) if own else (0.0, batch[:1])
    lengths = parts.data.lengths
    total = sum(lengths[index] for index in batch)
    losses: list[Tensor] = []
    *early, last = micro_batches(indices, lengths, parts.recipe.micro_batch_tokens)
    for some in [*early, last]:
        reduce = nullcontext()
        if some is not last and isinstance(model, nn.parallel.DistributedDataParallel):
            reduce = model.no_sync()
        with reduce:
            with precision:
                loss = _rank_loss(model, parts, epoch, some, total, runtime.device, rates) * weight
            # The wrapper averages over ranks; the ranks' losses add up to the batch's.
            (loss * runtime.world_size).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _rank_loss(
    model: nn.Module,
    parts: Ingredients,
    epoch: int,
    indices: Sequence[int],
    total: int,
    device: torch.device,
    rates: Throughput,
) -> Tensor:
    """Compute the loss of some samples, as a share of a batch of `total` tokens."""
    recipe, data = parts.recipe, parts.data
    with rates.making_data():
        draws = [
            draw(
                recipe.seed,
                epoch,
                index,
                data.values[index].shape,
                time_distribution=recipe.time_distribution,
                shift=recipe.time_shift,
                caption_dropout=recipe.caption_dropout,
            )
            for index in indices
        ]
        batch = make_batch(parts.objective, data, indices, draws, device)
    return batch_loss(model, parts.objective, batch, total)


def _text_learns(model: FlowModel) -> bool:
    encoder = model.text_encoder
    return encoder is not None and any(one.requires_grad for one in encoder.parameters())


def _peak(recipe: Recipe, runtime: Runtime) -> float | None:
    """Say what all devices of the run can do, where that is known."""
    one = recipe.peak_tflops or peak_tflops(runtime.device, recipe.precision)
    return None if one is None else one * runtime.world_size


def _parallel(model: FlowModel, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return model
    ids = [runtime.device.index] if runtime.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _workers(runtime: Runtime) -> list[dict[str, Any]]:
    own = {"rank": runtime.rank, "host": socket.gethostname(), "pid": os.getpid()}
    if runtime.world_size == 1:
        return [own]
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, own)
    return gathered


def _flush(
    pending: list[tuple[dict[str, Any], Tensor]],
    state: TrainState,
    run: RunFolder,
    board: Board | None,
    runtime: Runtime,
    rates: Throughput,
) -> tuple[bool, dict[str, float]]:
    """Sum the pending numbers over the ranks, write them, and agree on whether to stop.

    A step whose gradients were not finite was left out; that is written too. The rates of the
    steps since the last report stand in the last row, and end where the numbers are read: there
    the host has to wait for the device, whatever is measured.
    """
    own = [float(runtime.stop_requested()), float(rates.flops)]
    values = torch.stack(
        [*(numbers for _, numbers in pending), torch.tensor(own, device=runtime.device)]
    )
    if runtime.world_size > 1:
        dist.all_reduce(values)
    *numbers, (stops, flops) = values.tolist()
    speed = rates.numbers(flops)
    pending[-1][0].update(speed)
    for (row, _), (loss, norm) in zip(pending, numbers, strict=True):
        row |= {"loss": loss, "grad_norm": norm}
        if math.isfinite(loss) and math.isfinite(norm):
            state.left_out = 0
            continue
        row["skipped"] = True
        state.left_out += 1
        if state.left_out == _PATIENCE:
            raise UserError(
                f"the loss of step {row['step']} is {loss} and the norm of its gradients {norm}; "
                f"so were those of {_PATIENCE - 1} steps before it, and all were left out. Lower "
                f"optimizer.lr (now {row['lr']:g}) and start again from the last checkpoint in "
                f"{run.path}"
            )
    if runtime.rank == 0:
        rows = [row for row, _ in pending]
        run.append(rows)
        if board is not None:
            board.write(rows)
    return stops > 0, speed


def _last_loss(pending: list[tuple[dict[str, Any], Tensor]]) -> float:
    return float(pending[-1][0]["loss"])


def _save(state: TrainState, parts: Ingredients, run: RunFolder, runtime: Runtime) -> Path:
    path = run.checkpoint(state.step)
    if runtime.rank == 0:
        lora = parts.recipe.lora
        with new_folder(path) as folder:
            weights = {**state.model.state_dict(), **state.average}
            whole = weights if lora is None else merged(weights, lora)
            write_model(folder, whole, parts.config, parts.card(state.step))
            (folder / "training").mkdir()
            state.save(folder / "training")
            if lora is not None:  # the model above does not tell them from the weights
                save_weights(folder / "training" / AVERAGE, state.average)
                save_adapter(folder / "adapter", weights, lora, parts.recipe.init_from)
        run.prune(parts.recipe.keep_checkpoints)
        run.event("checkpoint", step=state.step)
    if runtime.world_size > 1:
        dist.barrier()
    return path


def _resume(state: TrainState, run: RunFolder, *, lora: bool) -> None:
    newest = run.newest()
    if newest is None:
        return
    check_format(newest)
    if lora:
        average = load_weights(newest / "training" / AVERAGE, torch.device("cpu"))
    else:
        average = load_parts(newest, state.model, torch.device("cpu"))
    state.load(newest / "training", average)
