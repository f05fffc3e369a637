"""Thirty steps on random pairs over every backbone: the loss falls, and what was trained is what is loaded.

And a truncated backbone is loaded without its dropped blocks ever being in memory.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.data.latents import LatentPairs
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import TrainConfig
from dina_lrm.training.step import PairScorer
from dina_lrm.training.trainer import train
from tests.families import FAMILIES, family_conditioning, family_latents
from tests.tiny import preferred_pairs

CONFIG = TrainConfig(
    seed=0,
    num_steps=30,
    batch_size=16,
    log_every=1,
    checkpoint_every=1000,
    tensorboard=False,
    cpu=True,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, ema_decay=0.9),
)


def make_pairs(family: str, num_pairs: int = 48, *, frames: int | None = None) -> LatentPairs:
    """Of two random latents, the one with the higher mean in its first channel is preferred."""
    generator = torch.Generator().manual_seed(1)
    latents = family_latents(family, 2 * num_pairs, 8, 8, frames=frames, seed=1)
    latents[:, 0] += torch.randn(2 * num_pairs, *[1] * (latents.ndim - 2), generator=generator)
    return preferred_pairs(latents, family_conditioning(family, 6))


@pytest.mark.parametrize(("family", "frames"), [*((family, None) for family in FAMILIES), ("wan", 2)])
def test_thirty_steps(family: str, frames: int | None, family_folders: Any, tmp_path: Path) -> None:
    model = RewardModel.initialize(family_folders(family), lora_rank=2, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses: list[float] = []
    result = train(
        CONFIG,
        model,
        make_pairs(family, frames=frames),
        on_step=lambda metrics: losses.append(metrics.loss or 0.0),
    )
    assert len(losses) == 30
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8]), [round(loss, 3) for loss in losses]
    model.eval()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_" in name for name in moved)
    assert not [name for name in moved if name.startswith("backbone.") and "lora_" not in name]
    latents = family_latents(family, 3, frames=frames)
    arguments = (latents, family_conditioning(family, 3), [0.2, 0.7])
    with torch.no_grad():
        scores = model.score_latents(*arguments, seed=0)
        loaded = RewardModel.from_pretrained(model.save_pretrained(tmp_path / "reward"))
        assert torch.equal(loaded.score_latents(*arguments, seed=0), scores)
    assert result.history


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_number(family: str, family_folders: Any) -> None:
    pairs = make_pairs(family).batch(range(6))
    noise = torch.randn(pairs.latents_chosen.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = RewardModel.initialize(family_folders(family), lora_rank=2, seed=0)
        for parameter in model.adapter.parameters() if model.adapter else []:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        runs: list[int] = []
        model.backbone.kept_blocks[-1].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        scorer = PairScorer(model, gradient_checkpointing=checkpointing)
        chosen, rejected = scorer(pairs, noise, torch.full((1, 6), 0.4))
        (chosen - rejected).sum().backward()
        assert len(runs) == 1 + checkpointing
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_pairs_of_another_family_are_refused(family_folders: Any) -> None:
    model = RewardModel.initialize(family_folders("sd3"), lora_rank=2)
    with pytest.raises(InvalidInputError, match=r"4 channels.*sd3.* 16"):
        train(CONFIG, model, make_pairs("sd15"))
    with pytest.raises(InvalidInputError, match=r"width 32.*sd3.* 64"):
        train(CONFIG, model, make_pairs("qwen_image"))


PEAK = """
import ctypes, gc, json, sys, tempfile
from pathlib import Path
import torch
from dina_lrm.backbones.architecture import load_parts, truncated
from dina_lrm.backbones.families import read_architecture
from dina_lrm.pipelines.weights import from_folder
from tests.trajectory.test_backbones import BIG
import diffusers

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

for family, (kind, settings, kept) in [*BIG.items(), ("control", (*BIG["sd3"][:2], 12))]:
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**settings)
        network = network.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        network.save_pretrained(folder)
        architecture = read_architecture({"_class_name": kind, **network.config})
        whole = sum(p.numel() for p in network.parameters()) * 4 / 2**20
        kept_size = sum(p.numel() for p in truncated(network, architecture, kept).parameters()) * 4 / 2**20
        del network, parameter
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = kib("VmRSS")
        parts = load_parts(architecture, kept, from_folder(Path(folder)))
        touched = sum(float(p.sum()) for p in parts.parameters())  # files are mapped, and read when used
        peak = (kib("VmHWM") - start) / 1024
        print(json.dumps({"family": family, "whole": whole, "kept": kept_size, "peak": peak}), flush=True)
        del parts
"""
BIG: dict[str, tuple[str, dict[str, Any], int]] = {
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 12,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "caption_projection_dim": 512,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 8,
        },
        2,
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "num_layers": 6,
            "num_single_layers": 12,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "axes_dims_rope": (16, 24, 24),
        },
        2,
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {
            "dim": 768,
            "n_layers": 16,
            "n_refiner_layers": 1,
            "n_heads": 12,
            "n_kv_heads": 12,
            "cap_feat_dim": 64,
            "axes_dims": [16, 24, 24],
            "axes_lens": [64, 64, 64],
        },
        2,
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {"num_layers": 12, "attention_head_dim": 64, "num_attention_heads": 8, "joint_attention_dim": 64,
         "axes_dims_rope": (16, 24, 24)},
        2,
    ),
    "unet": (
        "UNet2DConditionModel",
        {"block_out_channels": (32, 64, 640, 640), "cross_attention_dim": 64, "norm_num_groups": 8},
        2,
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_layers": 12, "attention_head_dim": 64, "num_attention_heads": 12, "text_dim": 64,
         "ffn_dim": 3072},
        2,
    ),
}  # fmt: skip
"""Networks of hundreds of megabytes, and how many blocks of each are kept."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_dropped_blocks_never_take_memory() -> None:
    """Peak resident memory while loading two blocks, in a process of its own."""
    import json

    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=root, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    *rows, control = rows
    assert {row["family"] for row in rows} == set(BIG)
    assert control["peak"] > 0.9 * control["whole"], "loading everything must show in the measure"
    for row in rows:
        dropped = row["whole"] - row["kept"]
        assert dropped > 300, row
        assert 0.9 * row["kept"] < row["peak"] < row["kept"] + 0.15 * dropped, row
