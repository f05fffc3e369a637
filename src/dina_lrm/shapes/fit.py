"""One stage of training the bundled pipeline: its settings, its loop, its checkpoint.

Every random draw of a step comes from a generator seeded by (seed, stage, step), so a resumed run sees the
same data as an uninterrupted one. The learning rate is constant after a short warm-up and falls linearly to
zero over the last part, so a run can be lengthened from any checkpoint before the fall without having wasted
a step.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from rich.progress import track
from torch import Tensor, nn

from dina_lrm.core.precision import faster_precision, matrix_precision

Stage = Literal["vae", "clip", "text", "generator", "assemble"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Length and step size of one training stage."""

    steps: int
    """Optimizer steps in all; raise it to lengthen a finished run."""
    batch_size: int
    """Pictures, or in the text stage captions, a step."""
    learning_rate: float
    """AdamW's, and Muon's in the units of AdamW (update RMS matched)."""
    decay_fraction: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    warmup_steps: int = 50
    """Steps of linear rise at the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineTrainConfig:
    """The recipe of the bundled pipeline."""

    output: Path
    """Run folder: checkpoints, logs and, in `pipeline/`, the result."""
    stages: tuple[Stage, ...] = ("vae", "clip", "text", "generator", "assemble")
    """Stages to run, in this order."""
    vae: StageConfig = field(
        default_factory=lambda: StageConfig(steps=2200, batch_size=32, learning_rate=1e-3)
    )
    clip: StageConfig = field(
        default_factory=lambda: StageConfig(steps=500, batch_size=128, learning_rate=1e-3)
    )
    text: StageConfig = field(
        default_factory=lambda: StageConfig(steps=3500, batch_size=256, learning_rate=1e-3)
    )
    generator: StageConfig = field(
        default_factory=lambda: StageConfig(steps=5000, batch_size=64, learning_rate=1.5e-3)
    )
    num_layers: int = 6
    """Blocks of the denoiser; of another size than that of `initial` it starts from nothing."""
    num_heads: int = 3
    """Its attention heads, of 64 channels each."""
    kl_weight: float = 2e-4
    """Weight of the KL divergence (nats per latent value) beside the reconstruction error per pixel value."""
    pool_size: int = 60_000
    """Renders whose latents the generator is trained on; other stages make 12,000 at most."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    sigma_mean: float = 0.8
    sigma_std: float = 1.2
    """Noise levels are sigmoid(N(sigma_mean, sigma_std^2)): half of them above 0.69, where it is decided what
    is drawn and where."""
    layout_weight: float = 0.5
    """Weight of the read-out's error beside the flow loss; 0 leaves it without effect on the denoiser."""
    compile: bool = False
    """Compile the denoiser (needs a C++ compiler, takes a minute): the same steps, a quarter faster on a
    CPU."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """For the generator's matrices; everything else is AdamW's."""
    ema_decay: float = 0.998
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_steps: tuple[int, ...] = (1500,)
    """Generator steps whose EMA weights are kept apart, as weaker base models for alignment experiments."""
    initial: Path | None = None
    """Pipeline folder of an earlier run, such as the bundled one: denoiser and T5 encoder start from its
    weights (without the text stage its T5 encoder is kept), its VAE and CLIP text encoders are kept. None
    starts from random weights."""
    device: str = "cpu"
    seed: int = 0


@dataclass
class Fit:
    """One stage's training state: modules, optimizers, EMA and position, saved and restored as a whole."""

    name: str
    config: StageConfig
    run: PipelineTrainConfig
    modules: dict[str, nn.Module]
    muon_of: tuple[str, ...] = ()
    step: int = 0

    def __post_init__(self) -> None:
        self.folder = self.run.output / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        named = [
            (f"{k}.{n}", p)
            for k, m in self.modules.items()
            for n, p in m.named_parameters()
            if p.requires_grad
        ]
        matrices = [p for n, p in named if p.ndim == 2 and n.startswith(self.muon_of)] if self.muon_of else []
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        self.parameters = [p for _, p in named]
        self.ema = EMAModel(
            self.parameters, decay=self.run.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.8
        )
        state = self.folder / "state.pt"
        if state.exists():
            self.load(torch.load(state, map_location=self.run.device, weights_only=True))

    def load(self, state: dict) -> None:
        """Continue from a checkpoint's state."""
        for key, module in self.modules.items():
            module.load_state_dict(state["modules"][key])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint aside, then put it in place."""
        state = {
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
            "step": self.step,
        }
        torch.save(state, self.folder / "state.pt.tmp")
        (self.folder / "state.pt.tmp").replace(self.folder / "state.pt")

    def rate(self) -> float:
        """Learning rate of the coming step."""
        config = self.config
        decay_steps = max(int(config.decay_fraction * config.steps), 1)
        rise = (self.step + 1) / max(config.warmup_steps, 1)
        fall = (config.steps - self.step) / decay_steps
        return config.learning_rate * min(1.0, rise, fall)

    def generator(self) -> torch.Generator:
        """The step's own source of randomness."""
        return step_generator(self.run.seed, self.name, self.step)

    def train(self, loss_of_step: Callable[["Fit"], dict[str, Tensor]]) -> None:
        """Run the remaining steps; `loss_of_step` returns losses by name, of which `loss` is minimised."""
        log = (self.folder / "log.jsonl").open("a")
        started, seen = time.monotonic(), 0
        device = torch.device(self.run.device).type
        remaining = range(self.step, self.config.steps)
        for _ in track(remaining, description=self.name, disable=not remaining):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate()
            with matrix_precision(faster_precision(device), device):
                losses = loss_of_step(self)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.ema.step(self.parameters)
            self.step, seen = self.step + 1, seen + self.config.batch_size
            if self.step % 25 == 0 or self.step == self.config.steps:
                row = {key: round(value.item(), 5) for key, value in losses.items()}
                row |= {"step": self.step, "grad_norm": round(norm.item(), 4), "rate": self.rate()}
                row |= {"seconds": round(time.monotonic() - started, 1)}
                row |= {"pictures_per_second": round(seen / (time.monotonic() - started), 1)}
                log.write(json.dumps(row) + "\n")
                log.flush()
            if self.step % self.run.checkpoint_every == 0 or self.step == self.config.steps:
                self.save()
            if self.name == "generator" and self.step in self.run.keep_steps:
                self.export(self.folder / f"step_{self.step}")
        log.close()

    def export(self, folder: Path) -> None:
        """Write the EMA weights of the modules that diffusers and transformers know."""
        with self.averaged():
            for key, module in self.modules.items():
                if hasattr(module, "save_pretrained"):
                    cast(Any, module).save_pretrained(folder / key)

    def averaged(self) -> "_Averaged":
        """Context in which the modules hold their EMA weights."""
        return _Averaged(self)


class _Averaged:
    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def __enter__(self) -> None:
        self.fit.ema.store(self.fit.parameters)
        self.fit.ema.copy_to(self.fit.parameters)

    def __exit__(self, *_: object) -> None:
        self.fit.ema.restore(self.fit.parameters)


def step_generator(seed: int, name: str, step: int) -> torch.Generator:
    """A CPU generator that depends on (seed, name, step) alone."""
    words = np.random.SeedSequence([seed, *name.encode(), step]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
