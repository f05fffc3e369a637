"""Training on shards: two latent shapes, stopped and killed runs, two processes; through the real command."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dina_lrm.build.pairs import prepare_source
from dina_lrm.build.training import run_training
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.shards.read import LatentShards
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.recipes.training import recipe
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import DataConfig, ModelConfig, TrainConfig, ValidationConfig
from dina_lrm.training.loader import step_parts
from dina_lrm.training.result import TrainResult
from dina_lrm.training.step import PairScorer
from dina_lrm.training.validation import levels_label, validation_margins
from tests.pictures import noise_picture

PROMPTS = ("a red circle", "a blue square", "two yellow triangle", "a small green ellipse")


@pytest.fixture(scope="module")
def shards(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs of two sizes; the brighter picture is preferred."""
    root = tmp_path_factory.mktemp("data")
    rows = []
    for index in range(60):
        size = (32, 32) if index % 3 else (48, 32)
        pair = []
        for place, (side, low) in enumerate((("a", 128), ("b", 0))):
            file = root / f"{index}{side}.png"
            noise_picture(2 * index + place, *size, low=low, high=low + 128).save(file)
            pair.append(file.name)
        rows.append({"prompt": PROMPTS[index % 4], "chosen": pair[0], "rejected": pair[1]})
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare_source(
        "jsonl",
        root / "rows.jsonl",
        root / "latents",
        pipeline=str(tiny_pipeline),
        pairs_per_shard=16,
        pairs_per_row_group=4,
    )
    return root / "latents"


def config(pipeline: Path, shards: Path, output: Path | None, **settings: Any) -> TrainConfig:
    base = TrainConfig(
        model=ModelConfig(
            pipeline=str(pipeline),
            num_blocks=2,
            image_taps=(1, 2),
            text_taps=(1,),
            lora_rank=2,
            lora_alpha=4.0,
        ),
        data=DataConfig(train=str(shards), validation=str(shards)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, ema_decay=0.9),
        validation=ValidationConfig(every=6, noise_levels=(0.2, 0.6), ensembles=((0.2, 0.6),), max_pairs=16),
        output=None if output is None else str(output),
        num_steps=18,
        batch_size=8,
        log_every=1,
        checkpoint_every=4,
        tensorboard=False,
        cpu=True,
    )
    return replace(base, **settings)


def losses(result: TrainResult) -> list[float]:
    return [line.loss for line in result.history if line.loss is not None]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(folder)}: {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_on_two_shapes_learns(tiny_pipeline: Path, shards: Path) -> None:
    model, result = run_training(config(tiny_pipeline, shards, None, num_steps=40))
    assert isinstance(model, RewardModel)
    assert len(LatentShards.open(shards).shapes) == 2
    assert sum(losses(result)[-10:]) < 0.8 * sum(losses(result)[:10])
    waits = [line.data_wait_fraction for line in result.history if line.data_wait_fraction is not None]
    assert len(waits) == 40
    assert all(0 <= wait <= 1 for wait in waits)


def test_cutting_a_batch_over_processes_and_parts_changes_nothing(tiny_pipeline: Path, shards: Path) -> None:
    """Step s of (2 processes x 1 part) and of (1 process x 2 parts) are the halves of the same batch."""
    pairs = LatentShards.open(shards)
    settings = config(tiny_pipeline, shards, None)
    model, _ = run_training(replace(settings, num_steps=1))
    schedule = model.schedule
    for step in range(8):
        whole = step_parts(settings, pairs, schedule, step)[0]
        halves = step_parts(replace(settings, accumulation_steps=2), pairs, schedule, step)
        ranks = [step_parts(settings, pairs, schedule, step, process=i, num_processes=2)[0] for i in (0, 1)]
        for parts in (halves, ranks):
            assert torch.equal(torch.cat([p.batch.latents_chosen for p in parts]), whole.batch.latents_chosen)
            assert torch.equal(torch.cat([p.noise for p in parts]), whole.noise)
            assert torch.equal(torch.cat([p.sigma for p in parts], dim=1), whole.sigma)
            assert len({p.noise.shape for p in parts}) == 1


def test_prompts_encoded_on_the_fly_train_alike(tiny_pipeline: Path, shards: Path, tmp_path: Path) -> None:
    """Stored embeddings are float16, so the losses agree to that precision."""
    prepare_source(
        "jsonl",
        shards.parent / "rows.jsonl",
        tmp_path / "latents",
        pipeline=str(tiny_pipeline),
        embeddings=False,
        pairs_per_shard=16,
        pairs_per_row_group=4,
    )
    stored = losses(run_training(config(tiny_pipeline, shards, None, num_steps=4))[1])
    fresh = losses(run_training(config(tiny_pipeline, tmp_path / "latents", None, num_steps=4))[1])
    assert stored == pytest.approx(fresh, abs=2e-3)


def test_a_stopped_run_goes_on_to_the_same_weights(tiny_pipeline: Path, shards: Path, tmp_path: Path) -> None:
    run_training(config(tiny_pipeline, shards, tmp_path / "whole"))
    run_training(config(tiny_pipeline, shards, tmp_path / "cut", num_steps=7))
    run_training(config(tiny_pipeline, shards, tmp_path / "cut", resume=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_patience_ends_a_run_that_gets_no_better(tiny_pipeline: Path, shards: Path) -> None:
    """At a rate of 1e-9 no validation beats the first, at step 6: two more, and it ends at step 18."""
    settings = config(tiny_pipeline, shards, None, num_steps=60)
    settings = replace(
        settings,
        optimizer=replace(settings.optimizer, learning_rate=1e-9),
        validation=replace(settings.validation, patience=2),
    )
    _, result = run_training(settings)
    assert (result.stopped_by, result.best_step, result.steps) == ("patience", 6, 18)


def test_in_memory_pairs_wait_for_nothing_either(tiny_pipeline: Path, shards: Path, tmp_path: Path) -> None:
    """A pair of the shards as a LatentPairs: the same batch."""
    source = LatentShards.open(shards)
    batch = source.batch([0]).to("cpu")
    pairs = LatentPairs(
        latents=torch.cat([batch.latents_chosen, batch.latents_rejected]),
        prompts=["p"],
        prompt_embeds=batch.prompt_embeds,
        pooled_prompt_embeds=batch.pooled_prompt_embeds,
        prompt_index=torch.tensor([0]),
        chosen=torch.tensor([0]),
        rejected=torch.tensor([1]),
        target=batch.target,
    )
    again = pairs.batch([0]).to("cpu")
    assert torch.equal(again.latents_chosen, batch.latents_chosen)
    assert torch.equal(again.distinct, batch.distinct)


# --- the real command, in processes of their own


def arguments(settings: TrainConfig) -> list[str]:
    """`dina-lrm train shapes` with the settings of `config`."""
    model, values = settings.model, settings.validation
    flags = {
        "model.pipeline": model.pipeline,
        "model.num-blocks": model.num_blocks,
        "model.image-taps": [1, 2],
        "model.text-taps": [1],
        "model.lora-rank": 2,
        "data.train": settings.data.train,
        "data.validation": settings.data.validation,
        "optimizer.learning-rate": 3e-3,
        "optimizer.warmup-steps": 3,
        "validation.every": values.every,
        "validation.noise-levels": [0.2, 0.6],
        "validation.max-pairs": 16,
        "output": settings.output,
        "num-steps": settings.num_steps,
        "batch-size": settings.batch_size,
        "accumulation-steps": settings.accumulation_steps,
        "ensemble-fraction": 0,
        "log-every": 1,
        "checkpoint-every": settings.checkpoint_every,
    }
    command = ["train", "shapes", "--cpu", "--no-tensorboard", "--no-group-by-prompt"]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return command


# Not through `accelerate launch --cpu`, which starts one process however many are asked for.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TWO = [*TORCHRUN, "-m", "dina_lrm"]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def trajectory(output: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def test_two_processes_equal_one_with_doubled_accumulation(
    tiny_pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """With gloo. The losses of a step are of the same pairs; the weights differ by the
    order of additions alone."""
    two = arguments(config(tiny_pipeline, shards, tmp_path / "two", num_steps=12))
    one = arguments(config(tiny_pipeline, shards, tmp_path / "one", num_steps=12, accumulation_steps=2))
    for command in ([*TWO, *two], [sys.executable, "-m", "dina_lrm", *one]):
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    difference = np.abs(trajectory(tmp_path / "two") - trajectory(tmp_path / "one"))
    assert len(difference) == 12
    print(f"two processes against one: maximum {difference.max():.2g}, mean {difference.mean():.2g}")
    assert difference.max() < 1e-5
    assert difference.mean() < 2e-6


FSDP2 = [*TORCHRUN, str(Path(__file__).with_name("fsdp_on_cpu.py"))]


UNDETERMINED = ("head.bias", "ff.2.bias", "to_k_vis.bias", "to_k_text.bias")
"""The loss does not depend on them: their gradients are rounding, which AdamW blows up to whole steps."""


def test_weights_cut_over_two_processes_train_as_whole_ones(
    tiny_pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """FSDP2 against one process; stopped, it goes on to the same bits; a checkpoint scores as the pieces."""

    def run(name: str, launch: list[str], **changes: Any) -> None:
        settings = config(tiny_pipeline, shards, tmp_path / name, **{"num_steps": 10, **changes})
        command = [*launch, *arguments(settings), "--optimizer.schedule", "constant", "--resume"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    run("one", [sys.executable, "-m", "dina_lrm"], accumulation_steps=2)
    run("cut", FSDP2)
    run("stopped", FSDP2, num_steps=6)
    run("stopped", FSDP2)
    assert_same_weights(tmp_path / "cut", tmp_path / "stopped")

    difference = np.abs(trajectory(tmp_path / "cut") - trajectory(tmp_path / "one"))
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    determined = [name for name in ours if "optimizer." not in name and not name.endswith(UNDETERMINED)]
    furthest, name = max((float((ours[name] - theirs[name]).abs().max()), name) for name in determined)
    print(f"FSDP2 against one: losses {difference.max():.2g}, weights {furthest:.2g} ({name})")
    assert len(difference) == 10
    assert difference.max() < 1e-6
    assert furthest < 1e-5

    held = json.loads((tmp_path / "cut" / "margins.json").read_text())
    saved = validation_margins(
        PairScorer(RewardModel.from_pretrained(tmp_path / "cut")),
        LatentShards.open(shards),
        [tuple(map(float, label.split("+"))) for label in held],
        accelerator=Accelerator(cpu=True),
        precision=contextlib.nullcontext,
        batch_size=7,
        seed=recipe("shapes").seed,
    )
    for levels, margins in saved.by_levels.items():
        assert sorted(margins.tolist()) == pytest.approx(sorted(held[levels_label(levels)]), abs=1e-5)


def test_a_killed_run_goes_on_to_the_same_weights(tiny_pipeline: Path, shards: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the first checkpoint is there, and once more a moment later."""
    calm, killed = (
        config(tiny_pipeline, shards, tmp_path / name, num_steps=40) for name in ("calm", "killed")
    )
    run = [sys.executable, "-m", "dina_lrm"]
    subprocess.run([*run, *arguments(calm)], env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    command = [*run, *arguments(killed), "--resume"]
    for delay in (0.0, 0.3):
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = time.time()
        while process.poll() is None and not any(
            place.exists() and place.stat().st_mtime > before
            for place in [tmp_path / "killed" / "last" / "training_state"]
        ):
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    assert_same_weights(tmp_path / "calm", tmp_path / "killed")


def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_weights(
    tiny_pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """SIGTERM long before the first checkpoint is due, twice at once as `timeout` sends it."""
    settings = config(tiny_pipeline, shards, tmp_path / "told", num_steps=60, checkpoint_every=1000)
    calm = replace(settings, output=str(tmp_path / "calm"))
    run = [sys.executable, "-m", "dina_lrm"]
    process = subprocess.Popen(
        [*run, *arguments(settings)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    lines = tmp_path / "told" / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 143, told[-3000:]
    step = json.loads((tmp_path / "told" / "last" / "training_state" / "position.json").read_text())["step"]
    assert 1 <= step < 60
    assert f"interrupted; step {step} was finished, and {tmp_path / 'told' / 'last'} holds it" in told
    again = told.strip().splitlines()[-1].partition("go on with: dina-lrm ")[2]
    assert again.endswith("--resume")
    for command in (shlex.split(again), arguments(calm)):
        subprocess.run([*run, *command], env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    assert_same_weights(tmp_path / "calm", tmp_path / "told")


def test_two_processes_prepare_rows_once_and_stop_together(
    tiny_pipeline: Path, shards: Path, tmp_path: Path
) -> None:
    """One of the two is told to stop: both end, after the same step, with a checkpoint that goes on."""
    settings = config(tiny_pipeline, shards.parent / "rows.jsonl", tmp_path / "two", num_steps=2000)
    settings = replace(settings, checkpoint_every=10_000, data=replace(settings.data, validation=None))
    with subprocess.Popen(
        [*TWO, *arguments(settings)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = tmp_path / "two" / "metrics.jsonl"
        while process.poll() is None and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        workers[-1].send_signal(signal.SIGTERM)
        told = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "was finished" in told
    assert (tmp_path / "two" / "pairs" / "train" / "manifest.json").is_file()
    position = json.loads((tmp_path / "two" / "last" / "training_state" / "position.json").read_text())
    assert 1 <= position["step"] < 2000
    assert f"step {position['step']} was finished" in told
