"""Latency, peak memory, FLOPs and utilisation of one score at full size, with random weights in bfloat16.

    python benchmarks/score_cost.py --model sd35m --device cuda [--pixels 1024] [--output FILE]
    python benchmarks/score_cost.py --model flux --device cuda

What a score costs does not depend on what the weights are, so nothing is downloaded. Utilisation is the
counted FLOPs over the time, as a share of the rate of a large bfloat16 matrix product in the same run.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from record import write_results

from dina_lrm import Conditioning, RewardModel
from dina_lrm.backbones.flux import FLUX1_DEV
from dina_lrm.backbones.sd3 import SD35_MEDIUM
from dina_lrm.build.training import reward_model
from dina_lrm.evaluation.cost import TEXT_TOKENS, score_flops
from dina_lrm.recipes.training import recipe

MODELS = {"sd35m": ("sd35m-12-layers", SD35_MEDIUM), "flux": ("flux-19-layers", FLUX1_DEV)}
MATRIX = {"cuda": 8192, "cpu": 1024}
"""Side of the matrices whose product sets the rate."""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Literal["sd35m", "flux"] = "sd35m"
    device: str = "cuda"
    pixels: int = 1024
    """Height and width of the picture."""
    levels: tuple[int, ...] = (1, 3)
    """K: noise levels of a token-level ensemble."""
    batch_size: int = 1
    """Pictures per call."""
    num_repeats: int = 20
    output: Path | None = None
    """Also write the result there."""


def main(options: Options) -> None:
    device = torch.device(options.device)
    name, architecture = MODELS[options.model]
    shapes = reward_model(recipe(name).model, pipeline=architecture, device="meta", dtype=torch.bfloat16)
    flops = {
        k: score_flops(shapes, options.pixels, options.pixels, num_levels=k).total for k in options.levels
    }
    model = with_random_weights(shapes, device)
    rate = matrix_rate(device)
    side = options.pixels // model.backbone.pixels_per_latent
    latents = torch.randn(options.batch_size, architecture.latent_channels, side, side, device=device)
    tokens = TEXT_TOKENS[model.backbone.family]
    conditioning = Conditioning(
        torch.randn(1, tokens, architecture.prompt_dim, device=device, dtype=torch.bfloat16),
        torch.randn(1, architecture.pooled_dim, device=device, dtype=torch.bfloat16),
    )
    noise = torch.randn_like(latents)
    rows = []
    for k in options.levels:
        levels = [0.4] if k == 1 else np.linspace(0.2, 0.7, k).round(2).tolist()

        def score(levels: list[float] = levels) -> None:
            with torch.no_grad():
                model.score_latents(latents, conditioning, levels, noise)

        seconds = timed(score, device, options.num_repeats)
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        done = flops[k] * options.batch_size
        rows.append(
            {
                "noise_levels": k,
                "milliseconds_median": round(1000 * float(np.median(seconds)), 2),
                "milliseconds_low": round(1000 * min(seconds), 2),
                "milliseconds_high": round(1000 * max(seconds), 2),
                "tflop": round(done / 1e12, 3),
                "tflop_per_second": round(done / float(np.median(seconds)) / 1e12, 2),
                "utilisation": round(done / float(np.median(seconds)) / rate, 3),
                "peak_memory_gb": None if memory is None else round(memory / 1e9, 2),
            }
        )
        print(json.dumps(rows[-1]))
    record = {
        "recipe": name,
        "text_tokens": tokens,
        "matrix_tflop_per_second": round(rate / 1e12, 1),
        "rows": rows,
    }
    if options.output is not None:
        write_results(options.output.parent, options.output.stem, record, seeds=[0])


def with_random_weights(model: RewardModel, device: torch.device) -> RewardModel:
    """The model of the meta device, with memory and values."""
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_(0, 0.02, generator=generator)
    model.allow_untrained = True
    return model


def matrix_rate(device: torch.device) -> float:
    """FLOP per second of a square bfloat16 matrix product."""
    side = MATRIX.get(device.type, 4096)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / float(np.median(timed(lambda: torch.mm(a, b), device, 20)))


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat, after two to warm up; the peak memory counter starts with them."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        run()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
