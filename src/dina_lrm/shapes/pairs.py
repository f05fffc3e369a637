"""Preference pairs of the shapes domain: judged pictures that simulated raters vote on.

For every caption there are four candidates, so that a reward has to tell apart wrong content, poor drawing
and damage:

* `sample`     by the bundled pipeline with enough steps and guidance
* `draft`      by the bundled pipeline with few steps and weak guidance
* `render`     of the caption
* `corrupted`  a render that is blurred, noisy or faded to a random degree

Pairs of the kind "varied" show more damage (`damage.VARIED`): up to three on `corrupted`, one on half of the
renders and on a quarter of the generated pictures. Those of the kind "renders" are four renders with none, at
most one, and twice one to three; they need no generator.

All but `sample` show, half of the time, a caption that differs in one respect.
All six pairs of a caption's candidates are compared. Captions, pictures and votes depend on the seed alone.
Captions of one seed are distinct. Two seeds share some: there are only 216 captions of one object. Those of
two parts (`scenes.caption_part`) never do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from dina_lrm.data.encode import encode_pairs
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.pairs import PreferencePair
from dina_lrm.shapes.damage import damage
from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pipeline import generate
from dina_lrm.shapes.raters import RaterPanel
from dina_lrm.shapes.render import CORRUPTIONS, render
from dina_lrm.shapes.scenes import (
    CaptionSpec,
    Part,
    caption_part,
    change_attribute,
    sample_caption,
    sample_scene,
)

PairKind = Literal["plain", "varied", "renders"]

SAMPLE_SETTINGS = ((10, 2.5), (16, 4.0), (16, 6.0))
DRAFT_SETTINGS = ((3, 1.0), (5, 1.0), (8, 1.0), (5, 3.0))
"""(num_inference_steps, guidance_scale) of the generated candidates, one drawn for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One picture for a caption: how it was made, and its gold utility."""

    caption: str
    image: Image.Image
    origin: str
    utility: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesPairs:
    """Pairs with votes, and what only a simulation knows of them."""

    pairs: list[PreferencePair]
    """`chosen` has the majority of the votes."""
    bayes: np.ndarray
    """(pair,) P(the majority prefers `chosen`) given both utilities; the optimal accuracy is mean max(p, 1 -
    p)."""
    candidates: list[Candidate]
    """All pictures, four for each caption in turn."""

    def to_latents(self, model: Any, **options: Any) -> LatentPairs:
        """Encode with a reward model's encoders; `options` go to `encode_pairs`."""
        return encode_pairs(model, self.pairs, bayes=self.bayes.tolist(), **options)


def make_shapes_pairs(
    pipeline: StableDiffusion3Pipeline | None,
    *,
    num_prompts: int,
    seed: int,
    part: Part | None = None,
    kind: PairKind = "plain",
    panel: RaterPanel | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShapesPairs:
    """Six voted pairs for each of `num_prompts` captions.

    Args:
        pipeline: the generator whose pictures are compared; None for the kind "renders".
        seed: of captions, layouts, starting noise and votes.
        part: which captions (`scenes.caption_part`): those of two parts are never the same. None: any.
        kind: which pictures are compared.
        panel: the raters; by default five of them.
        on_progress: called with (generated pictures, all pictures to generate).
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts is at least 1; got {num_prompts}")
    panel = panel or RaterPanel()
    rng = np.random.default_rng(seed)
    specs = distinct_captions(rng, num_prompts, part)
    candidates: list[Candidate] = []
    if kind == "renders":
        for index, spec in enumerate(specs):
            pictures = {
                f"render {place}": render(sample_scene(rng, spec if place == 0 else perhaps_wrong(rng, spec)))
                for place in range(4)
            }
            if rng.random() < 0.5:
                pictures["render 1"] = damage(pictures["render 1"], rng, most=1)
            for place in (2, 3):
                pictures[f"render {place}"] = damage(pictures[f"render {place}"], rng)
            candidates += judged(spec, pictures)
            if on_progress is not None:
                on_progress(index + 1, num_prompts)
        return vote(candidates, panel, rng)
    if pipeline is None:
        raise ValueError(f"pairs of the kind {kind!r} need a pipeline")
    seeds = rng.integers(2**31, size=(2, num_prompts))
    shown = [specs, [perhaps_wrong(rng, spec) for spec in specs]]
    drawn = [
        generate_mixed(
            pipeline, shown[row], settings, seeds[row], rng, _progress(on_progress, row, num_prompts)
        )
        for row, settings in enumerate((SAMPLE_SETTINGS, DRAFT_SETTINGS))
    ]
    for index, spec in enumerate(specs):
        pictures = {"sample": drawn[0][index], "draft": drawn[1][index]}
        pictures["render"] = render(sample_scene(rng, perhaps_wrong(rng, spec)))
        if kind == "varied":
            pictures["corrupted"] = damage(render(sample_scene(rng, perhaps_wrong(rng, spec))), rng)
            for origin, chance in (("sample", 0.25), ("draft", 0.25), ("render", 0.5)):
                if rng.random() < chance:
                    pictures[origin] = damage(pictures[origin], rng, most=1)
        else:
            corrupt = CORRUPTIONS[str(rng.choice(list(CORRUPTIONS)))]
            undamaged = render(sample_scene(rng, perhaps_wrong(rng, spec)))
            pictures["corrupted"] = corrupt(undamaged, float(rng.uniform(0.1, 1.0)), rng)
        candidates += judged(spec, pictures)
    return vote(candidates, panel, rng)


def judged(spec: CaptionSpec, pictures: Mapping[str, Image.Image]) -> list[Candidate]:
    """Pictures of one caption, by where they come from, with the judge's utilities."""
    return [
        Candidate(caption=spec.caption, image=image, origin=origin, utility=judge(image, spec).utility)
        for origin, image in pictures.items()
    ]


def vote(candidates: Sequence[Candidate], panel: RaterPanel, rng: np.random.Generator) -> ShapesPairs:
    """Let the panel compare every two candidates that share a caption and stand next to each other in the
    list."""
    pairs: list[PreferencePair] = []
    bayes: list[float] = []
    start = 0
    while start < len(candidates):
        stop = start + 1
        while stop < len(candidates) and candidates[stop].caption == candidates[start].caption:
            stop += 1
        for first, second in combinations(candidates[start:stop], 2):
            votes = int(panel.votes_for_a(first.utility, second.utility, rng))
            if 2 * votes < panel.num_raters:
                first, second, votes = second, first, panel.num_raters - votes
            pairs.append(
                PreferencePair(
                    prompt=first.caption,
                    chosen=first.image,
                    rejected=second.image,
                    votes_chosen=votes,
                    votes_rejected=panel.num_raters - votes,
                    source=f"{first.origin} over {second.origin}",
                )
            )
            bayes.append(float(panel.majority_probability(first.utility, second.utility)))
        start = stop
    return ShapesPairs(pairs=pairs, bayes=np.asarray(bayes), candidates=list(candidates))


def distinct_captions(
    rng: np.random.Generator, num_prompts: int, part: Part | None = None
) -> list[CaptionSpec]:
    """Captions as `sample_caption` draws them, each once; of one part, or of all."""
    specs: dict[CaptionSpec, None] = {}
    while len(specs) < num_prompts:
        spec = sample_caption(rng)
        if part is None or caption_part(spec) == part:
            specs[spec] = None
    return list(specs)


def perhaps_wrong(rng: np.random.Generator, spec: CaptionSpec) -> CaptionSpec:
    """The caption itself, or, half of the time, one that differs in one respect."""
    return change_attribute(rng, spec) if rng.random() < 0.5 else spec


def generate_mixed(
    pipeline: StableDiffusion3Pipeline,
    specs: Sequence[CaptionSpec],
    settings: Sequence[tuple[int, float]],
    seeds: np.ndarray,
    rng: np.random.Generator,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """One picture for each caption, each with one of `settings`; captions of one setting are sampled
    together."""
    choice = rng.integers(len(settings), size=len(specs))
    images: list[Image.Image | None] = [None] * len(specs)
    done = 0
    for index, (steps, guidance) in enumerate(settings):
        for rows in np.array_split(
            np.flatnonzero(choice == index), max(1, int((choice == index).sum()) // 32)
        ):
            if not len(rows):
                continue
            captions = [specs[row].caption for row in rows]
            pictures = generate(
                pipeline,
                captions,
                seeds[rows].tolist(),
                num_inference_steps=steps,
                guidance_scale=guidance,
                batch_size=64,
            )
            for row, picture in zip(rows, pictures, strict=True):
                images[row] = picture
            done += len(rows)
            on_progress(done)
    return [image for image in images if image is not None]


def _progress(
    report: Callable[[int, int], None] | None, part: int, num_prompts: int
) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if report is not None:
            report(part * num_prompts + done, 2 * num_prompts)

    return tell
