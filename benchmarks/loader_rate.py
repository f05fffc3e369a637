"""How fast shards are read at the latent size of SD3.5-Medium, against the disk's own sequential rate.

    python benchmarks/loader_rate.py --work DIR

Writes shards of random latents (16 x 128 x 128 in float16, 512 kB each) as `dina-lrm prepare` does, then, in
turns, reads all their bytes in order (`disk`) and all their pairs in batches in training order (`loader`).
The page cache is asked to forget the files before each turn. Prints a JSON line: MB/s of either, each
repeat, and their ratio.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from dina_lrm.data.shards.read import LatentShards
from dina_lrm.data.shards.write import FORMAT, PromptRow, prompt_hash, write_pairs, write_prompts
from dina_lrm.training.loader import AHEAD

SHAPE = (16, 128, 128)
ROW_GROUP = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    work: Path
    """Where the shards are written and read; removed afterwards."""
    num_pairs: int = 2048
    pairs_per_shard: int = 512
    batch_size: int = 16
    repeats: int = 5


def main(options: Options) -> None:
    folder = options.work / "loader-rate"
    try:
        files = write(options, folder)
        size = sum(file.stat().st_size for file in files)
        rates: dict[str, list[float]] = {"disk": [], "loader": []}
        for _ in range(options.repeats):
            for name, read in (
                ("disk", lambda: read_bytes(files)),
                ("loader", lambda: read_pairs(options, folder)),
            ):
                rates[name].append(round(size / 1e6 / timed(files, read), 1))
        medians = {name: float(np.median(values)) for name, values in rates.items()}
        record = {"megabytes": round(size / 1e6), "megabytes_per_second": rates, "median": medians}
        print(json.dumps(record | {"ratio_of_medians": round(medians["loader"] / medians["disk"], 2)}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(options: Options, folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = []
    for start in range(0, options.num_pairs, options.pairs_per_shard):
        rows = [
            {
                "prompt": f"prompt {index // 4}",
                "prompt_hash": prompt_hash(f"prompt {index // 4}"),
                "target": 1.0,
                "file": "random",
                "row": index,
                "chosen": f"{index}a",
                "rejected": f"{index}b",
                "latent_shape": list(SHAPE),
                "latents_chosen": rng.standard_normal(SHAPE, dtype=np.float32).astype(np.float16).tobytes(),
                "latents_rejected": rng.standard_normal(SHAPE, dtype=np.float32).astype(np.float16).tobytes(),
            }
            for index in range(start, start + options.pairs_per_shard)
        ]
        groups = [rows[first : first + ROW_GROUP] for first in range(0, len(rows), ROW_GROUP)]
        file = folder / "pairs" / f"part-{len(files):05d}.parquet"
        write_pairs(file, groups, rejects=[], num_items=len(rows), pictures={})
        files.append(file)
    prompts = [f"prompt {index}" for index in range(options.num_pairs // 4)]
    embeds = [PromptRow(prompt_embeds=torch.zeros(1, 1), pooled_prompt_embeds=None, attention_mask=None)]
    table = folder / "prompts" / "part-00000.parquet"
    write_prompts(table, prompts, embeds * len(prompts), dtype=torch.float16)
    names = [file.relative_to(folder).as_posix() for file in (*files, table)]
    manifest = {"format": FORMAT, "settings": {}, "digests": dict.fromkeys(names, "")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return files


def timed(files: list[Path], read: Callable[[], None]) -> float:
    """Seconds, with nothing of the files in memory beforehand."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def read_bytes(files: list[Path]) -> None:
    buffer = bytearray(8 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def read_pairs(options: Options, folder: Path) -> None:
    """Two batches at a time, as the training loop makes them ahead of itself."""
    shards = LatentShards.open(folder)

    def batch(step: int) -> None:
        shards.batch(shards.order(step, batch_size=options.batch_size, seed=0))

    with ThreadPoolExecutor(AHEAD) as pool:
        list(pool.map(batch, range(options.num_pairs // options.batch_size)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
