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
import time
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

from dina_lrm.checkpoints.config import Calibration
from dina_lrm.checkpoints.dina import OWNED, fill_checkpoint
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.likelihood import pairwise_loss
from dina_lrm.core.precision import float32_masters, matrix_precision
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.core.sharding import is_sharded, local
from dina_lrm.data.shards.read import PairSet
from dina_lrm.errors import InvalidInputError, RunError
from dina_lrm.files import atomic_folder, atomic_write, recover_folder
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs import optimizer as optim
from dina_lrm.runs import state
from dina_lrm.runs.config import to_dict
from dina_lrm.runs.distribution import check_distribution, drop_gathered, treat_as_forward
from dina_lrm.runs.interrupt import Interrupt, Interrupted
from dina_lrm.runs.progress import Reporter, StepMetrics, Window
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
    (`TrainResult.uncalibrated`). Only where FSDP2 has cut it, the model stays in pieces: load what was saved.

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
            cpu=config.cpu,
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
        settings = config.optimizer
        optimizer = optim.adamw(
            model,
            learning_rate=settings.learning_rate,
            backbone_learning_rate=settings.backbone_learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.scorer = PairScorer(model, gradient_checkpointing=config.gradient_checkpointing)
        prepared: Any = torch.compile(self.scorer, dynamic=False) if config.compile else self.scorer
        self.prepared, self.optimizer = self.accelerator.prepare(prepared, optimizer)
        self.in_pieces = self.accelerator.is_fsdp2
        if self.in_pieces:
            treat_as_forward(self.scorer, "margins")
        # After preparing, which puts pieces in the place of whole parameters.
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = None
        if settings.ema_decay is not None:
            self.average = optim.weight_average(self._pieces(), settings.ema_decay)

        self.step = 0
        self.seconds_before = 0.0  # in earlier processes of this run
        self.seconds_trained = 0.0  # until the end of the latest step, its validation included
        self.best_accuracy: float | None = None
        self.best_step: int | None = None
        self.best_weights: list[Tensor] | None = None
        self.fingerprint = self.train_pairs.fingerprint()
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
            wandb=None if config.wandb is None else (config.wandb, to_dict(config)),
            console=(console or Console(stderr=True)) if self.is_main else Console(quiet=True),
            on_step=on_step,
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _pieces(self) -> list[Any]:
        """What this process holds of each trained parameter, all of it unless FSDP2 has cut them."""
        return [local(parameter) for parameter in self.parameters.values()]

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def run(self) -> TrainResult:
        config = self.config
        self.started = time.perf_counter()
        if config.resume:
            self._resume()
        self.reporter.start(self.step)
        if self.output is not None and self.is_main:
            atomic_write(self.output / "train_config.json", json.dumps(to_dict(config), indent=2).encode())

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
            while self.step < config.num_steps:
                rate = optim.set_learning_rate(self.optimizer, self._rate_factor())
                norm = self._optimize(loader, window)
                self.step += 1
                self.model.trained = True
                # Both are of other weights.
                self.model.config, self.model.card = replace(self.model.config, calibration=None), None
                out_of_time = self._out_of_time()
                last = out_of_time or self.step == config.num_steps
                if self.step % config.log_every == 0 or last:
                    self._log_training(window, loader, rate, norm)
                self.reporter.step_done(self.step, config.batch_size)
                with window.paused():
                    due = self.step % config.validation.every == 0 or last
                    if self.validation_pairs is not None and due:
                        self._validate_and_keep()
                    self.seconds_trained = self.seconds
                    interrupted = interrupt.asked(self.accelerator)
                    if self.step % config.checkpoint_every == 0 or last or interrupted:
                        self._checkpoint()
                if interrupted:
                    # A launcher ends the others as soon as one has ended, so none does before all is saved.
                    self.accelerator.wait_for_everyone()
                    raise Interrupted(interrupt.number, self._kept())
                if out_of_time or self._out_of_patience():
                    stopped_by = "time_budget" if out_of_time else "patience"
                    if not last:
                        self._checkpoint()
                    break
        return self._finish(stopped_by)

    def _kept(self) -> str:
        """What an interrupted run leaves."""
        if self.output is None:
            return f"step {self.step} was finished, and nothing is kept, since the run has no output"
        return f"step {self.step} was finished, and {self.output / 'last'} holds it"

    # --- one optimizer step

    def _rate_factor(self) -> float:
        config = self.config
        budget = config.time_budget_seconds
        return optim.learning_rate_factor(
            self.step,
            num_steps=config.num_steps,
            schedule=config.optimizer.schedule,
            warmup_steps=config.optimizer.warmup_steps,
            final_fraction=config.optimizer.final_fraction,
            elapsed_fraction=0.0 if budget is None else self._agreed(self.seconds) / budget,
        )

    def _agreed(self, value: float) -> float:
        """The main process's value, so that all devices take the same decision."""
        if self.accelerator.num_processes == 1:
            return value
        agreed: Any = broadcast(torch.tensor(value, device=self.device, dtype=torch.float64))
        return float(agreed)

    def _out_of_time(self) -> bool:
        budget = self.config.time_budget_seconds
        return budget is not None and self._agreed(self.seconds) >= budget

    def _out_of_patience(self) -> bool:
        patience = self.config.validation.patience
        if patience is None or self.best_step is None:
            return False
        return self.step - self.best_step >= patience * self.config.validation.every

    def _optimize(self, loader: StepLoader, window: Window) -> Tensor:
        """One step over all accumulated parts; returns the gradient's norm before clipping."""
        config, accelerator = self.config, self.accelerator
        # Dropout too follows from the position, so no random state needs to be stored.
        torch.manual_seed(mix_seeds(config.seed, Stream.DROPOUT, self.step, accelerator.process_index))
        loss_config = config.loss
        for part in loader.parts(self.step):
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
            list(self.parameters.values()), config.optimizer.max_gradient_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self._pieces())
        if is_sharded(norm):
            norm = norm.full_tensor()
        return norm if isinstance(norm, Tensor) else torch.tensor(float("nan"))

    def _precision(self) -> AbstractContextManager[None]:
        """Arithmetic of the forward pass; the backward pass follows it."""
        return matrix_precision(self.config.precision, self.device.type)

    # --- validation

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """The averaged weights inside, the raw ones again after, to the last bit."""
        return optim.averaged(self.average, self._pieces())

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
        if self.in_pieces:
            drop_gathered(self.scorer)
        self.model.train()
        return margins

    def _validate_and_keep(self) -> None:
        assert self.validation_pairs is not None
        pairs = fixed_sample(self.validation_pairs, self.config.validation.max_pairs, seed=self.config.seed)
        with self._averaged_weights():
            accuracies = self._margins(pairs).accuracy
            best = max(accuracies.values())
            if self.best_accuracy is None or best > self.best_accuracy:
                self.best_accuracy, self.best_step = best, self.step
                self.best_weights = [piece.detach().cpu().clone() for piece in self._pieces()]
                if self.output is not None:
                    self._save_model(self.output / "best", self.step)
        labelled = {levels_label(levels): value for levels, value in accuracies.items()}
        self.reporter.tell(StepMetrics(step=self.step, seconds=self.seconds, validation=labelled))

    # --- what is written

    def _log_training(self, window: Window, loader: StepLoader, rate: float, norm: Tensor) -> None:
        loss, accuracy, pairs, seconds = window.close(self.accelerator)
        waited, loader.waited_seconds = loader.waited_seconds, 0.0
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {self.step}: training has diverged; "
                f"lower optimizer.learning_rate (now {rate:g}) or resume from an earlier checkpoint"
            )
        self.reporter.tell(
            StepMetrics(
                step=self.step,
                seconds=self.seconds,
                loss=loss,
                accuracy=accuracy,
                learning_rate=rate,
                gradient_norm=float(norm),
                pairs_per_second=pairs / seconds,
                data_wait_fraction=waited / seconds,
                epoch=self.step * self.config.batch_size / len(self.train_pairs),
            )
        )

    def _save_model(self, folder: Path, step: int) -> None:
        """The main process writes; all gather if each has pieces only."""
        if self.is_main:
            self.model.save_pretrained(folder, training_step=step)
        elif self.in_pieces:
            self.model.checkpoint()

    def _checkpoint(self) -> None:
        """OUTPUT/last: the model with averaged weights, and beside it all that resuming needs."""
        if self.output is None:
            return
        position = state.Position(
            step=self.step,
            seconds=self.seconds_trained,
            best_accuracy=self.best_accuracy,
            best_step=self.best_step,
            config=to_dict(self.config),
            data_fingerprint=self.fingerprint,
        )

        def save_state(folder: Path) -> None:
            state.save_state(
                folder, position, self.parameters, self.optimizer, self.average, self.best_weights
            )

        last = self.output / "last"
        if self.is_main:
            with atomic_folder(last) as aside:
                with self._averaged_weights():
                    fill_checkpoint(aside, self.model.checkpoint(self.step))
                save_state(aside)
        elif self.in_pieces:
            with self._averaged_weights():
                self.model.checkpoint()
            save_state(last)

    def _resume(self) -> None:
        if self.output is None:
            raise InvalidInputError("resume needs output: the folder of the run to go on with")
        last = self.output / "last"
        self.accelerator.wait_for_everyone()
        if not last.exists():  # stopped before the first checkpoint, or never begun
            return
        position, best = state.load_state(last, self.parameters, self.optimizer, self.average)
        state.check_same_run(
            last, position, to_dict(self.config), self.fingerprint, may_change=_MAY_CHANGE, data="pairs"
        )
        self.step, self.seconds_before = position.step, position.seconds
        self.seconds_trained = position.seconds
        self.model.trained = self.model.trained or self.step > 0
        self.best_accuracy, self.best_step = position.best_accuracy, position.best_step
        self.best_weights = best

    # --- the end

    def _finish(self, stopped_by: str) -> TrainResult:
        weights = None if self.config.keep == "last" else self.best_weights
        if weights is None and self.average is not None:
            weights = self.average.shadow_params
        if weights is not None:
            with torch.no_grad():
                for piece, value in zip(self._pieces(), weights, strict=True):
                    piece.copy_(value)
        margins = None if self.validation_pairs is None else self._margins(self.validation_pairs)
        levels, scale, uncalibrated = (None, None, None) if margins is None else calibrated(margins)
        self.model.config = replace(
            self.model.config,
            noise_levels=levels or self.model.config.noise_levels,
            calibration=None if scale is None else Calibration(noise_levels=levels or (), scale=scale),
        )
        self.model.eval()
        result = TrainResult(
            steps=self.step,
            seconds=self.seconds_trained,
            stopped_by=stopped_by,
            best_step=self.best_step,
            best_accuracy=self.best_accuracy,
            noise_levels=levels,
            calibration_scale=scale,
            uncalibrated=uncalibrated,
            validation={}
            if margins is None
            else {levels_label(one): value for one, value in margins.accuracy.items()},
            margins=margins,
            history=self.reporter.history,
        )
        saved_step = (
            self.best_step if self.config.keep == "best" and self.best_step is not None else self.step
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
