"""`dina-lrm search PROMPT`: the best of several samples, chosen while they are being sampled."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag, ModelOptions, check_prompt, find_device, parse, refuse
from dina_lrm.runs.pace import WorkProgress

if TYPE_CHECKING:
    from PIL.Image import Image

    from dina_lrm import RewardModel
    from dina_lrm.sampling.policy import Policy
    from dina_lrm.sampling.rollout import SamplerConfig
    from dina_lrm.sampling.search import SearchResult

PASSES = "passes of the denoiser"


FLAGS_OF = {
    ("halving",): ("--confidence", "--first-check", "--every"),
    ("halving", "best-of-n"): ("--draft",),
    ("guided",): ("--strength",),
}


@dataclass(frozen=True, kw_only=True)
class Search:
    """Sample several pictures for a prompt and keep the ones that the reward prefers; no training."""

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """What the pictures should show."""
    samples: int = 16
    """Number of candidates."""
    method: Literal["halving", "best-of-n", "guided"] = "halving"
    """halving drops candidates while they are noisy; best-of-n samples all to the end; guided moves states
    along the reward's gradient."""
    keep: int = 1
    """How many pictures to write, best first."""
    steps: int = 28
    """Sampling steps of a candidate that goes to the end."""
    guidance_scale: float = 4.0
    """Classifier-free guidance; 1 is without."""
    height: int | None = None
    """Height of the pictures in pixels; by default the generator's own."""
    width: int | None = None
    """Width of the pictures in pixels; by default the generator's own."""
    confidence: float = 0.5
    """halving: probability that the leader is preferred at which a candidate is dropped; 0.5 halves at every
    check."""
    draft: int | None = None
    """halving: steps of the grid that candidates are compared on; by default 10, where --steps are twice as
    many. best-of-n: steps of all candidates, of which the best is sampled again in --steps; by default
    none."""
    first_check: int | None = None
    """halving: steps of that grid before the first comparison; by default a fifth of them, of a draft 3."""
    every: int | None = None
    """halving: steps between comparisons; by default a tenth of them."""
    strength: float = 0.05
    """guided: size of the moves, as a fraction of the noise that is left."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("search")
    """Receives 000.png, 001.png, ... and search.json."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the result of an earlier search in that folder."""
    seed: int = 0
    """Seed of the candidates' noise: the same seed gives the same pictures."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    options = parse(Search, "search", arguments)
    check_prompt("search", options.prompt)
    if not options.prompt.strip():
        raise UsageError('give a prompt, as in: dina-lrm search "a red circle" --samples 8')
    for methods, flags in FLAGS_OF.items():
        if options.method not in methods:
            refuse(arguments, flags, f"goes with --method {' or '.join(methods)}")
    if options.keep < 1 or options.samples < 1:
        raise UsageError(f"--keep {options.keep}, --samples {options.samples}: must be at least 1")
    if options.model.model.startswith(("http://", "https://")):
        raise UsageError(
            f"--model {options.model.model}: a search looks at predicted latents step by step, so the reward "
            f"has to be here: a folder, or a hub id"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    if (options.output / "search.json").exists() and not options.overwrite:
        raise UsageError(
            f"{str(options.output)!r} holds the result of a search; choose another --output, or replace it "
            "with --overwrite"
        )
    import torch

    from dina_lrm.build.alignment import latent_reward, load_generator
    from dina_lrm.sampling.policy import Policy
    from dina_lrm.sampling.rollout import SamplerConfig

    location = options.model.pipeline
    if location is None:
        from dina_lrm.checkpoints.dina import read_checkpoint

        location = read_checkpoint(options.model.model).config.backbone_id
        if location is None:
            raise UsageError("the reward names no generator: give --pipeline")
    device = find_device(options.model.device)
    pipeline = load_generator(location, device=str(device), dtype=getattr(torch, options.model.dtype))
    policy, model = Policy(pipeline), latent_reward(options.model.model, pipeline).model
    sampler = SamplerConfig(
        num_steps=options.steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
    )
    plain = options.samples * options.steps * (1 if options.guidance_scale == 1 else 2)
    with WorkProgress({PASSES: None if options.method == "halving" else plain}) as progress:
        policy.network.register_forward_hook(counted(progress))
        result = run(options, policy, model, sampler)
    kept = min(options.keep, len(result.scores))
    files = write(options, policy.pictures(result.latents[:kept]), result)
    if options.as_json:
        print_json(summary(options, result) | {"files": [str(file) for file in files]})
        return 0
    rows = [
        [str(file), f"{score:.3f}", str(index)]
        for file, score, index in zip(files, result.scores.tolist(), result.indices, strict=False)
    ]
    print_table(["picture", "score", "candidate"], rows, title=options.prompt)
    log(
        f"{result.evaluations:.0f} passes of the denoiser, scoring included; sampling {options.samples} to "
        f"the end alone takes {plain}"
    )
    if len(result.scores) < options.keep:
        log(f"{len(result.scores)} of the {options.keep} asked for were left: halving keeps few")
    return 0


def run(options: Search, policy: "Policy", model: "RewardModel", sampler: "SamplerConfig") -> "SearchResult":
    """The search itself."""
    from dina_lrm.sampling import search

    common = {"samples": options.samples, "seed": options.seed, "sampler": sampler}
    match options.method:
        case "halving":
            return search.successive_halving(
                policy,
                model,
                options.prompt,
                confidence=options.confidence,
                draft=options.draft,
                first_check=options.first_check,
                every=options.every,
                **common,
            )
        case "best-of-n":
            return search.best_of_n(policy, model, options.prompt, draft=options.draft, **common)
        case "guided":
            return search.guided(policy, model, options.prompt, strength=options.strength, **common)


def counted(progress: WorkProgress) -> Callable[..., None]:
    """A hook of the denoiser that tells how many states have gone through it."""
    done = 0

    def hook(_network: object, _inputs: object, output: Any) -> None:
        nonlocal done
        done += len(output[0])
        progress.tell(PASSES, done)

    return hook


def write(options: Search, pictures: "Sequence[Image]", result: "SearchResult") -> list[Path]:
    """The pictures and search.json."""
    from dina_lrm.files import atomic_path, atomic_write

    for old in options.output.glob("[0-9][0-9][0-9].png"):  # of a search that kept more
        old.unlink()
    files = [options.output / f"{index:03d}.png" for index in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        with atomic_path(file) as aside:
            picture.save(aside, format="PNG")
    record = summary(options, result) | {"files": [file.name for file in files]}
    atomic_write(options.output / "search.json", (json.dumps(record, indent=2) + "\n").encode())
    return files


def summary(options: Search, result: "SearchResult") -> dict[str, object]:
    return {
        "prompt": options.prompt,
        "method": options.method,
        "samples": options.samples,
        "scores": result.scores.tolist(),
        "candidates": list(result.indices),
        "evaluations": result.evaluations,
        "alive": list(result.alive),
    }
