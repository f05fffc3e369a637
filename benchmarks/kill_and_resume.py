"""Does a run that is killed again and again end like one that was left alone?

    python benchmarks/shapes_as_hpdv3.py --output DATA --num-pairs 20000
    python benchmarks/kill_and_resume.py --data DATA --output WORK

`dina-lrm prepare` of DATA, then `dina-lrm train` on its shards: once undisturbed, and once killed with
SIGKILL (with all its processes) at random moments, each time started again with the same command. Prints a
JSON line a
stage: how often it was killed, and whether all bytes (shards, rejects) or all weights (model, optimizer,
averages) are equal.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from safetensors.torch import load_file


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Path
    """From benchmarks/shapes_as_hpdv3.py."""
    output: Path
    kills: int = 10
    seconds: tuple[float, float] = (4.0, 18.0)
    """A run is killed so long after its start."""
    num_steps: int = 60
    seed: int = 0
    stages: tuple[Literal["prepare", "train"], ...] = ("prepare", "train")
    """"train" needs OUTPUT/latents, which "prepare" leaves."""


def main(options: Options) -> None:
    rng = np.random.default_rng(options.seed)
    prepared = [options.output / name for name in ("latents", "latents-killed")]
    runs = [options.output / name for name in ("run", "run-killed")]

    def prepare(folder: Path) -> list[str]:
        command = [
            "prepare",
            "hpdv3",
            "--root",
            str(options.data),
            "--split",
            "train",
            "--output",
            str(folder),
        ]
        return [*command, "--pairs-per-shard", "256"]

    def train(folder: Path) -> list[str]:
        command = ["train", "shapes", "--data.train", str(prepared[0]), "--data.validation", "None"]
        command += ["--output", str(folder), "--num-steps", str(options.num_steps), "--precision", "bfloat16"]
        command += ["--checkpoint-every", "3", "--log-every", "3", "--resume", "--no-tensorboard"]
        return [*command, "--optimizer.warmup-steps", "5"]

    for stage, command, (calm, killed), compare in (
        ("prepare", prepare, prepared, different_files),
        ("train", train, runs, different_weights),
    ):
        if stage not in options.stages:
            continue
        done(command(calm))
        moments: list[float] = []
        while len(moments) < options.kills:
            moment = float(rng.uniform(*options.seconds))
            if not kill_after(command(killed), moment):
                break  # it came to its end
            moments.append(round(moment, 2))
        done(command(killed))
        record = {
            "stage": stage,
            "kills": len(moments),
            "seconds_after_start": moments,
            "different": compare(calm, killed),
        }
        print(json.dumps(record), flush=True)


def start(arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # so that sums are cut alike however busy the machine is
    command = [sys.executable, "-m", "dina_lrm", *arguments]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)


def done(arguments: Sequence[str]) -> None:
    if start(arguments).wait() != 0:
        raise SystemExit(f"failed: dina-lrm {' '.join(arguments)}")


def kill_after(arguments: Sequence[str], seconds: float) -> bool:
    """True if the run was still going on. Only the main process is killed; its workers must notice."""
    process = start(arguments)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        return True
    return False


def different_files(one: Path, other: Path) -> list[str]:
    """Names of files whose bytes differ, or that only one folder has."""

    def digests(folder: Path) -> dict[str, str]:
        return {
            file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in folder.rglob("*")
            if file.is_file() and file.name != ".lock"
        }

    return sorted(name for name, _ in digests(one).items() ^ digests(other).items())


def different_weights(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not equal bit for bit, in the model, in last/ and its training state."""
    files = [file.relative_to(one) for file in one.rglob("*.safetensors")]
    different = [str(file) for file in files if not (other / file).is_file()]
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        different += [f"{file}: {name}" for name in ours if not torch.equal(ours[name], theirs[name])]
    return different if files else ["no weights at all"]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
