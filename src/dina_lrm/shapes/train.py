"""Trains the bundled pipeline from nothing, in two or three hours on two cores.

    python -m dina_lrm.shapes.train --output RUN

Stages, each resumable from its last checkpoint in the run folder and skipped when done:

1. `vae`        AutoencoderKL on renders, a quarter of them corrupted (L1 + L2 + KL), then latent shift and
                scale
2. `clip`       two CLIP text encoders against one image encoder (symmetric InfoNCE on renders and captions)
3. `generator`  MMDiT and T5 encoder together: rectified flow on the latents of a fixed pool of renders
4. `assemble`   one `StableDiffusion3Pipeline` folder in half precision, from the EMA weights

Every random draw of a step comes from a generator seeded by (seed, stage, step), so a resumed run sees the
same data as an uninterrupted one. The learning rate is constant after a short warm-up and falls linearly to
zero over the last part, so a run can be lengthened from any checkpoint before the fall without having wasted
a step.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dina_lrm.core.attention import PlainAttention
from dina_lrm.shapes import networks
from dina_lrm.shapes.render import CORRUPTIONS, render
from dina_lrm.shapes.scenes import CANVAS, sample_caption, sample_scene

Stage = Literal["vae", "clip", "generator", "assemble"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Length and step size of one training stage."""

    steps: int
    """Optimizer steps in all; raise it to lengthen a finished run."""
    batch_size: int
    """Pictures a step."""
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
    stages: tuple[Stage, ...] = ("vae", "clip", "generator", "assemble")
    """Stages to run, in this order."""
    vae: StageConfig = field(
        default_factory=lambda: StageConfig(steps=1500, batch_size=32, learning_rate=1e-3)
    )
    clip: StageConfig = field(
        default_factory=lambda: StageConfig(steps=500, batch_size=128, learning_rate=1e-3)
    )
    generator: StageConfig = field(
        default_factory=lambda: StageConfig(steps=5000, batch_size=64, learning_rate=1.5e-3)
    )
    kl_weight: float = 2e-4
    """Weight of the KL divergence (nats per latent value) beside the reconstruction error per pixel value."""
    pool_size: int = 60_000
    """Renders whose latents the generator is trained on; other stages make 12,000 at most."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    sigma_mean: float = 0.3
    sigma_std: float = 1.2
    """Noise levels are sigmoid(N(sigma_mean, sigma_std^2))."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """For the generator's matrices; everything else is AdamW's."""
    ema_decay: float = 0.998
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_steps: tuple[int, ...] = (1500,)
    """Generator steps whose EMA weights are kept apart, as weaker base models for alignment experiments."""
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
        remaining = range(self.step, self.config.steps)
        for _ in track(remaining, description=self.name, disable=not remaining):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate()
            with torch.autocast(torch.device(self.run.device).type, torch.bfloat16), PlainAttention():
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
                with self.averaged():
                    for key, module in self.modules.items():
                        cast(Any, module).save_pretrained(self.folder / f"step_{self.step}" / key)
        log.close()

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


def render_pool(size: int, *, seed: int, corrupted_fraction: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """`size` captioned renders: uint8 (size, CANVAS, CANVAS, 3) and their captions."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((size, CANVAS, CANVAS, 3), dtype=np.uint8)
    captions: list[str] = []
    for index in track(range(size), description="rendering"):
        spec = sample_caption(rng)
        image = render(sample_scene(rng, spec))
        if rng.random() < corrupted_fraction:
            image = CORRUPTIONS[str(rng.choice(list(CORRUPTIONS)))](image, float(rng.uniform(0.1, 1.0)), rng)
        pictures[index] = np.asarray(image)
        captions.append(spec.caption)
    return pictures, captions


def to_model_range(pictures: np.ndarray | Tensor, device: str = "cpu") -> Tensor:
    """uint8 (batch, height, width, 3) to float32 (batch, 3, height, width) in [-1, 1]."""
    return torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_vae(run: PipelineTrainConfig) -> None:
    """Stage 1."""
    torch.manual_seed(run.seed)
    vae: Any = networks.build_vae()
    vae.to(run.device)
    fit = Fit("vae", run.vae, run, {"vae": vae})
    pictures, _ = render_pool(min(run.pool_size, 12_000), seed=run.seed + 1, corrupted_fraction=0.25)

    def loss_of_step(fit: Fit) -> dict[str, Tensor]:
        generator = fit.generator()
        rows = torch.randint(len(pictures), (run.vae.batch_size,), generator=generator)
        images = to_model_range(pictures[rows.numpy()], run.device)
        posterior = vae.encode(images).latent_dist
        eps = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
        decoded = vae.decode(posterior.mean + posterior.std * eps).sample.float()
        error = decoded - images
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).float().mean()
        absolute, squared = error.abs().mean(), error.square().mean()
        return {"loss": absolute + squared + run.kl_weight * kl, "l1": absolute, "l2": squared, "kl": kl}

    fit.train(loss_of_step)
    with fit.averaged(), torch.no_grad():
        latents = encode_pictures(vae, pictures[:1024], run.device)
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item())
        vae.save_pretrained(fit.folder / "vae")


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray, device: str, batch_size: int = 64) -> Tensor:
    """Posterior means, neither shifted nor scaled: float32 (batch, 16, 16, 16) on the CPU."""
    rows = []
    for start in range(0, len(pictures), batch_size):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            mean = vae.encode(to_model_range(pictures[start : start + batch_size], device)).latent_dist.mean
        rows.append(mean.float().cpu())
    return torch.cat(rows)


def token_ids(captions: Sequence[str]) -> Tensor:
    """Token ids, int64 (caption, MAX_TOKENS), padded as the pipeline pads them."""
    tokenizer = networks.build_tokenizer()
    encoded = tokenizer(list(captions), padding="max_length", max_length=networks.MAX_TOKENS, truncation=True)
    return torch.tensor(encoded["input_ids"])


def train_clip(run: PipelineTrainConfig) -> None:
    """Stage 2."""
    torch.manual_seed(run.seed + 1)
    texts: list[Any] = [networks.build_clip_text_encoder() for _ in range(2)]
    image_encoder: Any = networks.build_clip_image_encoder()
    temperature = nn.ParameterDict({"log_scale": nn.Parameter(torch.full((2,), 2.0))}).to(run.device)
    modules: dict[str, Any] = {
        "text_encoder": texts[0],
        "text_encoder_2": texts[1],
        "image_encoder": image_encoder,
    }
    for module in modules.values():
        module.to(run.device)
    fit = Fit("clip", run.clip, run, {**modules, "temperature": temperature})
    pictures, captions = render_pool(min(run.pool_size, 12_000), seed=run.seed + 2)
    ids = token_ids(captions)

    def loss_of_step(fit: Fit) -> dict[str, Tensor]:
        rows = torch.randint(len(pictures), (run.clip.batch_size,), generator=fit.generator())
        images = to_model_range(pictures[rows.numpy()], run.device)
        halves = image_encoder(pixel_values=images).image_embeds.float().chunk(2, dim=-1)
        target = torch.arange(len(rows), device=run.device)
        losses, hits = [], []
        for index, encoder in enumerate(texts):
            text = encoder(input_ids=ids[rows].to(run.device)).text_embeds.float()
            scale = temperature["log_scale"][index].clamp(max=4.0).exp()
            logits = scale * F.normalize(halves[index], dim=-1) @ F.normalize(text, dim=-1).T
            losses += [F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)]
            hits.append((logits.argmax(1) == target).float().mean())
        return {"loss": torch.stack(losses).mean(), "top1": torch.stack(hits).mean()}

    fit.train(loss_of_step)
    with fit.averaged():
        for key, module in modules.items():
            module.save_pretrained(fit.folder / key)


def latent_pool(run: PipelineTrainConfig) -> tuple[Tensor, Tensor]:
    """Latents, float16 (pool, 16, 16, 16), shifted and scaled, and token ids (pool, MAX_TOKENS); made
    once."""
    cached = run.output / f"pool_{run.pool_size}.pt"
    if cached.exists():
        saved = torch.load(cached, weights_only=True)
        return saved["latents"], saved["ids"]
    vae: Any = AutoencoderKL.from_pretrained(run.output / "vae" / "vae")
    vae.to(run.device)
    pictures, captions = render_pool(run.pool_size, seed=run.seed + 3)
    latents = (
        encode_pictures(vae, pictures, run.device) - vae.config.shift_factor
    ) * vae.config.scaling_factor
    ids = token_ids(captions)
    torch.save({"latents": latents.half(), "ids": ids}, cached)
    return latents.half(), ids


def draw_text_length(generator: torch.Generator) -> int:
    """T5 tokens of a step: nearly always MAX_TOKENS, sometimes padded further.

    `StableDiffusion3Pipeline` pads the T5 prompt to 256 tokens unless told otherwise, and the transformer
    attends to the padding without a mask: seeing longer padding in training makes plain calls of the pipeline
    work as well.
    """
    draw = torch.rand((), generator=generator).item()
    if draw < 0.85:
        return networks.MAX_TOKENS
    return 48 if draw < 0.92 else 128 if draw < 0.97 else 256


def train_generator(run: PipelineTrainConfig) -> None:
    """Stage 3."""
    latents, ids = latent_pool(run)
    empty = token_ids([""])
    clips: list[Any] = [
        CLIPTextModelWithProjection.from_pretrained(run.output / "clip" / name).eval()
        for name in ("text_encoder", "text_encoder_2")
    ]
    torch.manual_seed(run.seed + 2)
    transformer: Any = networks.build_transformer()
    t5: Any = networks.build_t5_encoder()
    for module in (transformer, t5, *clips):
        module.to(run.device)
    muon_of = ("transformer.transformer_blocks", "text_encoder_3.encoder") if run.optimizer == "muon" else ()
    fit = Fit("generator", run.generator, run, {"transformer": transformer, "text_encoder_3": t5}, muon_of)

    def loss_of_step(fit: Fit) -> dict[str, Tensor]:
        generator, size = fit.generator(), run.generator.batch_size
        rows = torch.randint(len(latents), (size,), generator=generator)
        tokens = torch.where(torch.rand(size, 1, generator=generator) < run.caption_dropout, empty, ids[rows])
        tokens = tokens.to(run.device)
        length = draw_text_length(generator)
        with torch.no_grad():
            outputs = [clip(input_ids=tokens, output_hidden_states=True) for clip in clips]
            clip_tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        t5_tokens = t5(F.pad(tokens, (0, length - tokens.shape[1]), value=networks.PAD))[0]
        clean = latents[rows].float().to(run.device)
        noise = torch.randn(clean.shape, generator=generator).to(run.device)
        sigma = torch.sigmoid(run.sigma_mean + run.sigma_std * torch.randn(size, generator=generator)).to(
            run.device
        )
        level = sigma.view(-1, 1, 1, 1)
        velocity = transformer(
            hidden_states=(1.0 - level) * clean + level * noise,
            encoder_hidden_states=torch.cat([clip_tokens, t5_tokens], dim=1),
            pooled_projections=pooled,
            timestep=1000.0 * sigma,
        ).sample
        error = (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3))
        return {
            "loss": error.mean(),
            "loss_above_0.5": error[sigma > 0.5].mean(),
            "loss_below_0.5": error[sigma <= 0.5].mean(),
        }

    fit.train(loss_of_step)
    with fit.averaged():
        transformer.save_pretrained(fit.folder / "transformer")
        t5.save_pretrained(fit.folder / "text_encoder_3")


def assemble(
    run: PipelineTrainConfig, *, generator_folder: Path | None = None, name: str = "pipeline"
) -> Path:
    """Stage 4: the pipeline folder in bfloat16; `generator_folder` picks a kept checkpoint instead of the
    last."""
    source = generator_folder or run.output / "generator"
    tokenizer: Any = networks.build_tokenizer()  # one word-level tokenizer in all three places
    half = torch.bfloat16
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(source / "transformer", dtype=half),
        scheduler=networks.build_scheduler(),
        vae=AutoencoderKL.from_pretrained(run.output / "vae" / "vae", dtype=half),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(run.output / "clip" / "text_encoder"),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(run.output / "clip" / "text_encoder_2"),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel.from_pretrained(source / "text_encoder_3"),
        tokenizer_3=tokenizer,
    )
    folder = run.output / name
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):  # diffusers records the path each part was loaded from
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def main(run: PipelineTrainConfig) -> None:
    """Run the stages that are asked for."""
    run.output.mkdir(parents=True, exist_ok=True)
    actions = {"vae": train_vae, "clip": train_clip, "generator": train_generator, "assemble": assemble}
    for stage in run.stages:
        actions[stage](run)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(PipelineTrainConfig))
