"""What accuracy costs on shapes: rewards on pixels and on latents, trained on the same pairs.

    python benchmarks/shapes_baselines.py --output RUN --results benchmarks/results

* clip-score     CLIP: a picture tower trained against the bundled text encoder on renders and their captions
                 (symmetric InfoNCE, arXiv:2103.00020); sees no preference
* clip-tuned     the same CLIP, both towers trained on the pairs: P = sigmoid of the difference of
                 exp(logit scale) times cosine (PickScore, arXiv:2305.01569)
* pixel-network  both towers and a transformer on their tokens, trained on the pairs
* step-level     the latent reward by Bradley-Terry at all noise levels, without noise calibration (LRM,
                 arXiv:2502.01051)
* dina           the latent reward of this package, recipe `shapes`

Each training is one process on one thread, resumed where it stopped; finished ones are not repeated. The
rewards lie in RUN/SEED/NAME in folders that `dina-lrm evaluate --scorers` reads; pairs with pictures in
RUN/pairs/{train,test}. With --results also shapes_baselines.{json,md,png}.
"""

import dataclasses
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from record import write_results
from torch import Tensor
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel

from dina_lrm.build.training import reward_model
from dina_lrm.checkpoints.config import LikelihoodConfig
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.pairs import load_image
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.data.sources.registry import read_source
from dina_lrm.evaluation.baselines import ClipScore, PickScore, PixelFusion, PixelNetwork, RewardScorer
from dina_lrm.evaluation.cost import counted_flops
from dina_lrm.evaluation.metrics import Interval, cluster_bootstrap, pair_correctness
from dina_lrm.evaluation.public import PublicResult, evaluate_comparisons
from dina_lrm.recipes import training as recipes
from dina_lrm.reporting import figures
from dina_lrm.shapes import networks
from dina_lrm.shapes.fit import Fit, PipelineTrainConfig, StageConfig
from dina_lrm.shapes.pairs import make_shapes_pairs
from dina_lrm.shapes.pipeline import load_pipeline
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import CANVAS, sample_caption, sample_scene
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.trainer import train

ENCODED = "latents.safetensors"
MEAN, STD = 0.5, 0.5
"""Of the picture towers' input."""
LATENT_LEVELS = {"step-level": (0.4,), "dina": (0.4,), "dina, 3 levels": (0.2, 0.5, 0.7)}
FOLDERS = {"dina, 3 levels": "dina"}


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    results: Path | None = None
    """Folder of the table and the figure; by default OUTPUT."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of new weights, order, noise."""
    train_prompts: int = 1800
    """Captions of the training pairs, six pairs each."""
    test_prompts: int = 350
    renders: int = 12_000
    """Captioned renders for CLIP."""
    clip_steps: int = 1200
    tuned_steps: int = 600
    pixel_steps: int = 2000
    latent_steps: int = 400
    pairs_per_step: int = 96
    processes: int = 2
    """Trainings at the same time."""


def main(options: Options) -> None:
    jobs = [(name, seed) for seed in options.seeds for name in ("pixels", "dina", "step-level")]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for line in pool.imap(partial(make_pairs, options), ["train", "test"]):
            print(line, flush=True)
        for line in pool.imap_unordered(partial(fit, options), jobs, chunksize=1):
            print(line, flush=True)
    measure(options)


# --- pairs -------------------------------------------------------------------------------------------------


def make_pairs(options: Options, part: str) -> str:
    """Pictures, rows and the optimal accuracy of a set of pairs: the pairs of benchmarks/ablation.py."""
    folder = options.output / "pairs" / part
    if not (folder / "rows.jsonl").exists():
        torch.set_num_threads(1)
        num_prompts, seed = {"train": (options.train_prompts, 9001), "test": (options.test_prompts, 9002)}[
            part
        ]
        made = make_shapes_pairs(load_pipeline(), num_prompts=num_prompts, seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[int, str] = {}
        for index, candidate in enumerate(made.candidates):
            names[id(candidate.image)] = f"{index:05d}.png"
            candidate.image.save(folder / f"{index:05d}.png")
        rows = [
            {
                "prompt": pair.prompt,
                "chosen": names[id(pair.chosen)],
                "rejected": names[id(pair.rejected)],
                "votes_chosen": pair.votes_chosen,
                "votes_rejected": pair.votes_rejected,
            }
            for pair in made.pairs
        ]
        (folder / "bayes.json").write_text(json.dumps(made.bayes.tolist()))
        if part == "train":
            made.to_latents(reward_model(recipes.shapes().model)).save(folder / ENCODED)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@dataclass(frozen=True, kw_only=True)
class PixelPairs:
    """Pairs of pictures in memory."""

    pictures: np.ndarray
    """uint8 (picture, height, width, 3)."""
    chosen: Tensor
    rejected: Tensor
    """(pair,), rows of `pictures`."""
    ids: Tensor
    """(pair, token)"""
    target: Tensor
    """(pair,), share of the votes."""


def pixel_pairs(folder: Path, tokenizer: Any) -> PixelPairs:
    pairs = read_pairs(folder / "rows.jsonl", image_root=folder, ties="half").pairs
    place: dict[Any, int] = {}
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            place.setdefault(side, len(place))
    return PixelPairs(
        pictures=np.stack([np.asarray(load_image(picture)) for picture in place]),
        chosen=torch.tensor([place[pair.chosen] for pair in pairs]),
        rejected=torch.tensor([place[pair.rejected] for pair in pairs]),
        ids=tokenizer([p.prompt for p in pairs], padding="max_length", return_tensors="pt")["input_ids"],
        target=torch.tensor([pair.target for pair in pairs]),
    )


def normalised(pictures: np.ndarray) -> Tensor:
    """uint8 (batch, height, width, 3) to what the towers take."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


# --- training ----------------------------------------------------------------------------------------------


def fit(options: Options, job: tuple[str, int]) -> str:
    name, seed = job
    torch.set_num_threads(1)
    folder = options.output / str(seed)
    if name == "pixels":
        for part in (fit_clip, fit_tuned, fit_pixel_network):
            part(options, folder, seed)
    else:
        fit_latent(options, folder / name, name, seed)
    return f"{folder}: {name}"


def schedule(options: Options, folder: Path, seed: int) -> PipelineTrainConfig:
    return PipelineTrainConfig(output=folder / "training", seed=seed, ema_decay=0.99)


def new_clip() -> Any:
    """The bundled text encoder and a new picture tower as one CLIP model."""
    pipeline = load_pipeline()
    vision = networks.build_clip_image_encoder().config
    text = pipeline.text_encoder.config
    clip: Any = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=networks.PROJECTION_DIM
        )
    )
    text_state = pipeline.text_encoder.state_dict()
    loaded = clip.load_state_dict(text_state, strict=False)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    return clip


def processor(folder: Path) -> None:
    """What AutoImageProcessor and AutoTokenizer find beside the weights."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": CANVAS},
        "crop_size": {"height": CANVAS, "width": CANVAS},
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    networks.build_tokenizer().save_pretrained(folder)


def features(clip: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features of pictures and texts, float32."""
    mask = (ids != networks.PAD).long()
    text = clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    image = clip.get_image_features(pixel_values=pixels).pooler_output
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def fit_clip(options: Options, folder: Path, seed: int) -> None:
    target = folder / "clip-score"
    if (target / "preprocessor_config.json").exists():
        return
    rng = np.random.default_rng(9003)
    specs = [sample_caption(rng) for _ in range(options.renders)]
    pictures = np.stack([np.asarray(render(sample_scene(rng, spec))) for spec in specs])
    tokenizer: Any = networks.build_tokenizer()
    ids = tokenizer([spec.caption for spec in specs], padding="max_length", return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    clip = new_clip()
    for part in (clip.text_model, clip.text_projection):
        part.requires_grad_(False)
    config = StageConfig(steps=options.clip_steps, batch_size=128, learning_rate=1e-3)
    run = Fit("clip", config, schedule(options, folder, seed), {"clip": clip})

    def loss(run: Fit) -> dict[str, Tensor]:
        rows = torch.randint(len(pictures), (config.batch_size,), generator=run.generator())
        image, text = features(clip, normalised(pictures[rows.numpy()]), ids[rows])
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ text.T
        own = torch.arange(len(rows))
        both = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        return {"loss": both / 2, "top1": (logits.argmax(dim=1) == own).float().mean()}

    run.train(loss)
    run.export(target)
    _lift(target / "clip", target)


def _lift(source: Path, target: Path) -> None:
    """A module that `Fit` exported, to where a scorer expects it."""
    for file in source.iterdir():
        file.replace(target / file.name)
    source.rmdir()
    processor(target)


def preference_loss(margin: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Bradley-Terry on shares of votes."""
    right = ((margin > 0) == (target > 0.5)).float().mean()
    return {"loss": F.binary_cross_entropy_with_logits(margin, target), "accuracy": right}


def draw_pairs(options: Options, pairs: PixelPairs, run: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of both sides below each other, their tokens, targets."""
    rows = torch.randint(len(pairs.target), (options.pairs_per_step,), generator=run.generator())
    sides = torch.cat([pairs.chosen[rows], pairs.rejected[rows]]).numpy()
    return normalised(pairs.pictures[sides]), pairs.ids[rows].repeat(2, 1), pairs.target[rows]


def fit_tuned(options: Options, folder: Path, seed: int) -> None:
    target = folder / "clip-tuned"
    if (target / "preprocessor_config.json").exists():
        return
    torch.manual_seed(seed)
    clip: Any = CLIPModel.from_pretrained(folder / "clip-score")
    pairs = pixel_pairs(options.output / "pairs" / "train", networks.build_tokenizer())
    config = StageConfig(steps=options.tuned_steps, batch_size=options.pairs_per_step, learning_rate=3e-4)
    run = Fit("tuned", config, schedule(options, folder, seed), {"clip": clip.train()})

    def loss(run: Fit) -> dict[str, Tensor]:
        pixels, ids, share = draw_pairs(options, pairs, run)
        image, text = features(clip, pixels, ids)
        chosen, rejected = (clip.logit_scale.exp() * (image * text).sum(dim=-1)).chunk(2)
        return preference_loss(chosen - rejected, share)

    run.train(loss)
    run.export(target)
    _lift(target / "clip", target)


def fit_pixel_network(options: Options, folder: Path, seed: int) -> None:
    target = folder / "pixel-network"
    if (target / "fusion.json").exists():
        return
    torch.manual_seed(seed)
    network = PixelFusion(CLIPModel.from_pretrained(folder / "clip-score"))
    pairs = pixel_pairs(options.output / "pairs" / "train", networks.build_tokenizer())
    config = StageConfig(steps=options.pixel_steps, batch_size=options.pairs_per_step, learning_rate=5e-4)
    run = Fit("pixel-network", config, schedule(options, folder, seed), {"network": network.train()})

    def loss(run: Fit) -> dict[str, Tensor]:
        pixels, ids, share = draw_pairs(options, pairs, run)
        chosen, rejected = network(pixels, ids, ids != networks.PAD).float().chunk(2)
        return preference_loss(chosen - rejected, share)

    run.train(loss)
    target.mkdir(parents=True, exist_ok=True)
    processor(target)
    with run.averaged():
        image_processor = AutoImageProcessor.from_pretrained(target)
        PixelNetwork(network, networks.build_tokenizer(), image_processor).save_pretrained(target)


def fit_latent(options: Options, target: Path, name: str, seed: int) -> None:
    if (target / "config.json").exists():
        return
    base: TrainConfig = recipes.shapes() if name == "dina" else recipes.shapes_bradley_terry()
    if name != "dina":
        base = replace(base, ensemble_fraction=0.0)
    config = replace(
        base,
        output=str(target),
        seed=seed,
        num_steps=options.latent_steps,
        batch_size=options.pairs_per_step,
        precision="bfloat16",
        cpu=True,
        tensorboard=False,
        resume=True,
        checkpoint_every=100,
        optimizer=replace(base.optimizer, ema_decay=0.98),
    )
    likelihood = LikelihoodConfig(
        kind=config.loss.likelihood, slope=config.loss.slope, floor=config.loss.floor
    )
    model = reward_model(config.model, likelihood, seed=seed)
    train(config, model, LatentPairs.load(options.output / "pairs" / "train" / ENCODED))


# --- measuring ---------------------------------------------------------------------------------------------


def load(folder: Path, name: str) -> Any:
    match name:
        case "clip-score":
            return ClipScore.from_pretrained(folder / name)
        case "clip-tuned":
            return PickScore.from_pretrained(folder / name)
        case "pixel-network":
            return PixelNetwork.from_pretrained(folder / name)
        case _:
            where = folder / FOLDERS.get(name, name)
            return RewardScorer.from_pretrained(where, noise_levels=LATENT_LEVELS[name])


NAMES = ("clip-score", "clip-tuned", "pixel-network", "step-level", "dina", "dina, 3 levels")


def measure(options: Options) -> None:
    """Accuracy by seed, and what a score costs from a picture and from a generator's latents."""
    folder = options.output / "pairs" / "test"
    bayes = np.array(json.loads((folder / "bayes.json").read_text()))
    pairs = read_pairs(folder / "rows.jsonl", image_root=folder, ties="half").pairs
    target = np.array([pair.target for pair in pairs])
    optimal = pair_correctness(bayes - 0.5, target, ties="half")
    counted = ~np.isnan(optimal)
    shown: list[PublicResult] = []
    rows = []
    for name in NAMES:
        correct, cost = [], None
        for seed in options.seeds:
            scorer = load(options.output / str(seed), name)
            result = evaluate_comparisons(
                partial(_named, name, scorer),
                read_source("jsonl", folder),
                rule="strict",
                model=name,
                batch_size=64,
            )
            result.save(options.output / str(seed) / "evaluation" / name)
            margin = result.score_chosen - result.score_rejected
            correct.append(pair_correctness(margin, target, ties="wrong"))
            if seed == options.seeds[0]:
                cost = {**dataclasses.asdict(result.cost), **latent_cost(scorer)}
                shown.append(result)
        prompts = np.repeat(np.arange(len(target) // 6), 6)
        pooled = np.stack(correct).mean(axis=0)
        rows.append(
            {
                "model": name,
                "by_seed": [float(np.nanmean(one)) for one in correct],
                "accuracy": dataclasses.asdict(cluster_bootstrap(pooled, prompts)),
                "share_of_bayes": dataclasses.asdict(cluster_bootstrap(pooled, prompts, reference=optimal)),
                "cost": cost,
            }
        )
    about = {
        "train_pairs": 6 * options.train_prompts,
        "test_pairs": int(counted.sum()),
        "seeds": list(options.seeds),
        "bayes_accuracy": float(np.nanmean(optimal)),
    }
    target_folder = options.results or options.output
    page = table(about, rows)
    write_results(target_folder, "shapes_baselines", {**about, "rows": rows}, page, seeds=options.seeds)
    figure = figures.accuracy_against_cost(
        [row["model"] for row in rows],
        [Interval(**row["accuracy"]) for row in rows],
        [row["cost"]["flops_from_latents"] / 1e9 for row in rows],
        unit="GFLOP a score, from the generator's latents",
    )
    figures.save_png(figure, target_folder / "shapes_baselines.png")
    print(table(about, rows))


def _named(name: str, scorer: Any, prompts: list[str], images: list[Any]) -> dict[str, Tensor]:
    return {name: scorer.score(prompts, images)}


def latent_cost(scorer: Any) -> dict[str, int | None]:
    """FLOPs of a score from latents, the prompt encoded already by the generator where the reward can use
    that: a reward on pixels decodes first and encodes the prompt with its own text tower."""
    model = scorer.model if isinstance(scorer, RewardScorer) else None
    latents = torch.zeros(1, networks.LATENT_CHANNELS, CANVAS // 4, CANVAS // 4)
    prompt = "a red circle on a blue background"
    if model is not None:
        conditioning = model.encode_prompts(prompt)
        levels = scorer.noise_levels
        return {
            "flops_from_latents": counted_flops(
                lambda: model.score_latents(latents, conditioning, levels, seed=0)
            )
        }
    vae: Any = load_pipeline().vae

    def decode_and_score() -> None:
        with torch.no_grad():
            pixels = vae.decode(latents).sample
            ids = torch.ones(1, networks.MAX_TOKENS, dtype=torch.long)
            if isinstance(scorer, PixelNetwork):
                scorer.network(pixels, ids, ids > 0)
            else:
                features(scorer.model, pixels, ids)

    return {"flops_from_latents": counted_flops(decode_and_score)}


def table(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{about['train_pairs']} training pairs, {about['test_pairs']} test pairs, seeds {about['seeds']}, "
        f"Bayes-optimal accuracy {100 * about['bayes_accuracy']:.1f} %.",
        "",
        "| | accuracy %, mean (95 % interval over prompts) | by seed | % of Bayes | GFLOP from a picture "
        "| GFLOP from latents |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        accuracy, share, cost = row["accuracy"], row["share_of_bayes"], row["cost"]
        cells = [
            row["model"],
            f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})",
            ", ".join(f"{100 * one:.1f}" for one in row["by_seed"]),
            f"{100 * share['value']:.1f}",
            f"{cost['flops'] / 1e9:.2f}",
            f"{cost['flops_from_latents'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
