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

The variance of a concatenated step is the mean of v over its levels. Since v is linear in sigma^2, that is v
at the root mean square of the levels.
"""

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dina_lrm.config import NoiseConfig, TrainConfig, to_dict
from dina_lrm.core.calibration import fit_scale
from dina_lrm.core.ensemble import unfold_levels
from dina_lrm.core.likelihood import pairwise_loss
from dina_lrm.core.noise import sample_noise_levels, seeded_noise
from dina_lrm.core.tensors import NoiseLevel, Score
from dina_lrm.data.latents import LatentPairs, PairBatch, batch_indices, mix_seeds
from dina_lrm.errors import DinaError, InvalidInputError
from dina_lrm.models.backbone import Conditioning
from dina_lrm.models.config import Calibration
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training import optim, state

__all__ = ["PairScorer", "StepDraws", "StepMetrics", "TrainResult", "draw_step", "train"]

_VALIDATION_STREAM = 1  # keeps validation noise apart from (seed, step)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl: means since the last line, or a validation."""

    step: int
    seconds: float
    """Since the start of the run, stops not counted."""
    loss: float | None = None
    accuracy: float | None = None
    """Of training pairs, at the noise levels drawn."""
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """Before clipping, of the last step."""
    pairs_per_second: float | None = None
    epoch: float | None = None
    validation: dict[str, float] | None = None
    """Accuracy of each candidate, "0.4" or "0.2+0.5+0.7", with averaged weights; set on validations only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended. The model itself was trained in place."""

    steps: int
    seconds: float
    stopped_by: str
    """"steps" or "time_budget"."""
    best_step: int | None
    best_accuracy: float | None
    """Best candidate on the validation pairs used while training."""
    noise_levels: tuple[float, ...] | None
    """The model's new default for scoring, chosen on all validation pairs."""
    calibration_scale: float | None
    validation: dict[str, float]
    """Accuracy of every candidate on all validation pairs, at the end."""
    history: list[StepMetrics]


# --- one step ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDraws:
    """Everything random in one optimizer step, for the whole batch."""

    sigma: Float[Tensor, "level batch"]
    """One row unless this step trains the ensemble; not yet matched to the backbone's table."""
    noise_seeds: list[int]
    """One per pair."""


def draw_step(config: TrainConfig, step: int) -> StepDraws:
    """Noise levels and noise seeds of a step: a function of (config.seed, step) and of nothing else."""
    generator = torch.Generator().manual_seed(mix_seeds(config.seed, 0, step))
    seeds = torch.randint(2**62, (config.batch_size,), generator=generator).tolist()
    num_levels = 1
    if torch.rand((), generator=generator).item() < config.ensemble_fraction:
        sizes = config.ensemble_sizes
        num_levels = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    sigma = draw_noise_levels(config.noise, num_levels * config.batch_size, generator)
    return StepDraws(sigma=sigma.reshape(num_levels, config.batch_size), noise_seeds=seeds)


def draw_noise_levels(noise: NoiseConfig, num: int, generator: torch.Generator) -> Tensor:
    """Levels from the configured law."""
    settings = asdict(noise)
    return sample_noise_levels(settings.pop("law"), num, generator=generator, **settings)


class PairScorer(nn.Module):
    """Scores both sides of pairs in one forward: the module that is compiled and distributed.

    Everything that trains goes through `forward`, so a distributed wrapper sees every gradient.
    """

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def tokens(
        self, batch: PairBatch, noise: Tensor, sigma: Float[Tensor, "level batch"]
    ) -> tuple[Tensor, Tensor | None]:
        """Head tokens of every latent at its pair's levels; rows are (level, side, pair)."""
        num_levels, num_pairs = sigma.shape
        backbone = self.model.backbone
        latents = torch.cat([batch.latents_chosen, batch.latents_rejected]).repeat(num_levels, 1, 1, 1)
        sigmas = sigma.unsqueeze(1).expand(-1, 2, -1).reshape(-1)
        if self.model.config.add_noise:
            latents = backbone.schedule.add_noise(latents, noise.repeat(2 * num_levels, 1, 1, 1), sigmas)
        conditioning = Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds, batch.attention_mask)
        embedded = backbone.embed(conditioning)  # once per pair, then shared by sides and levels
        rows = torch.arange(num_pairs, device=sigma.device).repeat(2 * num_levels)
        features = backbone.features(latents, embedded.index_select(rows), sigmas)
        return self.model.head.aggregate(features.image, features.text, features.temb)

    def scores(self, tokens: tuple[Tensor, Tensor | None], num_levels: int) -> tuple[Score, Score]:
        """Scores of (chosen, rejected) from the tokens of one or more levels."""
        image, text = (None if stream is None else unfold_levels(stream, num_levels) for stream in tokens)
        score = self.model.head.score_tokens(image, text)
        if self.model.squash is not None:
            score = self.model.squash(score)
        chosen, rejected = score.float().chunk(2)
        return chosen, rejected

    def forward(
        self, batch: PairBatch, noise: Tensor, sigma: Float[Tensor, "level batch"]
    ) -> tuple[Score, Score]:
        """Both sides of each pair get `noise` and `sigma` of the pair; sigma is matched already."""
        return self.scores(self.tokens(batch, noise, sigma), len(sigma))


def loss_level(sigma: Float[Tensor, "level batch"]) -> NoiseLevel:
    """The one level whose variance is the mean of v over several: their root mean square.

    >>> loss_level(torch.tensor([[0.6], [0.8]])) ** 2
    tensor([0.5000])
    """
    return sigma[0] if len(sigma) == 1 else sigma.square().mean(dim=0).sqrt()


# --- the run -----------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    model: RewardModel,
    train_pairs: LatentPairs,
    validation_pairs: LatentPairs | None = None,
    *,
    on_step: Callable[[StepMetrics], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train `model` in place on pairs of latents.

    The model ends with the best (or last) averaged weights, in evaluation mode, marked as trained; with
    validation pairs, also with the noise levels that scored best on them as its default, and with the scale
    that makes its probabilities true there.

    Args:
        config: the run; `model` and `data` of it are taken as done, since both are given here.
        model: from `RewardModel.initialize`, or a trained one to go on with.
        validation_pairs: of prompts that are not trained on.
        on_step: called with every line of metrics as it is made. It must not score with the model.
        console: where the progress bar goes, if it is a terminal; None is standard error.
    """
    return _Run(config, model, train_pairs, validation_pairs, on_step, console).run()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        model: RewardModel,
        train_pairs: LatentPairs,
        validation_pairs: LatentPairs | None,
        on_step: Callable[[StepMetrics], None] | None,
        console: Console | None,
    ) -> None:
        self.config, self.model, self.on_step = config, model, on_step
        self.accelerator = Accelerator(
            cpu=config.cpu,
            gradient_accumulation_steps=config.accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
        parts = config.accumulation_steps * self.accelerator.num_processes
        if config.batch_size % parts:
            raise InvalidInputError(
                f"batch_size = {config.batch_size} does not divide over {self.accelerator.num_processes} devices "
                f"x accumulation_steps = {config.accumulation_steps}"
            )
        if len(train_pairs) == 0:
            raise InvalidInputError("there are no training pairs")
        self.train_pairs = _labelled(train_pairs, config)
        self.validation_pairs = validation_pairs if validation_pairs is not None and len(validation_pairs) else None
        self.output = Path(config.output) if config.output is not None else None

        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optim.float32_masters(self.parameters.values())
        settings = config.optimizer
        optimizer = optim.adamw(
            model,
            learning_rate=settings.learning_rate,
            backbone_learning_rate=settings.backbone_learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.scorer = PairScorer(model)
        prepared: Any = torch.compile(self.scorer, dynamic=False) if config.compile else self.scorer
        self.prepared, self.optimizer = self.accelerator.prepare(prepared, optimizer)
        self.average = None
        if settings.ema_decay is not None:
            self.average = optim.weight_average(list(self.parameters.values()), settings.ema_decay)

        self.step = 0
        self.seconds_before = 0.0
        self.best_accuracy: float | None = None
        self.best_step: int | None = None
        self.best_weights: list[Tensor] | None = None
        self.history: list[StepMetrics] = []
        self.fingerprint = self.train_pairs.fingerprint()
        self.is_main = self.accelerator.is_main_process
        if self.output is not None and self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
        self.display = _Display(config, console or Console(stderr=True), enabled=self.is_main)
        self.tensorboard = self._tensorboard()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def run(self) -> TrainResult:
        config = self.config
        self.started = time.perf_counter()
        if config.resume:
            self._resume()
        elif self.output is not None and self.is_main:
            (self.output / "metrics.jsonl").unlink(missing_ok=True)
        if self.output is not None and self.is_main:
            state.write_file(self.output / "train_config.json", json.dumps(to_dict(config), indent=2).encode())

        stopped_by = "steps"
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), warnings.catch_warnings(), self.display:
            # Under autocast the head's RMSNorm meets bfloat16 tokens with a float32 scale, as intended.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            self.model.train()
            window = _Window(self.device)
            while self.step < config.num_steps:
                rate = optim.set_learning_rate(self.optimizer, self._rate_factor())
                norm = self._optimize(window)
                self.step += 1
                self.model.trained = True
                out_of_time = self._out_of_time()
                last = out_of_time or self.step == config.num_steps
                if self.step % config.log_every == 0 or last:
                    self._log_training(window, rate, norm)
                if self.validation_pairs is not None and (self.step % config.validation.every == 0 or last):
                    self._validate_and_keep()
                if self.step % config.checkpoint_every == 0 or last:
                    self._checkpoint()
                if out_of_time:
                    stopped_by = "time_budget"
                    break
        return self._finish(stopped_by)

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
        return float(broadcast(torch.tensor(value, device=self.device, dtype=torch.float64)))

    def _out_of_time(self) -> bool:
        budget = self.config.time_budget_seconds
        return budget is not None and self._agreed(self.seconds) >= budget

    def _optimize(self, window: "_Window") -> Tensor:
        """One step over all accumulated parts; returns the gradient's norm before clipping."""
        config, accelerator = self.config, self.accelerator
        # Dropout too follows from the position, so no random state needs to be stored.
        torch.manual_seed(mix_seeds(config.seed, 2, self.step, accelerator.process_index))
        indices = batch_indices(len(self.train_pairs), config.batch_size, seed=config.seed, step=self.step)
        draws = draw_step(config, self.step)
        sigma = self.model.schedule.match(draws.sigma.flatten()).sigma.reshape(draws.sigma.shape)
        shape = tuple(self.train_pairs.latents.shape[1:])
        part_size = config.batch_size // (config.accumulation_steps * accelerator.num_processes)
        loss_config = config.loss
        for part in range(config.accumulation_steps):
            start = (part * accelerator.num_processes + accelerator.process_index) * part_size
            rows = slice(start, start + part_size)
            batch = self.train_pairs.batch(indices[rows], device=self.device)
            noise = seeded_noise(shape, draws.noise_seeds[rows])[0].to(self.device, non_blocking=True)
            levels = sigma[:, rows].to(self.device, non_blocking=True)
            with accelerator.accumulate(self.prepared):
                with self._precision():
                    chosen, rejected = self.prepared(batch, noise, levels)
                loss = pairwise_loss(
                    chosen.float(),
                    rejected.float(),
                    loss_level(levels),
                    target=batch.target,
                    likelihood=loss_config.likelihood,
                    loss=loss_config.loss,
                    slope=loss_config.slope,
                    floor=loss_config.floor,
                    variance=loss_config.variance,
                    margin=loss_config.margin,
                ).mean()
                accelerator.backward(loss)  # divides by the number of parts
            window.add(loss.detach(), chosen.detach() - rejected.detach(), batch.target)
        parameters = list(self.parameters.values())
        norm = accelerator.clip_grad_norm_(parameters, config.optimizer.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(parameters)
        return norm if isinstance(norm, Tensor) else torch.tensor(float("nan"))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Arithmetic of the forward pass; the backward pass follows it."""
        if self.config.precision == "float32":
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.device.type == "cpu":  # the fused kernel's bfloat16 backward is five times slower there
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    # --- validation

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The averaged weights inside, the raw ones again after, to the last bit."""
        if self.average is None:
            yield
            return
        parameters = list(self.parameters.values())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def _candidates(self) -> list[tuple[float, ...]]:
        validation = self.config.validation
        return [*((level,) for level in validation.noise_levels), *validation.ensembles]

    @torch.no_grad()
    def _margins(self, pairs: LatentPairs) -> tuple[dict[tuple[float, ...], Tensor], Tensor]:
        """Margins of every candidate, and targets, for `pairs` spread over the devices.

        Every level goes through the backbone once; single levels and ensembles read the same tokens.
        """
        config, candidates = self.config, self._candidates()
        levels = sorted({level for candidate in candidates for level in candidate})
        matched = dict(zip(levels, self.model.schedule.match(torch.tensor(levels)).sigma.tolist(), strict=True))
        own = torch.arange(len(pairs))[self.accelerator.process_index :: self.accelerator.num_processes]
        shape = tuple(pairs.latents.shape[1:])
        margins: dict[tuple[float, ...], list[float]] = {candidate: [] for candidate in candidates}
        self.model.eval()
        for rows in own.split(config.validation.batch_size):
            batch = pairs.batch(rows, device=self.device)
            seeds = [mix_seeds(config.seed, _VALIDATION_STREAM, int(row)) for row in rows]
            noise = seeded_noise(shape, seeds)[0].to(self.device)
            with self._precision():
                tokens = {
                    level: self.scorer.tokens(batch, noise, torch.full((1, len(rows)), matched[level], device=self.device))
                    for level in levels
                }
                for candidate in candidates:
                    image = torch.cat([tokens[level][0] for level in candidate])
                    text = [stream for level in candidate if (stream := tokens[level][1]) is not None]
                    joined = (image, torch.cat(text) if text else None)
                    chosen, rejected = self.scorer.scores(joined, len(candidate))
                    margins[candidate] += (chosen - rejected).tolist()
        self.model.train()
        gathered = gather_object([(margins, pairs.target[own].tolist())])
        return (
            {c: torch.tensor([m for part, _ in gathered for m in part[c]]) for c in candidates},
            torch.tensor([t for _, part in gathered for t in part]),
        )

    def _validate(self, pairs: LatentPairs) -> dict[tuple[float, ...], float]:
        margins, target = self._margins(pairs)
        return {candidate: _accuracy(margin, target) for candidate, margin in margins.items()}

    def _validate_and_keep(self) -> None:
        assert self.validation_pairs is not None
        pairs = _sample(self.validation_pairs, self.config.validation.max_pairs, seed=self.config.seed)
        with self._averaged_weights():
            accuracies = self._validate(pairs)
            best = max(accuracies.values())
            if self.best_accuracy is None or best > self.best_accuracy:
                self.best_accuracy, self.best_step = best, self.step
                self.best_weights = [p.detach().cpu().clone() for p in self.parameters.values()]
                self._save_model("best")
        labelled = {_label(candidate): accuracy for candidate, accuracy in accuracies.items()}
        self._emit(StepMetrics(step=self.step, seconds=self.seconds, validation=labelled))

    # --- what is written

    def _log_training(self, window: "_Window", rate: float, norm: Tensor) -> None:
        loss, accuracy, num_pairs, seconds = window.close(self.accelerator)
        if not math.isfinite(loss):
            raise DinaError(
                f"the loss is {loss} at step {self.step}: training has diverged; "
                f"lower optimizer.learning_rate (now {rate:g}) or resume from an earlier checkpoint"
            )
        self._emit(
            StepMetrics(
                step=self.step,
                seconds=self.seconds,
                loss=loss,
                accuracy=accuracy,
                learning_rate=rate,
                gradient_norm=float(norm),
                pairs_per_second=num_pairs / max(seconds, 1e-9),
                epoch=self.step * self.config.batch_size / len(self.train_pairs),
            )
        )

    def _emit(self, metrics: StepMetrics) -> None:
        self.history.append(metrics)
        if self.is_main and self.output is not None:
            line = {key: value for key, value in asdict(metrics).items() if value is not None}
            with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for key in ("loss", "accuracy", "learning_rate", "gradient_norm", "pairs_per_second"):
                if (value := getattr(metrics, key)) is not None:
                    self.tensorboard.add_scalar(f"train/{key}", value, metrics.step)
            for label, accuracy in (metrics.validation or {}).items():
                self.tensorboard.add_scalar(f"validation/accuracy at {label}", accuracy, metrics.step)
        self.display.show(metrics)
        if self.on_step is not None:
            self.on_step(metrics)

    def _tensorboard(self) -> Any:
        if self.output is None or not self.config.tensorboard or not self.is_main:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra
        except ImportError:
            return None
        return SummaryWriter(str(self.output / "tensorboard"))

    def _save_model(self, name: str) -> None:
        if self.output is not None and self.is_main:
            state.replace_folder(
                self.output / name, lambda folder: self.model.save_pretrained(folder, training_step=self.step)
            )

    def _checkpoint(self) -> None:
        """OUTPUT/last: the model with averaged weights, and beside it all that resuming needs."""
        if self.output is None or not self.is_main:
            return
        position = state.Position(
            step=self.step,
            seconds=self.seconds,
            best_accuracy=self.best_accuracy,
            best_step=self.best_step,
            config=to_dict(self.config),
            data_fingerprint=self.fingerprint,
        )

        def fill(folder: Path) -> None:
            with self._averaged_weights():
                self.model.save_pretrained(folder, training_step=self.step)
            state.save_state(folder, position, self.parameters, self.optimizer, self.average, self.best_weights)

        state.replace_folder(self.output / "last", fill)

    def _resume(self) -> None:
        if self.output is None:
            raise InvalidInputError("resume needs output: the folder of the run to go on with")
        last = self.output / "last"
        if self.is_main:
            state.recover_folder(last)
        self.accelerator.wait_for_everyone()
        position, best = state.load_state(last, self.parameters, self.optimizer, self.average)
        differing = _differences(position.config, to_dict(self.config))
        if differing:
            raise InvalidInputError(f"{last} belongs to a run with other settings: {'; '.join(differing)}")
        if position.data_fingerprint != self.fingerprint:
            raise InvalidInputError(f"{last} was trained on other pairs than those given now")
        self.step, self.seconds_before = position.step, position.seconds
        self.best_accuracy, self.best_step, self.best_weights = position.best_accuracy, position.best_step, best
        log = self.output / "metrics.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            self.history = [StepMetrics(**json.loads(line)) for line in lines]
            if self.is_main:
                state.write_file(log, "".join(line + "\n" for line in lines).encode())

    # --- the end

    def _finish(self, stopped_by: str) -> TrainResult:
        weights = None if self.config.keep == "last" else self.best_weights
        if weights is None and self.average is not None:
            weights = self.average.shadow_params
        if weights is not None:
            with torch.no_grad():
                for parameter, value in zip(self.parameters.values(), weights, strict=True):
                    parameter.copy_(value)
        accuracies: dict[tuple[float, ...], float] = {}
        levels = scale = None
        if self.validation_pairs is not None:
            margins, target = self._margins(self.validation_pairs)
            accuracies = {candidate: _accuracy(margin, target) for candidate, margin in margins.items()}
            levels = max(accuracies, key=lambda candidate: (accuracies[candidate], -len(candidate)))
            scale = fit_scale(margins[levels], target)
            self.model.config = replace(
                self.model.config, noise_levels=levels, calibration=Calibration(noise_levels=levels, scale=scale)
            )
        self.model.eval()
        if self.output is not None and self.is_main:
            saved_step = self.best_step if self.config.keep == "best" and self.best_step is not None else self.step
            self.model.save_pretrained(self.output, training_step=saved_step)
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return TrainResult(
            steps=self.step,
            seconds=self.seconds,
            stopped_by=stopped_by,
            best_step=self.best_step,
            best_accuracy=self.best_accuracy,
            noise_levels=levels,
            calibration_scale=scale,
            validation={_label(candidate): accuracy for candidate, accuracy in accuracies.items()},
            history=self.history,
        )


# --- small parts -------------------------------------------------------------------------------------------


class _Window:
    """Loss and accuracy since the last line of metrics, without waiting for the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open()

    def _open(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        self.started = time.perf_counter()

    def add(self, loss: Tensor, margin: Tensor, target: Tensor) -> None:
        counted = target != 0.5
        right = ((margin > 0) == (target > 0.5)) & (margin != 0) & counted
        one = loss.new_tensor(1.0)
        self.sums += torch.stack([loss, one, right.sum(), counted.sum(), one * len(margin)]).double()

    def close(self, accelerator: Accelerator) -> tuple[float, float, int, float]:
        """Mean loss, accuracy, pairs, seconds; starts the next window."""
        sums: Any = accelerator.reduce(self.sums, reduction="sum")
        loss, parts, right, counted, pairs = sums.tolist()
        seconds = time.perf_counter() - self.started
        self._open()
        return loss / parts, right / max(counted, 1.0), round(pairs), seconds


class _Display:
    """A progress bar on a terminal; nothing where standard error is a file."""

    def __init__(self, config: TrainConfig, console: Console, *, enabled: bool) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self.task = self.progress.add_task("", total=config.num_steps, status="")
        self.training = self.validation = ""

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, metrics: StepMetrics) -> None:
        if metrics.loss is not None and metrics.accuracy is not None:
            self.training = f"loss {metrics.loss:.4f}  accuracy {metrics.accuracy:.1%}"
        if metrics.validation:
            label, accuracy = max(metrics.validation.items(), key=lambda item: item[1])
            self.validation = f"  validation {accuracy:.1%} at {label}"
        self.progress.update(self.task, completed=metrics.step, status=self.training + self.validation)


def _label(levels: tuple[float, ...]) -> str:
    return "+".join(f"{level:g}" for level in levels)


def _labelled(pairs: LatentPairs, config: TrainConfig) -> LatentPairs:
    """Targets as the run wants them: shares of votes, or the majority's side (a split stays 0.5)."""
    if config.data.labels == "votes":
        return pairs
    majority = torch.where(pairs.target == 0.5, pairs.target, (pairs.target > 0.5).to(pairs.target.dtype))
    return replace(pairs, target=majority)


def _accuracy(margin: Tensor, target: Tensor) -> float:
    """Strict, as in `evaluation.metrics`: equal scores are wrong, and pairs on which raters split are left out."""
    counted = target != 0.5
    right = ((margin > 0) == (target > 0.5)) & (margin != 0)
    return right[counted].double().mean().item() if bool(counted.any()) else float("nan")


def _sample(pairs: LatentPairs, num: int, *, seed: int) -> LatentPairs:
    """At most `num` pairs, always the same ones, in their order."""
    if len(pairs) <= num:
        return pairs
    generator = torch.Generator().manual_seed(mix_seeds(seed, 3))
    return pairs.subset(torch.randperm(len(pairs), generator=generator)[:num].sort().values)


_MAY_CHANGE = frozenset(
    "num_steps time_budget_seconds output resume log_every checkpoint_every keep tensorboard compile cpu validation "
    "data model".split()
)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that decide the numbers and are not the same; the data are compared by their fingerprint."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if key not in _MAY_CHANGE and before.get(key) != now.get(key)
    ]
