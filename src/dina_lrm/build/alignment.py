"""From a config to an alignment run: `build` for reward models that are used, not trained."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dina_lrm.alignment.config import AlignConfig, DpoConfig, GrpoConfig, ReflConfig, StepDpoConfig
from dina_lrm.alignment.dpo import Dpo
from dina_lrm.alignment.gold import Evaluation, Gold, curves, missing_since, paired_gain
from dina_lrm.alignment.grpo import Grpo
from dina_lrm.alignment.processes import Processes
from dina_lrm.alignment.record import RunResult
from dina_lrm.alignment.refl import Refl
from dina_lrm.alignment.run import Run, Update
from dina_lrm.alignment.step_level import StepDpo
from dina_lrm.backbones.families import read_architecture
from dina_lrm.backbones.fingerprint import is_base_of
from dina_lrm.checkpoints.dina import read_checkpoint
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.pairs import load_image
from dina_lrm.data.shards.read import LatentShards, PairSet
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.metrics import Interval
from dina_lrm.models.encoders import Encoders, pipeline_encoders
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.pipelines.source import PipelineSource
from dina_lrm.remote.client import Client
from dina_lrm.remote.transport import is_address
from dina_lrm.reporting.alignment import AlignmentPoint, alignment_page
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rewards import LatentReward, Reward, RewardSum, ServerReward

__all__ = [
    "algorithm_of",
    "alignment_prompts",
    "gold_scores",
    "latent_reward",
    "load_generator",
    "read_prompts",
    "run_alignment",
    "write_alignment_page",
]

Log = Callable[[str], None]


def load_generator(location: str, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A live pipeline: "bundled", a folder in diffusers format, or a hub id."""
    if location == "bundled":
        from dina_lrm.shapes.pipeline import load_pipeline

        return load_pipeline(device=device or "cpu", dtype=dtype)
    from diffusers import DiffusionPipeline

    from dina_lrm.pipelines.libraries import quiet_loading

    with quiet_loading():
        pipeline: Any = DiffusionPipeline.from_pretrained(location, dtype=dtype)
    return pipeline.to(device) if device is not None else pipeline


def alignment_prompts(config: AlignConfig) -> tuple[list[str], list[str]]:
    """Prompts to train on, and held-out ones, which are the same for every seed of a run.

    Raises:
        InvalidInputError: a file without enough prompts.
    """
    wanted = config.monitor.num_prompts
    if config.prompts == "shapes":
        from dina_lrm.shapes.scenes import sample_caption

        def captions(seed: int, count: int, without: Sequence[str] = ()) -> list[str]:
            rng = np.random.default_rng(mix_seeds(seed, Stream.CAPTIONS))
            found: dict[str, None] = {}
            while len(found) < count:
                caption = sample_caption(rng).caption
                if caption not in without:
                    found[caption] = None
            return list(found)

        held_out = captions(HELD_OUT_SEED, wanted)
        return captions(config.seed, 2000, held_out), held_out
    prompts = read_prompts(config.prompts)
    if config.monitor.prompts is not None:
        held_out = read_prompts(config.monitor.prompts)[:wanted]
        return [prompt for prompt in prompts if prompt not in set(held_out)], held_out
    if len(prompts) <= wanted:
        raise InvalidInputError(
            f"{config.prompts} has {len(prompts)} distinct prompts, of which monitor.num_prompts = {wanted} "
            f"would be held out: give more, or monitor.prompts"
        )
    return prompts[:-wanted], prompts[-wanted:]


HELD_OUT_SEED = 20_26


def read_prompts(file: str) -> list[str]:
    """Distinct prompts of a .txt file, one a line, or of the "prompt" fields of a .jsonl file.

    Raises:
        InvalidInputError: another kind of file, a row without a prompt, or none at all.
    """
    path = Path(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise InvalidInputError(f'prompts come from "shapes", a .txt or a .jsonl file; not {file!r}')
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in prompts]
        for number, row in enumerate(rows, start=1):
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("prompt"), str)
                or not row["prompt"].strip()
            ):
                raise InvalidInputError(f'{file}, row {number}: no "prompt"')
        prompts = [row["prompt"] for row in rows]
    if not prompts:
        raise InvalidInputError(f"{file} has no prompts")
    return list(dict.fromkeys(prompts))


def latent_reward(
    location: str,
    pipeline: Any,
    *,
    noise_levels: Sequence[float] = (),
    share: bool = True,
    compile: bool = False,
    encoders: Encoders | None = None,
) -> LatentReward:
    """A reward for the pictures of a live pipeline; shares its transformer where it is its own backbone's.

    Args:
        compile: blocks and head.
        encoders: of the pipeline; a reward that shares its transformer takes these, so that a prompt that the
            policy has encoded is not encoded again.

    Raises:
        InvalidInputError: the reward reads latents of another VAE, or is a server.
    """
    if is_address(location):
        raise InvalidInputError(
            f"{location} is a server, which has no gradient and scores no noisy states: name bundled, a run "
            f"folder or a hub id"
        )
    source = PipelineSource(pipeline)
    weight = next(iter(source.network.parameters()))
    architecture = read_architecture(source.network_config())
    # A policy may start from a LoRA fused into its weights, which the reward has never seen.
    if share and is_base_of(read_checkpoint(location).fingerprint, architecture, source.network):
        model = RewardModel.from_pretrained(location, pipeline)
        if model.config.tuning != "full":
            model.attach(pipeline)
            if encoders is not None and encoders.text.max_text_tokens == model.config.max_text_tokens:
                model.encoders = encoders
    else:
        model = RewardModel.from_pretrained(location, device=weight.device, dtype=weight.dtype)
        model.requires_grad_(False)
    if compile:
        model.compile()
    ours = pipeline_encoders(pipeline, dtype=torch.float32).latent_space
    if model.latent_space is not None and ours is not None and model.latent_space != ours:
        raise InvalidInputError(
            f"the reward {location} is for another generator: it reads latents of {model.latent_space}, the "
            f"policy makes {ours}"
        )
    return LatentReward(model, tuple(noise_levels))


def server_reward(client: Client, policy: Policy, config: AlignConfig, prompt: str) -> ServerReward:
    """A server's reward for the latents of `policy`, asked for one score, so that what cannot be scored ends
    the run before its first sample.

    Raises:
        InvalidInputError: the server refuses latents or embeddings of this policy, or the token.
        ScoringError: it cannot be reached, or fails.
    """
    levels = config.reward.noise_levels
    reward = ServerReward(client, policy.encode, *levels)
    shape = policy.latent_shape(config.sampler.height, config.sampler.width)
    reward(torch.zeros(1, *shape), [prompt], [0])
    return reward


def gold_scores(names: Sequence[str], device: str) -> dict[str, Gold]:
    """Independent scores by name: "judge" of the bundled domain, or scorers of `evaluation.baselines`."""
    golds: dict[str, Gold] = {}
    for given in names:
        name, _, location = given.partition("=")
        if name == "judge":
            from dina_lrm.shapes.judge import judge

            golds[given] = lambda prompts, pictures: [
                judge(picture, prompt).utility for prompt, picture in zip(prompts, pictures, strict=True)
            ]
        else:
            from dina_lrm.evaluation.baselines import load_scorer

            scorer = load_scorer(name, location=location or None, device=device)
            golds[given] = lambda prompts, pictures, scorer=scorer: scorer.score(
                prompts, list(pictures)
            ).tolist()
    return golds


def algorithm_of(config: AlignConfig) -> Update:
    """The algorithm that a config is for."""
    match config:
        case ReflConfig():
            return Refl(config)
        case GrpoConfig():
            return Grpo(config)
        case DpoConfig():
            return Dpo(config, None if config.pairs is None else given_pairs(config.pairs))
        case StepDpoConfig():
            return StepDpo(config)
        case _:
            raise InvalidInputError(f"{type(config).__name__} names no algorithm")


def given_pairs(source: str) -> PairSet:
    """Pairs of latents for dpo: a latents file or a folder of `dina-lrm prepare`."""
    path = Path(source)
    return LatentShards.open(path) if path.is_dir() else LatentPairs.load(path)


def run_alignment(
    config: AlignConfig, *, pipeline: Any = None, log: Log = lambda line: None
) -> tuple[Policy, RunResult]:
    """A whole run: pipeline, rewards, prompts, training; writes OUTPUT/report.html at every evaluation.

    Args:
        pipeline: a live one instead of `config.policy.pipeline`.
    """
    # Before anything is loaded: settings that cannot work are refused at once.
    algorithm, weights = algorithm_of(config), config.reward.resolved_weights()
    prompts, held_out = alignment_prompts(config)
    # Each process its own: "cuda" alone would put all of them on the first.
    index = Processes(cpu=config.cpu).local_index
    device = f"cuda:{index}" if torch.cuda.is_available() and not config.cpu else "cpu"
    if pipeline is None:
        dtype = getattr(torch, config.policy.dtype)
        pipeline = load_generator(config.policy.pipeline, device=device, dtype=dtype)
    policy = Policy(
        pipeline,
        lora_rank=config.policy.lora_rank,
        lora_alpha=config.policy.lora_alpha,
        max_text_tokens=config.policy.max_text_tokens,
        gradient_checkpointing=config.policy.gradient_checkpointing,
        seed=mix_seeds(config.seed, Stream.FIRST_WEIGHTS),
    )
    with ExitStack() as clients:

        def term(location: str) -> Reward:
            if is_address(location):
                log(f"the reward is asked of {location}")
                return server_reward(clients.enter_context(Client(location)), policy, config, held_out[0])
            return latent_reward(
                location,
                pipeline,
                noise_levels=config.reward.noise_levels,
                share=config.reward.share,
                compile=config.reward.compile,
                encoders=policy.encoders,
            )

        reward = RewardSum(tuple(map(term, config.reward.models)), weights)
        run = Run(
            config,
            policy,
            reward,
            prompts,
            held_out,
            golds=gold_scores(config.monitor.gold, device),
            on_evaluation=write_alignment_page,
            log=log,
        )
        return policy, run.train(algorithm)


TITLES: dict[type[AlignConfig], str] = {
    ReflConfig: "ReFL",
    GrpoConfig: "Flow-GRPO",
    DpoConfig: "Diffusion-DPO",
    StepDpoConfig: "Step-level DPO",
}


def write_alignment_page(
    run: Run, evaluations: Sequence[Evaluation], pictures: Sequence[Image.Image]
) -> None:
    """OUTPUT/report.html of a run."""
    assert run.output is not None
    folder = run.output / "pictures" / f"{evaluations[0].step:06d}"
    before = [load_image(file) for file in sorted(folder.glob("*.png"))]
    found = curves(evaluations)

    def gain(now: Sequence[float], start: Sequence[float]) -> Interval:
        value, low, high = paired_gain(now, start)
        return Interval(value=value, low=low, high=high)

    points = [
        AlignmentPoint(
            step=evaluation.step,
            gains={
                name: gain(scores, curve[0][1])
                for name, curve in found.items()
                for step, scores in curve
                if step == evaluation.step
            },
            means={
                name: float(np.mean(scores))
                for name, curve in found.items()
                for step, scores in curve
                if step == evaluation.step
            },
            distance=evaluation.distance,
            diversity=evaluation.diversity,
            overoptimised=evaluation.overoptimised,
        )
        for evaluation in evaluations
    ]
    alignment_page(
        points,
        run.output / "report.html",
        title=f"{TITLES[type(run.config)]} on {run.config.policy.pipeline}",
        missing=missing_since(evaluations),
        prompts=run.held_out[: len(pictures)],
        before=before,
        now=pictures,
    )
