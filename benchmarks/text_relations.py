"""Does a T5 encoder's output tell which of two objects goes where? A read-out of the layout from its tokens.

    python benchmarks/text_relations.py [--pipeline FOLDER] [--num-steps 500]

The encoder stays as it is; a `TextReadout` is fitted to the layouts of random scenes. On other captions that
state a relation, each object's expected place is the centre of mass of its colour, and the relation holds
between the two places or not. An encoder that knows a caption only as a bag of words stays at a half.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy.stats import binomtest
from torch import Tensor
from transformers import T5EncoderModel

from dina_lrm.shapes import networks
from dina_lrm.shapes.geometry import SHAPES
from dina_lrm.shapes.layout import GRID, TextReadout, layout_scale, scene_layout
from dina_lrm.shapes.pipeline import bundled_pipeline_folder
from dina_lrm.shapes.scenes import (
    COLOURS,
    CaptionSpec,
    Scene,
    relation_holds,
    sample_caption,
    sample_scene,
)
from dina_lrm.shapes.train import token_ids

SEED = 20_261_126


@dataclass(frozen=True, kw_only=True)
class Options:
    pipeline: Path | None = None
    """Folder with `text_encoder_3/`; None is the bundled pipeline."""
    num_steps: int = 500
    """AdamW steps of 256 captions for the read-out."""
    num_scenes: int = 6000
    """Of one or two objects, to fit the read-out."""
    num_captions: int = 600
    """Other captions, each with a relation, to test it."""


def main(options: Options) -> None:
    folder = options.pipeline or bundled_pipeline_folder()
    encoder: Any = T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=torch.float32).eval()
    rng = np.random.default_rng(SEED)
    specs, scenes = draw(rng, options.num_scenes)
    readout = fit(encode(encoder, specs), scenes, options.num_steps)
    tested = [spec for spec in draw(rng, 3 * options.num_captions)[0] if spec.relation is not None]
    tested = tested[: options.num_captions]
    with torch.no_grad():
        layouts = readout(encode(encoder, tested)).reshape(len(tested), GRID, GRID, -1)
    held = [holds(spec, layout) for spec, layout in zip(tested, layouts, strict=True)]
    interval = binomtest(sum(held), len(held)).proportion_ci()
    row: dict[str, object] = {"captions": len(held), "relation_read": round(float(np.mean(held)), 4)}
    print(json.dumps(row | {"low": round(interval.low, 4), "high": round(interval.high, 4)}))


def draw(rng: np.random.Generator, count: int) -> tuple[list[CaptionSpec], list[Scene]]:
    """Captions of one or two objects and a scene for each."""
    specs = [sample_caption(rng, num_objects=int(rng.integers(1, 3))) for _ in range(count)]
    return specs, [sample_scene(rng, spec) for spec in specs]


@torch.no_grad()
def encode(encoder: Any, specs: list[CaptionSpec]) -> Tensor:
    """float32 (caption, token, width)."""
    return torch.cat([encoder(ids)[0] for ids in token_ids([spec.caption for spec in specs]).split(256)])


def fit(tokens: Tensor, scenes: list[Scene], num_steps: int) -> TextReadout:
    """A read-out of the scenes' layouts."""
    layouts = torch.from_numpy(np.stack([scene_layout(scene) for scene in scenes]))
    scale = layout_scale(layouts)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    readout = TextReadout(networks.TEXT_DIM)
    optimizer = torch.optim.AdamW(readout.parameters(), lr=2e-3)
    for _ in range(num_steps):
        rows = torch.randint(len(tokens), (256,), generator=generator)
        loss = ((readout(tokens[rows]) - layouts[rows]) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return readout


def holds(spec: CaptionSpec, layout: Tensor) -> bool:
    """Whether the relation holds between the two objects' expected places in a layout (row, column,
    channel)."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    places = []
    for item in spec.objects:
        share = layout[..., len(SHAPES) + list(COLOURS).index(item.colour)].clamp(min=1e-6)
        places.append(
            (float((share * columns).sum() / share.sum()), float((share * rows).sum() / share.sum()))
        )
    assert spec.relation is not None
    return relation_holds(spec.relation, places[0], places[1])


if __name__ == "__main__":
    main(tyro.cli(Options))
