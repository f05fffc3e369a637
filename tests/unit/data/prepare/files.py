"""Files to prepare."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dina_lrm.build.pairs import prepare_source
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import PreferencePair
from tests.pictures import noise_picture
from tests.tiny import PROMPT

PROMPTS = ("a red circle", "a red square", "two blue circle")


def save(file: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """A picture of (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise_picture(seed, *size).save(file)
    return file


def hpdv3(root: Path, num: int = 11) -> Path:
    """Pictures of two sizes; rows with one missing, one cut off, one with NaN, and with an empty prompt."""
    for index in range(4):
        save(root / f"images/{index}.png", (32, 32) if index < 3 else (48, 32), seed=index)
    (root / "images/cut.png").write_bytes((root / "images/0.png").read_bytes()[:60])
    Image.fromarray(np.full((32, 32), np.nan, dtype=np.float32)).save(root / "images/nan.tiff")
    good = [
        {
            "prompt": PROMPTS[index % 3],
            "path1": f"images/{index % 4}.png",
            "path2": f"images/{(index + 1) % 4}.png",
        }
        for index in range(num)
    ]
    bad = [
        {"prompt": PROMPT, "path1": "images/gone.png", "path2": "images/1.png"},
        {"prompt": PROMPT, "path1": "images/cut.png", "path2": "images/1.png"},
        {"prompt": PROMPT, "path1": "images/0.png", "path2": "images/nan.tiff"},
        {"prompt": "", "path1": "images/0.png", "path2": "images/1.png"},
    ]
    rows = [*good[:5], *bad, *good[5:]]
    (root / "train.json").write_text(json.dumps(rows))
    return root


def comparison(chosen: Any, rejected: Any, row: int = 0, **about: Any) -> Comparison:
    names = ("votes_chosen", "votes_rejected", "tie")
    said = {name: about.pop(name) for name in names if name in about}
    pair = PreferencePair(prompt=about.pop("prompt", "a prompt"), chosen=chosen, rejected=rejected, **said)
    return Comparison(pair=pair, row=row, file="f", **about)


def latent_bytes(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).standard_normal(shape).astype(dtype))
    return buffer.getvalue()


def cache(root: Path, *, index: bool) -> Path:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [
        {
            "prompt": f"prompt {n}",
            "model1": "flux",
            "model2": "sdxl",
            "detailed_results": str({"votes_chosen": 9, "votes_rejected": 3, "confidence": 0.98}),
            "image1_path": f"images/{n}a.jpg",
            "image2_path": f"images/{n}b.jpg",
            "latent1": latent_bytes((16, 4, 6), 2 * n),
            "latent2": latent_bytes((16, 4, 6) if n != 2 else (16, 6, 4), 2 * n + 1),
        }
        for n in range(4)
    ]
    rows[3]["latent2"] = b"not an array"
    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), root / "part_rank00.parquet", compression="zstd", row_group_size=2
    )
    if index:
        lines = ["global_id,parquet_path,row_group,row_index,width,height,bucket_id"]
        lines += [f"{n},/old/place/part_rank00.parquet,{n // 2},{n % 2},48,32,0" for n in (0, 2, 3)]
        (root / "index.csv").write_text("\n".join(lines))
    return root


def run(root: Path, output: Path, pipeline: Path, *, processes: int = 1, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"pairs_per_shard": 4, "pairs_per_row_group": 2, "split": "train"}
    return prepare_source(
        "hpdv3", root, output, pipeline=str(pipeline), devices=["cpu"] * processes, **defaults | settings
    )


def digests(output: Path) -> dict[str, str]:
    return json.loads((output / "manifest.json").read_text())["digests"]
