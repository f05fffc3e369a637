"""Writes shapes pairs in the layout of HPDv3, some pictures broken, to try the path that HPDv3 takes.

    python benchmarks/shapes_as_hpdv3.py --output DIR --num-pairs 20000
    dina-lrm prepare hpdv3 --root DIR --split train --output LATENTS
    dina-lrm train shapes --data.train LATENTS --output RUN

Every caption has four pictures (renders, half of them of a changed caption, some damaged), which five
simulated raters compare. Of all pictures a share is broken: cut off in the middle, removed, or with NaN among
its pixels. DIR/broken.json says which, and how many pairs that touches.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pairs import Candidate, vote
from dina_lrm.shapes.raters import RaterPanel
from dina_lrm.shapes.render import CORRUPTIONS, render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene

PICTURES = 4
PAIRS = PICTURES * (PICTURES - 1) // 2
KINDS = ("cut off", "missing", "NaN")


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    num_pairs: int = 20_000
    broken_fraction: float = 0.01
    """Of the pictures."""
    seed: int = 0


def main(options: Options) -> None:
    rng = np.random.default_rng(options.seed)
    (options.output / "images").mkdir(parents=True, exist_ok=True)
    num_captions = -(-options.num_pairs // PAIRS)
    num_pictures = PICTURES * num_captions
    chosen = rng.choice(num_pictures, size=round(options.broken_fraction * num_pictures), replace=False)
    broken = {int(picture): KINDS[index % len(KINDS)] for index, picture in enumerate(chosen)}
    rows: list[dict[str, object]] = []
    for caption in range(num_captions):
        names = [f"images/{PICTURES * caption + index:06d}" for index in range(PICTURES)]
        candidates = _candidates(rng)
        made = vote(candidates, RaterPanel(), rng)
        files: dict[int, str] = {}
        for index, (name, candidate) in enumerate(zip(names, candidates, strict=True)):
            kind = broken.get(PICTURES * caption + index)
            files[id(candidate.image)] = _write(candidate.image, options.output, name, kind)
        for pair in made.pairs:
            rows.append(
                {
                    "prompt": pair.prompt,
                    "choice_dist": [pair.votes_chosen, pair.votes_rejected],
                    "confidence": None,
                    "path1": files[id(pair.chosen)],
                    "path2": files[id(pair.rejected)],
                    "model1": "shapes",
                    "model2": "shapes",
                }
            )
    rows = rows[: options.num_pairs]
    stems = {f"images/{picture:06d}" for picture in broken}
    touched = sum(
        bool({str(row[side]).rpartition(".")[0] for side in ("path1", "path2")} & stems) for row in rows
    )
    (options.output / "train.json").write_text(json.dumps(rows))
    summary = {"pairs": len(rows), "pairs_with_a_broken_picture": touched, "broken": broken}
    (options.output / "broken.json").write_text(json.dumps(summary, indent=1))
    print(f"{len(rows)} pairs, {touched} of them with one of {len(broken)} broken pictures")


def _candidates(rng: np.random.Generator) -> list[Candidate]:
    spec = sample_caption(rng)
    candidates = []
    for index in range(PICTURES):
        shown = change_attribute(rng, spec) if rng.random() < 0.5 else spec
        image = render(sample_scene(rng, shown))
        if index % 2:
            corrupt = CORRUPTIONS[str(rng.choice(list(CORRUPTIONS)))]
            image = corrupt(image, float(rng.uniform(0.1, 1.0)), rng)
        utility = judge(image, spec).utility
        candidates.append(Candidate(caption=spec.caption, image=image, origin=str(index), utility=utility))
    return candidates


def _write(image: Image.Image, root: Path, name: str, kind: str | None) -> str:
    """The picture's file, relative to the root."""
    if kind == "NaN":
        pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255
        pixels[0, 0] = np.nan
        Image.fromarray(pixels).save(root / f"{name}.tiff")
        return f"{name}.tiff"
    file = root / f"{name}.png"
    if kind != "missing":
        image.save(file)
    if kind == "cut off":
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    return f"{name}.png"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
