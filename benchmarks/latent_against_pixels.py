"""ReFL with a latent reward and with one on pixels: step time, peak memory, gold at equal updates.

    python benchmarks/shapes_baselines.py --output PIXELS          # trains the reward on pixels
    python benchmarks/latent_against_pixels.py --pixels PIXELS/0/pixel-network --output RUNS \
        --results benchmarks/results

Both rewards see the same generator, prompts, seeds and settings (recipe refl of the bundled domain). The
reward on pixels decodes with the VAE, and its gradient crosses the decoder. What a reward costs is what an
update takes beyond one whose reward is the mean of the latents: time is the median of updates, memory the
peak resident set of a process of its own. Gold and proxy come from whole runs over seeds.
"""

import json
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results
from torch import Tensor

from dina_lrm.alignment.config import AlignConfig, MonitorConfig
from dina_lrm.alignment.gold import paired_gain
from dina_lrm.alignment.run import Run
from dina_lrm.build.alignment import algorithm_of, alignment_prompts, gold_scores, latent_reward
from dina_lrm.core.seeds import mix_seeds
from dina_lrm.evaluation.baselines import PixelNetwork
from dina_lrm.evaluation.cost import counted_flops
from dina_lrm.recipes.alignment import alignment_recipe
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rewards import LatentReward, Reward
from dina_lrm.shapes.pipeline import load_pipeline

NAMES = ("latent, 3 levels", "latent, 1 level", "pixels")
COST_UPDATES = 7


@dataclass(frozen=True, kw_only=True)
class Options:
    pixels: Path
    """Folder of the reward on pixels."""
    output: Path
    results: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 200
    processes: int = 2
    """Whole runs at the same time; costs are measured one by one."""
    note: str = ""


class PixelReward:
    """Decodes, then scores; differentiable in the latents."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy = policy
        self.scorer = PixelNetwork.from_pretrained(folder)
        self.scorer.network.requires_grad_(False)

    def __call__(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        pixels = (self.policy.decode(latents) - 0.5) / 0.5  # as the network's image processor does
        return self.scorer.network(pixels, *self.scorer.tokens(prompts))


def no_reward(latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """The mean of the latents: what an update takes without a reward."""
    return latents.mean(dim=(1, 2, 3))


def reward_of(name: str, policy: Policy, folder: Path) -> Reward:
    match name:
        case "none":
            return no_reward
        case "pixels":
            return PixelReward(policy, folder)
        case _:
            shared = latent_reward("bundled", policy.pipeline)
            return shared if "3" in name else LatentReward(shared.model, (0.4,))


def new_run(options: Options, name: str, config: AlignConfig) -> Run:
    policy = Policy(load_pipeline(), lora_rank=config.policy.lora_rank, seed=mix_seeds(config.seed, 4))
    reward = reward_of(name, policy, options.pixels)
    return Run(
        config, policy, reward, *alignment_prompts(config), golds=gold_scores(config.monitor.gold, "cpu")
    )


def cost(options: Options, name: str) -> dict[str, float]:
    """Seconds of an update (median) and peak memory, in a fresh process."""
    torch.set_num_threads(1)
    config = replace(alignment_recipe("refl", "shapes"), cpu=True, batch_size=32)
    run = new_run(options, name, config)
    update, seconds = algorithm_of(config), []
    for step in range(COST_UPDATES):
        start = time.perf_counter()
        update(run, step)
        seconds.append(time.perf_counter() - start)
    latents = torch.randn(1, *run.policy.latent_shape(), generator=torch.Generator().manual_seed(0))

    def forward_and_backward() -> None:
        inside = latents.clone().requires_grad_(True)
        run.reward(inside, ["a red circle on a gray background"], [0]).sum().backward()

    forward_and_backward()  # encodes the prompt
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": float(np.median(seconds[2:])),
        "peak_bytes": float(peak),
        "reward_flops": float(counted_flops(forward_and_backward) or 0),
    }


def align(options: Options, job: tuple[str, int]) -> str:
    name, seed = job
    folder = options.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    file = folder / "result.json"
    if not file.exists():
        torch.set_num_threads(1)
        base = alignment_recipe("refl", "shapes")
        monitor = MonitorConfig(every=base.monitor.every, num_prompts=options.held_out)
        config = replace(base, output=str(folder), seed=seed, resume=True, cpu=True, monitor=monitor)
        result = new_run(options, name, config).train(algorithm_of(config))
        curves = [(one.step, one.proxy, one.gold["judge"]) for one in result.evaluations]
        file.write_text(json.dumps(curves))
    return str(file)


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    jobs = [(name, seed) for seed in options.seeds for name in NAMES]
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(partial(align, options), jobs, chunksize=1):
            print(line, flush=True)
    costs: dict[str, dict[str, float]] = {}
    for name in ("none", *NAMES):
        with context.Pool(1) as pool:
            costs[name] = pool.apply(cost, (options, name))
        print(name, costs[name], flush=True)
    rows = []
    for name in NAMES:
        found = []
        for seed in options.seeds:
            folder = options.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            found.append(json.loads((folder / "result.json").read_text()))
        own, none = costs[name], costs["none"]
        rows.append(
            {
                "reward": name,
                "gold_gain": [paired_gain(curve[-1][2], curve[0][2]) for curve in found],
                "best_gold_gain": [max(np.mean(one[2]) for one in c) - np.mean(c[0][2]) for c in found],
                "update_seconds": own["seconds"],
                "reward_seconds": own["seconds"] - none["seconds"],
                "reward_bytes": own["peak_bytes"] - none["peak_bytes"],
                "peak_bytes": own["peak_bytes"],
                "reward_flops": own["reward_flops"],
            }
        )
    folder = options.results or options.output
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "updates": alignment_recipe("refl", "shapes").num_steps,
        "held_out": options.held_out,
        "without_reward": costs["none"],
    }
    page = table(about, rows)
    write_results(folder, "latent_against_pixels", {**about, "rows": rows}, page, seeds=options.seeds)
    print(table(about, rows))


def table(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    pixels = next(row for row in rows if row["reward"] == "pixels")
    lines = [
        f"ReFL on the bundled generator, {about['updates']} updates; gold gain on {about['held_out']} "
        f"held-out captions by seed. Costs of the reward are what an update (32 pictures, bfloat16) takes "
        f"beyond one without; "
        f"the last three columns are shares of the reward on pixels.",
        "",
        "| reward | gold gain by seed | best on the way | seconds | MB | MFLOP a picture | time | memory "
        "| FLOPs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            row["reward"],
            ", ".join(f"{gain[0]:+.3f}" for gain in row["gold_gain"]),
            ", ".join(f"{gain:+.3f}" for gain in row["best_gold_gain"]),
            f"{row['reward_seconds']:.2f}",
            f"{row['reward_bytes'] / 1e6:.0f}",
            f"{row['reward_flops'] / 1e6:.0f}",
            *(f"{row[key] / pixels[key]:.2f}" for key in ("reward_seconds", "reward_bytes", "reward_flops")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
