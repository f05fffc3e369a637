"""The training loop of a latent reward.

One optimizer step: draw a batch of pairs and, per pair, one noise sample and one noise level; diffuse both
latents of the pair with them; score all latents in one forward; apply the pairwise loss. On a share of the
steps (`ensemble_fraction`) a pair gets several levels and the head reads their tokens together, as it will in
a token-level ensemble.

Departures from the paper's code: the average of the weights is really used (in validation and in what is
saved), trained weights stay in float32, gradients are clipped once per step and not on every accumulated
part, validation sees the same noise every time, and a resumed run gives the same numbers as one that was
never stopped. Everything random in step n is a function of (seed, n), so cutting a batch into parts or over
devices changes nothing but rounding.
"""

import functools
import json
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor

from dina_lrm.checkpoints.dina import OWNED, fill_checkpoint
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.likelihood import pairwise_loss
from dina_lrm.core.precision import float32_masters, matrix_precision
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.core.sharding import is_sharded
from dina_lrm.data.shards.read import PairSet
from dina_lrm.errors import InvalidInputError, RunError
from dina_lrm.files import atomic_folder, atomic_write, json_types, recover_folder
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs.distribution import check_distribution, drop_gathered, on_cpu, treat_as_forward
from dina_lrm.runs.interrupt import Interrupt, Interrupted
from dina_lrm.runs.optimizer import adamw
from dina_lrm.runs.progress import Reporter, StepMetrics, Window
from dina_lrm.runs.state import RunState
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.loader import StepLoader, step_parts
from dina_lrm.training.result import TrainResult, calibrated
from dina_lrm.training.step import PairScorer, loss_level
from dina_lrm.training.validation import (
    ValidationMargins,
    fixed_sample,
    levels_label,
    validation_margins,
)

__all__ = ["StepMetrics", "check_batch_size", "train"]


# --- the run -----------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    model: RewardModel,
    train_pairs: PairSet,
    validation_pairs: PairSet | None = None,
    *,
    on_step: Callable[[StepMetrics], None] | None = None,
    console: Console | None = None,
    card: Callable[[TrainResult], str] | None = None,
) -> TrainResult:
    """Train `model` in place on pairs of latents.

    The model ends with the best (or last) averaged weights, in evaluation mode, marked as trained; with
    validation pairs, also with the noise levels that scored best on them as its default, and with the scale
    that makes its probabilities true there. Pairs on which no candidate beats a coin choose nothing
    (`TrainResult.uncalibrated`). Only under FSDP2 the model stays sharded: load what was saved.

    Args:
        config: the run; `model` and `data` of it are taken as done, since both are given here.
        model: from `RewardModel.initialize`, or a trained one to go on with.
        validation_pairs: of prompts that are not trained on.
        on_step: called with every line of metrics as it is made. It must not score with the model.
        console: where progress goes: a bar on a terminal, lines elsewhere; None is standard error.
        card: what OUTPUT/README.md says about the finished run.

    Raises:
        InvalidInputError: pairs and settings do not fit each other or the model.
        Interrupted: SIGINT or SIGTERM; the step in progress was finished and OUTPUT/last holds it.
    """
    return _Run(config, model, train_pairs, validation_pairs, on_step, console, card).run()


def check_batch_size(batch_size: int, num_pairs: int) -> None:
    """Raise InvalidInputError for a step that would need pairs twice."""
    if not 1 <= batch_size <= num_pairs:
        raise InvalidInputError(
            f"batch_size = {batch_size}: must be in [1, {num_pairs}], the number of training pairs"
        )


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        model: RewardModel,
        train_pairs: PairSet,
        validation_pairs: PairSet | None,
        on_step: Callable[[StepMetrics], None] | None,
        console: Console | None,
        card: Callable[[TrainResult], str] | None,
    ) -> None:
        self.config, self.model, self.card = config, model, card
        self.accelerator = Accelerator(
            cpu=on_cpu(config.cpu),
            mixed_precision="no",  # `config.precision` decides, whatever accelerate is configured for
            gradient_accumulation_steps=config.accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        check_distribution(self.accelerator.distributed_type, plugin, model, compile=config.compile)
        parts = config.accumulation_steps * self.accelerator.num_processes
        if config.batch_size % parts:
            raise InvalidInputError(
                f"batch_size = {config.batch_size} does not divide over {self.accelerator.num_processes} "
                f"devices x accumulation_steps = {config.accumulation_steps}"
            )
        if len(train_pairs) == 0:
            raise InvalidInputError("there are no training pairs")
        check_batch_size(config.batch_size, len(train_pairs))
        for pairs in filter(None, (train_pairs, validation_pairs)):
            for pair in pairs.examples:
                batch = pairs.batch(pair[None]).to("cpu")
                conditioning = Conditioning(
                    batch.prompt_embeds, batch.pooled_prompt_embeds, batch.attention_mask
                )
                model.check_inputs(batch.latents_chosen, conditioning, pairs.latent_space)
        self.train_pairs = _labelled(train_pairs, config)
        self.validation_pairs = (
            validation_pairs if validation_pairs is not None and len(validation_pairs) else None
        )
        self.output = Path(config.output) if config.output is not None else None
        float32_masters(model.trainable_parameters())
        optimizer = adamw(model, config.optimizer)
        self.scorer = PairScorer(model, gradient_checkpointing=config.gradient_checkpointing)
        prepared: Any = torch.compile(self.scorer, dynamic=False) if config.compile else self.scorer
        self.prepared, self.optimizer = self.accelerator.prepare(prepared, optimizer)
        self.is_sharded = self.accelerator.is_fsdp2
        if self.is_sharded:
            treat_as_forward(self.scorer, "margins")
        # After preparing, which puts shards in the place of full parameters.
        self.state = RunState(
            config,
            {name: p for name, p in model.named_parameters() if p.requires_grad},
            self.optimizer,
            fingerprint=self.train_pairs.fingerprint(),
            data="pairs",
            unit="step",
            may_change=_MAY_CHANGE,
        )
        self.is_main = self.accelerator.is_main_process
        if self.output is not None and self.is_main:
            for folder in (self.output, self.output / "best"):
                recover_folder(folder, OWNED)  # of a run that was killed while it saved
            recover_folder(self.output / "last")
            self.output.mkdir(parents=True, exist_ok=True)
        self.reporter = Reporter(
            self.output if self.is_main else None,
            config.num_steps,
            tensorboard=config.tensorboard,
            wandb=None if config.wandb is None else (config.wandb, json_types(config)),
            console=(console or Console(stderr=True)) if self.is_main else Console(quiet=True),
            on_step=on_step,
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def run(self) -> TrainResult:
        config, state = self.config, self.state
        state.start()
        if config.resume:
            self.accelerator.wait_for_everyone()
            if state.resume() and state.step > 0:
                self.model.trained = True
        self.reporter.start(state.step)
        steps_before = state.step
        if self.output is not None and self.is_main:
            atomic_write(self.output / "train_config.json", json.dumps(json_types(config), indent=2).encode())

        stopped_by = "steps"
        devices = [self.device] if self.device.type == "cuda" else []
        make = functools.partial(
            step_parts,
            config,
            self.train_pairs,
            self.model.schedule,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        loader = StepLoader(make, config.num_steps)
        with (
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
            self.reporter,
            loader,
            Interrupt() as interrupt,
        ):
            # Under autocast the head's RMSNorm meets bfloat16 tokens with a float32 scale, as intended.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            self.model.train()
            window = Window(self.device)
            while state.step < config.num_steps:
                rate = state.set_learning_rate(self._elapsed_fraction())
                norm = self._optimize(loader, window)
                state.step += 1
                self.model.trained = True
                # All of them are of other weights.
                self.model.config = replace(self.model.config, calibrations=(), adaptive=None)
                self.model.card = None
                out_of_time = self._out_of_time()
                last = out_of_time or state.step == config.num_steps
                if state.step % config.log_every == 0 or last:
                    self._log_training(window, loader, rate, norm)
                self.reporter.step_done(state.step, config.batch_size)
                with window.paused():
                    due = state.step % config.validation.every == 0 or last
                    if self.validation_pairs is not None and due:
                        self._validate_and_keep()
                    interrupted = interrupt.asked(self.accelerator)
                    if state.step % config.checkpoint_every == 0 or last or interrupted:
                        self._checkpoint()
                if interrupted:
                    # A launcher ends the others as soon as one has ended, so none does before all is saved.
                    self.accelerator.wait_for_everyone()
                    raise Interrupted(interrupt.number, state.kept())
                if out_of_time or self._out_of_patience():
                    stopped_by = "time_budget" if out_of_time else "patience"
                    if not last:
                        self._checkpoint()
                    break
        # A finished run that is given again has taken no longer for it.
        return self._finish(stopped_by, state.seconds if state.step > steps_before else state.seconds_before)

    # --- one optimizer step

    def _elapsed_fraction(self) -> float:
        budget = self.config.time_budget_seconds
        return 0.0 if budget is None else self._agreed(self.state.seconds) / budget

    def _agreed(self, value: float) -> float:
        """The main process's value, so that all devices take the same decision."""
        if self.accelerator.num_processes == 1:
            return value
        agreed: Any = broadcast(torch.tensor(value, device=self.device, dtype=torch.float64))
        return float(agreed)

    def _out_of_time(self) -> bool:
        return self._elapsed_fraction() >= 1.0

    def _out_of_patience(self) -> bool:
        patience = self.config.validation.patience
        if patience is None or self.state.best_step is None:
            return False
        return self.state.step - self.state.best_step >= patience * self.config.validation.every

    def _optimize(self, loader: StepLoader, window: Window) -> Tensor:
        """One step over all accumulated parts; returns the gradient's norm before clipping."""
        config, accelerator = self.config, self.accelerator
        # Dropout too follows from the position, so no random state needs to be stored.
        torch.manual_seed(mix_seeds(config.seed, Stream.DROPOUT, self.state.step, accelerator.process_index))
        loss_config = config.loss
        for part in loader.parts(self.state.step):
            part = part.to(self.device)
            with accelerator.accumulate(self.prepared):
                with self._precision():
                    chosen, rejected = self.prepared(part.batch, part.noise, part.sigma)
                loss = pairwise_loss(
                    chosen.float(),
                    rejected.float(),
                    loss_level(part.sigma),
                    target=part.batch.target,
                    likelihood=loss_config.likelihood,
                    loss=loss_config.loss,
                    slope=loss_config.slope,
                    floor=loss_config.floor,
                    variance=loss_config.variance,
                    margin=loss_config.margin,
                ).mean()
                accelerator.backward(loss)  # divides by the number of parts
            window.add(loss.detach(), chosen.detach() - rejected.detach(), part.batch.target)
        norm: Any = accelerator.clip_grad_norm_(
            list(self.state.parameters.values()), config.optimizer.max_gradient_norm
        )
        self.state.optimize()
        if is_sharded(norm):
            norm = norm.full_tensor()
        return norm if isinstance(norm, Tensor) else torch.tensor(float("nan"))

    def _precision(self) -> AbstractContextManager[None]:
        """Arithmetic of the forward pass; the backward pass follows it."""
        return matrix_precision(self.config.precision, self.device.type)

    # --- validation

    def _margins(self, pairs: PairSet) -> ValidationMargins:
        self.model.eval()
        margins = validation_margins(
            self.scorer,
            pairs,
            self.config.validation.candidates,
            accelerator=self.accelerator,
            precision=self._precision,
            batch_size=self.config.validation.batch_size,
            seed=self.config.seed,
        )
        if self.is_sharded:
            drop_gathered(self.scorer)
        self.model.train()
        return margins

    def _validate_and_keep(self) -> None:
        assert self.validation_pairs is not None
        state = self.state
        pairs = fixed_sample(self.validation_pairs, self.config.validation.max_pairs, seed=self.config.seed)
        with self.state.averaged():
            accuracies = self._margins(pairs).accuracy
            best = max(accuracies.values())
            if state.best_accuracy is None or best > state.best_accuracy:
                state.best_accuracy, state.best_step = best, state.step
                state.best_weights = [shard.detach().cpu().clone() for shard in state.shards()]
                if self.output is not None:
                    self._save_model(self.output / "best", state.step)
        labelled = {levels_label(levels): value for levels, value in accuracies.items()}
        self.reporter.tell(StepMetrics(step=state.step, seconds=state.seconds, validation=labelled))

    # --- what is written

    def _log_training(self, window: Window, loader: StepLoader, rate: float, norm: Tensor) -> None:
        loss, accuracy, pairs, seconds = window.close(self.accelerator)
        waited, loader.waited_seconds = loader.waited_seconds, 0.0
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {self.state.step}: training has diverged; "
                f"lower optimizer.learning_rate (now {rate:g}) or resume from an earlier checkpoint"
            )
        self.reporter.tell(
            StepMetrics(
                step=self.state.step,
                seconds=self.state.seconds,
                loss=loss,
                accuracy=accuracy,
                learning_rate=rate,
                gradient_norm=float(norm),
                pairs_per_second=pairs / seconds,
                data_wait_fraction=waited / seconds,
                epoch=self.state.step * self.config.batch_size / len(self.train_pairs),
            )
        )

    def _save_model(self, folder: Path, step: int) -> None:
        """The main process writes; all gather where the weights are sharded."""
        if self.is_main:
            self.model.save_pretrained(folder, training_step=step)
        elif self.is_sharded:
            self.model.checkpoint()

    def _checkpoint(self) -> None:
        """OUTPUT/last: the model with averaged weights, and beside it all that resuming needs."""
        if self.output is None:
            return
        last = self.output / "last"
        if self.is_main:
            with atomic_folder(last) as aside:
                with self.state.averaged():
                    fill_checkpoint(aside, self.model.checkpoint(self.state.step))
                self.state.save(aside)
        elif self.is_sharded:
            with self.state.averaged():
                self.model.checkpoint()
            self.state.save(last)

    # --- the end

    def _finish(self, stopped_by: str, seconds: float) -> TrainResult:
        state = self.state
        weights = None if self.config.keep == "last" else state.best_weights
        if weights is None and state.average is not None:
            weights = state.average.shadow_params
        if weights is not None:
            with torch.no_grad():
                for shard, value in zip(state.shards(), weights, strict=True):
                    shard.copy_(value)
        margins = None if self.validation_pairs is None else self._margins(self.validation_pairs)
        levels, calibrations, uncalibrated = (None, (), None) if margins is None else calibrated(margins)
        self.model.config = replace(
            self.model.config,
            noise_levels=levels or self.model.config.noise_levels,
            calibrations=calibrations,
        )
        self.model.eval()
        result = TrainResult(
            steps=state.step,
            seconds=seconds,
            stopped_by=stopped_by,
            best_step=state.best_step,
            best_accuracy=state.best_accuracy,
            noise_levels=levels,
            calibration_scale=calibrations[0].scale if calibrations else None,
            uncalibrated=uncalibrated,
            validation={}
            if margins is None
            else {levels_label(one): value for one, value in margins.accuracy.items()},
            margins=margins,
            history=self.reporter.history,
        )
        saved_step = (
            state.best_step if self.config.keep == "best" and state.best_step is not None else state.step
        )
        self.model.training_step = saved_step
        self.model.card = None if self.card is None else self.card(result)
        if self.output is not None:
            self._save_model(self.output, saved_step)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return result


# --- small parts -------------------------------------------------------------------------------------------


def _labelled(pairs: PairSet, config: TrainConfig) -> PairSet:
    """Targets as the run wants them: shares of votes, or the majority's side (a split stays 0.5)."""
    if config.data.labels == "votes":
        return pairs
    majority = torch.where(pairs.target == 0.5, pairs.target, (pairs.target > 0.5).to(pairs.target.dtype))
    return replace(pairs, target=majority)


_MAY_CHANGE = frozenset(
    "num_steps time_budget_seconds output resume log_every checkpoint_every keep tensorboard compile cpu "
    "wandb gradient_checkpointing validation data model".split()
)
