"""What does the bundled VAE lose? The gold judge on renders before and after a round trip through it.

    python benchmarks/vae_round_trip.py [--vae FOLDER] [--num-pictures 200]

One JSON line for clean renders (the judge's full-match rate after the trip) and one for each kind and
strength of corruption: mean cleanness before and after. Where a corruption's cleanness rises, the VAE hides
it, and a reward on latents has less to see.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers import AutoencoderKL
from PIL import Image

from dina_lrm.shapes.judge import judge, read_picture
from dina_lrm.shapes.pipeline import bundled_pipeline_folder
from dina_lrm.shapes.render import CORRUPTIONS
from dina_lrm.shapes.train import encode_pictures, render_pool

SEED = 20_260_500


@dataclass(frozen=True, kw_only=True)
class Options:
    vae: Path | None = None
    """Folder of an AutoencoderKL; None is the bundled one."""
    num_pictures: int = 200
    """Renders, of captions and layouts that no training run has."""
    strengths: tuple[float, ...] = (0.2, 0.6)
    """Of each corruption, in [0, 1]."""


def main(options: Options) -> None:
    vae: Any = AutoencoderKL.from_pretrained(
        options.vae or bundled_pipeline_folder() / "vae", dtype=torch.float32
    )
    pictures, captions, _ = render_pool(options.num_pictures, seed=SEED)
    decoded = round_trip(vae, pictures)
    matches = [judge(picture, caption).full_match for picture, caption in zip(decoded, captions, strict=True)]
    row = {"corruption": None, "full_match_after": float(np.mean(matches)), "pictures": len(pictures)}
    print(json.dumps(row | cleanness(pictures, decoded)))
    for kind, corrupt in CORRUPTIONS.items():
        for strength in options.strengths:
            rng = np.random.default_rng(SEED)
            damaged = np.stack(
                [np.asarray(corrupt(Image.fromarray(item), strength, rng)) for item in pictures]
            )
            row = {"corruption": kind, "strength": strength, "pictures": len(pictures)}
            print(json.dumps(row | cleanness(damaged, round_trip(vae, damaged))))


@torch.no_grad()
def round_trip(vae: Any, pictures: np.ndarray) -> np.ndarray:
    """uint8 (picture, height, width, 3), encoded to posterior means and decoded again."""
    rows = [vae.decode(part).sample for part in encode_pictures(vae, pictures, "cpu").split(64)]
    values = ((torch.cat(rows).float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return values.permute(0, 2, 3, 1).numpy()


def cleanness(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Means over pictures."""
    means = [float(np.mean([read_picture(item).cleanness for item in part])) for part in (before, after)]
    return {"cleanness_before": round(means[0], 3), "cleanness_after": round(means[1], 3)}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
