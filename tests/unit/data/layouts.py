"""A small set of every source, with pictures, and what stands in for a pipeline when shards are made here."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject
from dina_lrm.data.prepare.settings import PrepareSettings
from dina_lrm.data.prepare.shard import Shard, Worker
from dina_lrm.data.shards.columns import shard_rejects
from dina_lrm.errors import InvalidInputError
from tests import pictures
from tests.pictures import noise_picture

SETTINGS: dict[str, Any] = {
    "source": "hpdv3",
    "split": None,
    "pipeline": "tiny",
    "latent_space": "a VAE",
    "max_pixels": 48 * 48,
    "mixed_sizes": "pad",
    "ties": "reject",
    "min_confidence": None,
    "embeddings": True,
    "prompt_dtype": "float32",
    "max_text_tokens": None,
    "pairs_per_shard": 8,
    "pairs_per_row_group": 4,
    "files": {},
}


class ColourEncoder:
    """A VAE that keeps a picture's mean colour in cells of 8 pixels, and text encoders that count letters."""

    latent_space = "a VAE"

    def picture_size(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        if min(height, width) < 16:
            raise InvalidInputError(f"{name} of {height} x {width} pixels is too small")
        return height // 16 * 16, width // 16 * 16

    def prompt_notes(self, prompts: Sequence[str], device: torch.device) -> list[str]:
        return []

    def encode_images(self, images: Any, device: torch.device) -> list[torch.Tensor]:
        return list(torch.nn.functional.avg_pool2d(torch.stack(images), 8))

    def encode_prompts(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        embeds = torch.stack([torch.full((4, 3), float(len(prompt))) for prompt in prompts])
        mask = torch.tensor([[1] * (1 + len(prompt) % 4) + [0] * (3 - len(prompt) % 4) for prompt in prompts])
        return Conditioning(embeds, embeds[:, 0, :2], mask)


def shard(
    items: Sequence[Comparison | Reject], file: Path, *, root: Path | None = None, **settings: Any
) -> list[Reject]:
    """Write one shard in this process; returns its rejects."""
    worker = Worker(ColourEncoder(), torch.device("cpu"), root or file.parent)
    Shard(items, PrepareSettings(**SETTINGS | settings), worker).write(file)
    rejects, num_items = shard_rejects(file)
    assert num_items == len(items)
    return [Reject(**reject) for reject in rejects]


def encoded(seed: int, size: tuple[int, int] = (32, 32), form: str = "PNG") -> bytes:
    """A picture of noise, (width, height)."""
    return pictures.encoded(noise_picture(seed, *size), form)


def write_pictures(folder: Path, names: str = "abcd") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(encoded(ord(name)))


def write_source(name: str, root: Path) -> tuple[str | None, int]:
    """Files of a source under `root`; returns the split and how many comparisons there are."""
    root.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(seed), "path": None} for seed in range(4)]
    paths = [f"{letter}.png" for letter in "abcd"]
    sides = {"path1": "x/a.png", "path2": "x/b.png"}
    match name:
        case "hpdv3":
            write_pictures(root / "x")
            dump(root / "train.json", [{"prompt": "p", **sides}])
            return "train", 1
        case "hpdv3++":
            write_pictures(root / "x")
            for kind in ("aes", "tf"):
                dump(root / f"test/test_{kind}.json", [{"prompt": "p", **sides}])
            return None, 2
        case "hpdv2 train":
            write_pictures(root / "HPD/train")
            row = {"prompt": "p", "file_path": paths[:2], "human_preference": [0, 1]}
            dump(root / "train.json", [row])
            return "train", 1
        case "hpdv2":
            write_pictures(root / "test")
            dump(root / "test.json", [{"prompt": "p", "image_path": paths, "rank": [1, 2, 3, 4]}])
            return None, 6
        case "imagereward":
            write_pictures(root / "images")
            row = {"prompt": "p", "generations": paths, "ranking": [2, 1, 4, 3]}
            dump(root / "data/test.json", [row])
            return None, 6
        case "genai-bench":
            row = {"prompt": "p", "left_image": cells[0], "right_image": cells[1], "vote_type": "leftvote"}
            table(root / "test_v1-00000.parquet", [row])
            return None, 1
        case "pickapic":
            row = {"caption": "p", "jpg_0": cells[0]["bytes"], "jpg_1": cells[1]["bytes"]}
            table(root / "test_unique-00000.parquet", [row | {"label_0": 0, "label_1": 1}])
            return None, 1
        case "imagerewarddb":
            write_part(root, "test_1", [("0", "p", [1, 2, 3, 4])])
            return None, 6
        case "rapidata":
            row = {"prompt": "p", "image1": cells[0], "image2": cells[1], "model1": "a", "model2": "b"}
            table(
                root / "data/train_0001-00000-of-00001.parquet",
                [row | {"votes_image1": 3, "votes_image2": 9}],
            )
            return None, 1
        case "open-image-preferences":
            row = {"prompt": "p", "chosen": cells[0], "rejected": cells[1]}
            table(root / "data/train-00000-of-00001.parquet", [row])
            return None, 1
        case "editreward":
            write_pictures(root / "x")
            dump(root / "train.json", [{"prompt": "make it red", "path_src": "x/c.png", **sides}])
            return None, 1
        case "imagerewarddb group":
            table(root / "test-00000.parquet", [{"prompt": "p", "image": cells, "rank": [1, 2, 3, 4]}])
            return None, 6
        case "folder":
            write_pictures(root)
            for place, side in (("a.png", "chosen"), ("b.png", "rejected")):
                (root / place).rename(root / f"one.{side}.png")
            (root / "one.txt").write_text("p")
            return None, 1
        case "jsonl":
            write_pictures(root / "x")
            row = {"prompt": "p", "chosen": "x/a.png", "rejected": "x/b.png"}
            (root / "rows.jsonl").write_text(json.dumps(row) + "\n")
            return None, 1
        case _:
            raise AssertionError(name)


def write_part(
    root: Path, part: str, prompts: Sequence[tuple[str, str, Sequence[Any]]], *, unpacked: bool = False
) -> Path:
    """A part of ImageRewardDB: (prompt_id, prompt, ranks), a picture a rank; rows of prompts are mixed."""
    folder = f"images/{part.partition('_')[0]}/{part}"
    pictures: dict[str, bytes] = {}
    rows: list[dict[str, Any]] = []
    for index in range(max(len(ranks) for _, _, ranks in prompts)):
        for prompt_id, prompt, ranks in prompts:
            if index < len(ranks):
                name = f"{part}-{prompt_id}-{index}.webp"
                pictures[name] = encoded(len(rows), form="WEBP")
                rows.append(
                    {"image_path": f"{folder}/{name}", "prompt_id": prompt_id, "prompt": prompt}
                    | {"classification": "People", "image_amount_in_total": len(ranks), "rank": ranks[index]}
                    | {"overall_rating": 4, "image_text_alignment_rating": 3, "fidelity_rating": 4}
                )
    members = pictures | {f"{part}.json": json.dumps(rows).encode()}
    target = root / (folder if unpacked else f"{folder}.zip")
    target.parent.mkdir(parents=True, exist_ok=True)
    if unpacked:
        for name, content in members.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)
    else:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    return target


def dump(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def table(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def rows_of(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    return parquet.read_table(file).to_pylist()
