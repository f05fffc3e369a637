"""Trains the bundled pipeline from nothing, in two or three hours on two cores.

    python -m dina_lrm.shapes.train --output RUN

Stages, each resumable from its last checkpoint in the run folder and skipped when done:

1. `vae`        AutoencoderKL on renders, two fifths of them corrupted (L1 + L2 + edges + KL), then latent
                shift and scale
2. `clip`       two CLIP text encoders against one image encoder (symmetric InfoNCE on renders and captions)
3. `text`       T5 encoder: what its caption says is where (see `dina_lrm.shapes.layout`)
4. `generator`  MMDiT: rectified flow on the latents of a fixed pool of renders, and a read-out of the scene
                from the middle block
5. `assemble`   one `StableDiffusion3Pipeline` folder in half precision, from the EMA weights
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dina_lrm.core.precision import faster_precision, matrix_precision
from dina_lrm.errors import InvalidInputError
from dina_lrm.shapes import networks
from dina_lrm.shapes.fit import Fit, PipelineTrainConfig
from dina_lrm.shapes.layout import LayoutReadout, TextReadout, collect_tokens, layout_scale, scene_layout
from dina_lrm.shapes.render import CORRUPTIONS, render
from dina_lrm.shapes.scenes import CANVAS, Scene, sample_caption, sample_scene


def render_pool(
    size: int, *, seed: int, corrupted_fraction: float = 0.0
) -> tuple[np.ndarray, list[str], list[Scene]]:
    """`size` captioned renders: uint8 (size, CANVAS, CANVAS, 3), their captions and their scenes."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((size, CANVAS, CANVAS, 3), dtype=np.uint8)
    captions: list[str] = []
    scenes: list[Scene] = []
    for index in track(range(size), description="rendering"):
        spec = sample_caption(rng)
        scene = sample_scene(rng, spec)
        image = render(scene)
        if rng.random() < corrupted_fraction:
            image = CORRUPTIONS[str(rng.choice(list(CORRUPTIONS)))](image, float(rng.uniform(0.1, 1.0)), rng)
        pictures[index] = np.asarray(image)
        captions.append(spec.caption)
        scenes.append(scene)
    return pictures, captions, scenes


def to_model_range(pictures: np.ndarray | Tensor, device: str = "cpu") -> Tensor:
    """uint8 (batch, height, width, 3) to float32 (batch, 3, height, width) in [-1, 1]."""
    return torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_vae(run: PipelineTrainConfig) -> None:
    """Stage 1."""
    torch.manual_seed(run.seed)
    vae: Any = networks.build_vae()
    vae.to(run.device)
    fit = Fit("vae", run.vae, run, {"vae": vae})
    pictures, _, _ = render_pool(min(run.pool_size, 12_000), seed=run.seed + 1, corrupted_fraction=0.4)

    def loss_of_step(fit: Fit) -> dict[str, Tensor]:
        generator = fit.generator()
        rows = torch.randint(len(pictures), (run.vae.batch_size,), generator=generator)
        images = to_model_range(pictures[rows.numpy()], run.device)
        posterior = vae.encode(images).latent_dist
        eps = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
        decoded = vae.decode(posterior.mean + posterior.std * eps).sample.float()
        error = decoded - images
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).float().mean()
        parts = {
            "l1": error.abs().mean(),
            "l2": error.square().mean(),
            # Of neighbours' differences: without it edges are soft and pixel noise is smoothed away.
            "edges": 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()),
        }
        return {"loss": sum(parts.values()) + run.kl_weight * kl, **parts, "kl": kl}

    fit.train(loss_of_step)
    with fit.averaged(), torch.no_grad():
        latents = encode_pictures(vae, pictures[:1024], run.device)
        vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item())
        vae.save_pretrained(fit.folder / "vae")


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray, device: str, batch_size: int = 64) -> Tensor:
    """Posterior means, neither shifted nor scaled: float32 (batch, 16, 16, 16) on the CPU."""
    rows, kind = [], torch.device(device).type
    for start in range(0, len(pictures), batch_size):
        with matrix_precision(faster_precision(kind), kind):
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
    pictures, captions, _ = render_pool(min(run.pool_size, 12_000), seed=run.seed + 2)
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
    fit.export(fit.folder)


def latent_pool(run: PipelineTrainConfig) -> dict[str, Tensor]:
    """What the generator is trained on; made once.

    `latents`, float16 (pool, 16, 16, 16), shifted and scaled; `ids`, (pool, MAX_TOKENS); `layouts`, float16
    (pool, token, channel).
    """
    cached = run.output / f"pool_{run.pool_size}.pt"
    if cached.exists():
        return torch.load(cached, weights_only=True)
    vae: Any = AutoencoderKL.from_pretrained(run.output / "vae" / "vae")
    vae.to(run.device)
    pictures, captions, scenes = render_pool(run.pool_size, seed=run.seed + 3)
    latents = (
        encode_pictures(vae, pictures, run.device) - vae.config.shift_factor
    ) * vae.config.scaling_factor
    layouts = torch.from_numpy(np.stack([scene_layout(scene) for scene in scenes]))
    pool = {"latents": latents.half(), "ids": token_ids(captions), "layouts": layouts.half()}
    torch.save(pool, cached)
    return pool


def train_text(run: PipelineTrainConfig) -> None:
    """Stage 3."""
    pool = latent_pool(run)
    ids, layouts = pool["ids"], pool["layouts"]
    scale = layout_scale(layouts).to(run.device)
    torch.manual_seed(run.seed + 3)
    t5: Any = networks.build_t5_encoder()
    if run.initial is not None:
        t5 = T5EncoderModel.from_pretrained(run.initial / "text_encoder_3", dtype=torch.float32)
    readout = TextReadout(networks.TEXT_DIM)
    modules: dict[str, nn.Module] = {"text_encoder_3": t5, "readout": readout}
    for module in modules.values():
        module.to(run.device)
    fit = Fit("text", run.text, run, modules, _muon(run, "text_encoder_3.encoder"))

    def loss_of_step(fit: Fit) -> dict[str, Tensor]:
        generator = fit.generator()
        rows = torch.randint(len(ids), (run.text.batch_size,), generator=generator)
        tokens = padded(ids[rows].to(run.device), draw_text_length(generator))
        error = (readout(t5(tokens)[0]).float() - layouts[rows].to(run.device)) / scale
        return {"loss": error.square().mean()}

    fit.train(loss_of_step)
    fit.export(fit.folder)


def _muon(run: PipelineTrainConfig, *prefixes: str) -> tuple[str, ...]:
    """Names of the modules whose matrices are Muon's."""
    return prefixes if run.optimizer == "muon" else ()


def draw_text_length(generator: torch.Generator) -> int:
    """T5 tokens of a step: nearly always MAX_TOKENS, sometimes padded further.

    `StableDiffusion3Pipeline` pads the T5 prompt to 256 tokens unless told otherwise, and the transformer
    attends to the padding without a mask: seeing longer padding in training makes plain calls of the pipeline
    work as well.
    """
    draw = torch.rand((), generator=generator).item()
    if draw < 0.94:
        return networks.MAX_TOKENS
    return 48 if draw < 0.97 else 128 if draw < 0.99 else 256


def padded(ids: Tensor, length: int) -> Tensor:
    """Token ids (caption, token) padded to `length` tokens."""
    return F.pad(ids, (0, length - ids.shape[1]), value=networks.PAD)


def train_generator(run: PipelineTrainConfig) -> None:
    """Stage 4."""
    pool = latent_pool(run)
    latents, ids, layouts = pool["latents"], pool["ids"], pool["layouts"]
    scale = layout_scale(layouts).to(run.device)
    empty = token_ids([""])
    clips: list[Any] = [
        CLIPTextModelWithProjection.from_pretrained(run.output / "clip" / name).eval()
        for name in ("text_encoder", "text_encoder_2")
    ]
    torch.manual_seed(run.seed + 2)
    transformer: Any = networks.build_transformer(run.num_layers, run.num_heads)
    if run.initial is not None:
        known: Any = SD3Transformer2DModel.from_pretrained(run.initial / "transformer", dtype=torch.float32)
        if (known.config.num_layers, known.config.num_attention_heads) == (run.num_layers, run.num_heads):
            transformer = known
    t5: Any = T5EncoderModel.from_pretrained(run.output / "text" / "text_encoder_3").eval()
    readout = LayoutReadout(transformer.config.caption_projection_dim)
    for module in (transformer, t5, readout, *clips):
        module.to(run.device)
    seen = collect_tokens(transformer)
    compiled = torch.compile(transformer, dynamic=False) if run.compile else transformer
    modules = {"transformer": transformer, "readout": readout}
    fit = Fit("generator", run.generator, run, modules, _muon(run, "transformer.transformer_blocks"))

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
            t5_tokens = t5(padded(tokens, length))[0]
        clean = latents[rows].float().to(run.device)
        noise = torch.randn(clean.shape, generator=generator).to(run.device)
        sigma = torch.sigmoid(run.sigma_mean + run.sigma_std * torch.randn(size, generator=generator)).to(
            run.device
        )
        level = sigma.view(-1, 1, 1, 1)
        # The rare longer prompts are not worth a compilation of their own.
        network = compiled if length == networks.MAX_TOKENS else transformer
        velocity = network(
            hidden_states=(1.0 - level) * clean + level * noise,
            encoder_hidden_states=torch.cat([clip_tokens, t5_tokens], dim=1),
            pooled_projections=pooled,
            timestep=1000.0 * sigma,
        ).sample
        error = (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3))
        layout_error = (readout(seen["image"]).float() - layouts[rows].to(run.device)) / scale
        layout = layout_error.square().mean()
        return {
            "loss": error.mean() + run.layout_weight * layout,
            "flow": error.mean(),
            "layout": layout,
            "loss_above_0.5": error[sigma > 0.5].mean(),
            "loss_below_0.5": error[sigma <= 0.5].mean(),
        }

    fit.train(loss_of_step)
    fit.export(fit.folder)


def assemble(
    run: PipelineTrainConfig, *, generator_folder: Path | None = None, name: str = "pipeline"
) -> Path:
    """Stage 5: the pipeline folder in bfloat16; `generator_folder` picks a kept checkpoint instead of the
    last."""
    source, clip = generator_folder or run.output / "generator", run.output / "clip"
    tokenizer: Any = networks.build_tokenizer()  # one word-level tokenizer in all three places
    half = torch.bfloat16
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(source / "transformer", dtype=half),
        scheduler=networks.build_scheduler(),
        vae=AutoencoderKL.from_pretrained(run.output / "vae" / "vae", dtype=half),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(clip / "text_encoder", dtype=half),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(clip / "text_encoder_2", dtype=half),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel.from_pretrained(run.output / "text" / "text_encoder_3"),
        tokenizer_3=tokenizer,
    )
    folder = run.output / name
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # diffusers records the path each part was loaded from
        if "dtype" in config:  # a text encoder is loaded in the type that is stated, whatever it is stored in
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def start_from(run: PipelineTrainConfig, initial: Path) -> None:
    """Put the VAE and the text encoders of `initial` where their stages would have left them, unless this run
    has its own."""
    places = {"vae": "vae", "text_encoder": "clip", "text_encoder_2": "clip", "text_encoder_3": "text"}
    for part, place in places.items():
        if not (initial / part).is_dir():
            raise InvalidInputError(f"initial = {str(initial)!r} has no folder {part}/")
        if not (run.output / place / part).exists():
            shutil.copytree(initial / part, run.output / place / part)


def main(run: PipelineTrainConfig) -> None:
    """Run the stages that are asked for."""
    run.output.mkdir(parents=True, exist_ok=True)
    if run.initial is not None:
        if {"vae", "clip"} & set(run.stages):
            raise InvalidInputError(
                "initial goes with stages text, generator, assemble: vae and clip are kept"
            )
        start_from(run, run.initial)
    actions = {
        "vae": train_vae,
        "clip": train_clip,
        "text": train_text,
        "generator": train_generator,
        "assemble": assemble,
    }
    for stage in run.stages:
        actions[stage](run)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(PipelineTrainConfig))
