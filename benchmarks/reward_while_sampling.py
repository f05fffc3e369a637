"""What does a reward at every step of sampling cost: from the generator's own pass, or by a separate call?

    python benchmarks/reward_while_sampling.py [--num-repeats 5] [--output FILE]

The bundled pipeline samples with guidance; the reward scores the state of every step. Compared are

    alone           sampling without a reward
    frozen, watch   a frozen-backbone reward, replayed from the generator's own forward pass
    frozen, call    the same reward by `score_state` on the state of each step
    lora, watch     a LoRA reward: one forward pass of its blocks, on the conditional half
    lora, call      the same by `score_state`

FLOPs are counted by torch's FlopCounterMode over a whole call. Times are ratios to sampling alone, the
settings taken in turn within one run, so that what else the machine does falls on all of them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from record import write_results
from torch.utils.flop_counter import FlopCounterMode

from dina_lrm import RewardModel
from dina_lrm.shapes.networks import MAX_TOKENS
from dina_lrm.shapes.pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, load_pipeline

PROMPTS = ["a red circle on a gray background", "a blue square above a green circle on a white background"]


@dataclass(frozen=True, kw_only=True)
class Options:
    num_repeats: int = 5
    """Times every setting is measured, in turn."""
    num_steps: int = NUM_INFERENCE_STEPS
    """Sampling steps."""
    pictures_per_prompt: int = 2
    """Of two prompts."""
    output: Path | None = None
    """Also write the result there."""


def main(options: Options) -> None:
    pipeline = load_pipeline()
    bundled = RewardModel.from_pretrained("bundled")
    taps = {name: getattr(bundled.config, name) for name in ("num_blocks", "image_taps", "text_taps")}
    frozen = RewardModel.initialize(pipeline, **taps, lora_rank=0, allow_untrained=True)  # cost, not sense
    lora = RewardModel.from_pretrained("bundled").requires_grad_(False)
    frozen.eval().attach(pipeline)
    settings: dict[str, Callable[[], list[torch.Tensor]]] = {
        "alone": lambda: sample(pipeline, options, None),
        "frozen, watch": lambda: watched(pipeline, options, frozen),
        "frozen, call": lambda: called(pipeline, options, frozen),
        "lora, watch": lambda: watched(pipeline, options, lora),
        "lora, call": lambda: called(pipeline, options, lora),
    }
    scores = {name: run() for name, run in settings.items()}  # and warm up
    for kind in ("frozen", "lora"):
        for seen, separate in zip(scores[f"{kind}, watch"], scores[f"{kind}, call"], strict=True):
            torch.testing.assert_close(seen, separate, atol=1e-4, rtol=0)
    flops = {}
    for name, run in settings.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(options.num_repeats):
        for name, run in settings.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    alone = np.array(seconds["alone"])
    rows = [
        {
            "setting": name,
            "flops_ratio": round(flops[name] / flops["alone"], 4),
            "time_ratio": round(float(np.median(np.array(times) / alone)), 3),
            "time_ratio_low": round(float(np.min(np.array(times) / alone)), 3),
            "time_ratio_high": round(float(np.max(np.array(times) / alone)), 3),
        }
        for name, times in seconds.items()
    ]
    record = {
        "threads": torch.get_num_threads(),
        "steps": options.num_steps,
        "pictures": len(PROMPTS) * options.pictures_per_prompt,
        "repeats": options.num_repeats,
        "rows": rows,
    }
    for row in rows:
        print(json.dumps(row))
    if options.output is not None:
        write_results(options.output.parent, options.output.stem, record, seeds=[0])


def sample(pipeline: Any, options: Options, callback: Any) -> list[torch.Tensor]:
    pipeline(
        PROMPTS,
        num_images_per_prompt=options.pictures_per_prompt,
        num_inference_steps=options.num_steps,
        guidance_scale=GUIDANCE_SCALE,
        max_sequence_length=MAX_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **({} if callback is None else {"callback_on_step_end": callback}),
    )
    return []


def watched(pipeline: Any, options: Options, model: RewardModel) -> list[torch.Tensor]:
    with model.watch(pipeline) as watch:
        sample(pipeline, options, watch)
    return [step.scores for step in watch.steps]


def called(pipeline: Any, options: Options, model: RewardModel) -> list[torch.Tensor]:
    """A callback that knows the state each step starts from, and scores it by itself."""
    conditioning = model.encode_prompts(PROMPTS)
    rows = torch.arange(len(PROMPTS)).repeat_interleave(options.pictures_per_prompt)
    conditioning = conditioning.index_select(rows)
    states: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    def note(network: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states.append(kwargs["hidden_states"][len(rows) :])

    def score(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            scores.append(model.score_state(states[-1], conditioning, timestep.expand(len(rows))))
        return values

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    sample(pipeline, options, score)
    hook.remove()
    return scores


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
