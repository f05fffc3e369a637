"""How good is the bundled generator? The gold judge's full-match rate, by number of objects and sampler
settings.

    python benchmarks/bundled_generator.py [--num-captions 200] [--pipeline FOLDER]
        [--output benchmarks/results/bundled_generator.json] [--grid docs/assets/samples.png]

Captions and starting noise follow from the seed; they are not those of any training run. "plain" calls the
pipeline with nothing but the caption: 28 steps, guidance 7, T5 prompts padded to 256 tokens.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from record import write_results
from scipy import stats

from dina_lrm.shapes.judge import Judgement, judge
from dina_lrm.shapes.pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, generate, load_pipeline
from dina_lrm.shapes.scenes import sample_caption

SEED = 20_260_000


@dataclass(frozen=True, kw_only=True)
class Options:
    num_captions: int = 200
    """Captions for each number of objects."""
    pipeline: Path | None = None
    """Pipeline folder; None is the bundled one."""
    output: Path = Path("benchmarks/results/bundled_generator.json")
    """Where the figures go."""
    grid: Path = Path("docs/assets/samples.png")
    """Where the first pictures go, with their captions, unchosen."""
    plain_captions: int = 48
    """Captions for the slower plain call; 0 leaves it out."""


def main(options: Options) -> None:
    pipeline = load_pipeline(options.pipeline)
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Image.Image, Judgement]] = []
    for num_objects in (1, 2, 3):
        captions = draw_captions(num_objects, options.num_captions)
        seeds = [SEED + 1000 * num_objects + index for index in range(len(captions))]
        started = time.perf_counter()
        pictures = generate(pipeline, captions, seeds)
        seconds = time.perf_counter() - started
        verdicts = [judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
        sampler = f"{NUM_INFERENCE_STEPS} steps, guidance {GUIDANCE_SCALE:g}"
        rows.append(row(sampler, num_objects, verdicts, seconds))
        shown += list(zip(captions, pictures, verdicts, strict=True))[:8]
        print(json.dumps(rows[-1]), flush=True)
        if options.plain_captions and num_objects < 3:
            captions, seeds = captions[: options.plain_captions], seeds[: options.plain_captions]
            started = time.perf_counter()
            pictures = plain_call(pipeline, captions, seeds)
            seconds = time.perf_counter() - started
            verdicts = [judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
            rows.append(row("plain call", num_objects, verdicts, seconds))
            print(json.dumps(rows[-1]), flush=True)
    write_results(options.output.parent, options.output.stem, {"rows": rows}, seeds=[SEED])
    options.grid.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(shown).save(options.grid)


def draw_captions(num_objects: int, count: int) -> list[str]:
    """Captions with this many objects; repeats are possible, as there are only 216 for one object."""
    rng = np.random.default_rng([SEED, num_objects])
    return [sample_caption(rng, num_objects=num_objects).caption for _ in range(count)]


def plain_call(
    pipeline: StableDiffusion3Pipeline, captions: list[str], seeds: list[int]
) -> list[Image.Image]:
    """The pipeline with its own defaults."""
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), 16):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + 16]]
        output: Any = pipeline(prompt=captions[start : start + 16], generator=generators)
        pictures += output.images
    return pictures


def row(sampler: str, num_objects: int, verdicts: Sequence[Judgement], seconds: float) -> dict[str, Any]:
    """One line of results; the interval is the exact (Clopper-Pearson) one at 95 %."""
    matches = sum(verdict.full_match for verdict in verdicts)
    interval = stats.binomtest(matches, len(verdicts)).proportion_ci(0.95)
    return {
        "sampler": sampler,
        "objects": num_objects,
        "captions": len(verdicts),
        "full_match": matches / len(verdicts),
        "low": float(interval.low),
        "high": float(interval.high),
        "alignment": float(np.mean([verdict.alignment for verdict in verdicts])),
        "cleanness": float(np.mean([verdict.cleanness for verdict in verdicts])),
        "pictures_per_second": len(verdicts) / seconds,
    }


def draw_grid(
    shown: Sequence[tuple[str, Image.Image, Judgement]], columns: int = 8, scale: int = 2
) -> Image.Image:
    """Pictures with their captions below; an orange frame marks those that miss a stated fact."""
    side, text, gap = 64 * scale, 58, 8
    lines = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, lines * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, picture, verdict) in enumerate(shown):
        left, top = gap + index % columns * (side + gap), gap + index // columns * (side + text + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        frame = (150, 150, 150) if verdict.full_match else (214, 96, 20)
        draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline=frame, width=2)
        place = (left, top + side + 5)
        draw.multiline_text(place, wrap(caption, 23), fill=(40, 40, 40), font_size=10, spacing=1)
    return sheet


def wrap(caption: str, width: int) -> str:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
