"""Test sets that differ from what the shapes rewards are trained on: is a reward right about pictures of
generators, damage and styles that it has never seen?

* `generators`  a smaller generator trained apart, and the bundled one with a sampler that adds noise
* `damage`      renders with JPEG blocks, large pixels, stripes or a tint, each to a random degree
* `style`       renders without anti-aliasing, with outlines, in shifted colours, half of them damaged as in
                training

Captions are those of the part "test" (`scenes.caption_part`), so no reward that was trained on the part
"train" has seen one. Four pictures a caption, all but the first showing a caption that differs in one respect
half of the time, every two of them compared, as in `shapes.pairs`."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.rollout import SamplerConfig, rollout
from dina_lrm.shapes.geometry import coverage
from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pairs import (
    Candidate,
    ShapesPairs,
    distinct_captions,
    generate_mixed,
    perhaps_wrong,
    vote,
)
from dina_lrm.shapes.pipeline import bundled_pipeline_folder, load_pipeline
from dina_lrm.shapes.raters import RaterPanel
from dina_lrm.shapes.render import CORRUPTIONS, render
from dina_lrm.shapes.scenes import BACKGROUNDS, COLOURS, CaptionSpec, Scene, sample_scene

__all__ = ["DAMAGE", "UNSEEN", "Style", "Unseen", "make_unseen_pairs", "render_in_style"]

Unseen = Literal["generators", "damage", "style"]
UNSEEN: tuple[Unseen, ...] = get_args(Unseen)

Pixels = np.ndarray
Progress = Callable[[int, int], None] | None


def make_unseen_pairs(
    name: Unseen, *, num_prompts: int, seed: int, device: str = "cpu", on_progress: Progress = None
) -> ShapesPairs:
    """Six voted pairs for each of `num_prompts` captions.

    Args:
        seed: of captions, layouts, pictures and votes.
        device: of the generators.
        on_progress: called with (captions done, captions in all).
    """
    rng = np.random.default_rng([seed, UNSEEN.index(name)])
    specs = distinct_captions(rng, num_prompts, "test")
    shown = [[spec if place == 0 else perhaps_wrong(rng, spec) for place in range(4)] for spec in specs]
    if name == "generators":
        pictures = _generated(shown, rng, device, on_progress)
    else:
        make = _damaged if name == "damage" else _styled
        pictures = []
        for index, captions in enumerate(shown):
            pictures.append([make(caption, rng, place) for place, caption in enumerate(captions)])
            if on_progress is not None:
                on_progress(index + 1, len(shown))
    candidates = [
        Candidate(
            caption=spec.caption, image=image, origin=f"{name} {place}", utility=judge(image, spec).utility
        )
        for spec, images in zip(specs, pictures, strict=True)
        for place, image in enumerate(images)
    ]
    return vote(candidates, RaterPanel(), rng)


# --- generators --------------------------------------------------------------------------------------------


def small_pipeline_folder() -> Path:
    """Where the package holds the denoiser of the smaller generator."""
    return bundled_pipeline_folder().parent / "small_generator"


def load_small_pipeline(device: str = "cpu") -> Any:
    """A generator of two blocks of width 128, trained apart from the bundled one on its latents and
    texts."""
    from diffusers import SD3Transformer2DModel

    pipeline: Any = load_pipeline(device=device)
    transformer: Any = SD3Transformer2DModel.from_pretrained(
        small_pipeline_folder() / "transformer", dtype=torch.float32, local_files_only=True
    )
    pipeline.register_modules(transformer=transformer.to(device))
    return pipeline


SMALL_SETTINGS = ((28, 4.0), (8, 2.0))
NOISY_SETTINGS = ((20, 0.5), (8, 0.7))
"""(steps, noise level of cps)."""


def _generated(
    shown: Sequence[Sequence[CaptionSpec]], rng: np.random.Generator, device: str, on_progress: Progress
) -> list[list[Image.Image]]:
    seeds = rng.integers(2**31, size=(4, len(shown)))
    small, bundled = load_small_pipeline(device), load_pipeline(device=device)
    columns: list[list[Image.Image]] = []
    for place in range(4):
        specs = [captions[place] for captions in shown]
        if place < 2:
            columns.append(generate_mixed(small, specs, (SMALL_SETTINGS[place],), seeds[place], rng))
        else:
            steps, level = NOISY_SETTINGS[place - 2]
            columns.append(sample_with_noise(bundled, specs, seeds[place].tolist(), steps, level))
        if on_progress is not None:
            on_progress(len(shown) * (place + 1) // 4, len(shown))
    return [list(images) for images in zip(*columns, strict=True)]


def sample_with_noise(
    pipeline: Any, specs: Sequence[CaptionSpec], seeds: Sequence[int], num_steps: int, noise_level: float
) -> list[Image.Image]:
    """Pictures of a sampler that adds noise at every step ("cps")."""
    policy = Policy(pipeline)
    sampler = SamplerConfig(
        num_steps=num_steps, guidance_scale=4.0, rule="cps", noise_level=noise_level, batch_size=64
    )
    images: list[Image.Image] = []
    for start in range(0, len(specs), 64):
        rows = slice(start, start + 64)
        conditioning = policy.encode([spec.caption for spec in specs[rows]])
        images += policy.pictures(rollout(policy, conditioning, list(seeds[rows]), sampler).clean)
    return images


# --- damage ------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """JPEG; strength 1 is quality 3."""
    del rng
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=round(40 - 37 * strength))
    with Image.open(stream) as damaged:
        return damaged.convert("RGB")


def pixelate(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Squares of one colour; strength 1 is 6 pixels wide."""
    del rng
    side = max(1, round(64 / (1 + 5 * strength)))
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def stripes(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Dark rows every 3 to 8 pixels; strength 1 takes 90 levels off."""
    period, start = int(rng.integers(3, 9)), int(rng.integers(8))
    pixels = np.asarray(image, dtype=float).copy()
    pixels[start % period :: period] -= 90.0 * strength
    return _picture(pixels)


def tint(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """One colour over everything; strength 1 moves all pixels half of the way to it."""
    colour = np.eye(3)[int(rng.integers(3))] * 255.0
    pixels = np.asarray(image, dtype=float)
    return _picture(pixels + 0.5 * strength * (colour - pixels))


DAMAGE: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "jpeg": jpeg,
    "pixelate": pixelate,
    "stripes": stripes,
    "tint": tint,
}
"""Ways to make a picture worse that no training pair shows; each takes (image, strength in [0, 1],
generator)."""


def _damaged(spec: CaptionSpec, rng: np.random.Generator, place: int) -> Image.Image:
    del place
    image = render(sample_scene(rng, spec))
    damage = DAMAGE[str(rng.choice(list(DAMAGE)))]
    return damage(image, float(rng.uniform(0.05, 1.0)), rng)


# --- style -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a scene is drawn otherwise than by `render`."""

    smooth: bool
    """Anti-aliased edges."""
    outline: float
    """Width in pixels of a darker rim."""
    brightness: float
    """Factor on the colours of objects."""
    background: float
    """Added to the background, of 255."""
    shift: tuple[float, float, float]
    """Added to the colours of objects, of 255."""


def draw_style(rng: np.random.Generator) -> Style:
    """Never smooth and without a rim at once, which would be near the style of training."""
    outline = float(rng.uniform(0.8, 2.0)) if rng.random() < 0.5 else 0.0
    return Style(
        smooth=outline > 0 and bool(rng.random() < 0.3),
        outline=outline,
        brightness=float(rng.uniform(0.75, 1.1)),
        background=float(rng.uniform(-18, 18)),
        shift=tuple(rng.uniform(-20, 20, size=3).tolist()),  # type: ignore[arg-type]
    )


def render_in_style(scene: Scene, style: Style) -> Image.Image:
    """The picture of a scene."""
    pixels = np.empty((64, 64, 3))
    pixels[:] = np.asarray(BACKGROUNDS[scene.background], dtype=float) + style.background
    for item in scene.objects:
        colour = np.asarray(COLOURS[item.colour], dtype=float) * style.brightness + style.shift
        for radius, shade in ((item.radius, 0.55), (item.radius - style.outline, 1.0)):
            if shade == 1.0 or style.outline > 0:
                alpha = coverage(item.shape, item.x, item.y, radius)
                alpha = alpha if style.smooth else (alpha >= 0.5).astype(float)
                pixels = (1 - alpha[..., None]) * pixels + alpha[..., None] * (shade * colour)
    return _picture(pixels)


def _styled(spec: CaptionSpec, rng: np.random.Generator, place: int) -> Image.Image:
    image = render_in_style(sample_scene(rng, spec), draw_style(rng))
    if place < 2:
        return image
    corrupt = CORRUPTIONS[str(rng.choice(list(CORRUPTIONS)))]
    return corrupt(image, float(rng.uniform(0.1, 1.0)), rng)


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
