"""Checkpoints: both layouts keep every number, and writing is atomic."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dina_lrm import Calibration, InvalidInputError, RewardModel
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents
from tests.unit.checkpoints.conftest import LAYOUTS, score

KINDS = {
    "lora": {},
    "lora_early_text": {"text_taps": (1, 2)},
    "lora_logistic": {"logistic": True},
    "frozen": {"lora_rank": 0},
    "frozen_logistic": {"lora_rank": 0, "logistic": True},
    "full_logistic": {"lora_rank": 0, "tuning": "full", "logistic": True},
    "no_text": {"text_taps": ()},
    "whole_transformer": {"num_blocks": 4, "image_taps": (4, 0), "text_taps": (3,)},
}


# --- nothing is lost


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tiny_backbone: Path, tmp_path: Path, kind: str, layout: str) -> None:
    model = make_tiny_reward(tiny_backbone, **KINDS[kind])
    if model.config.tuning == "full":
        with torch.no_grad():
            model.backbone.context_embedder.weight.mul_(1.1)  # no longer the base
    model.save_pretrained(tmp_path / "first", layout, training_step=12)
    loaded = RewardModel.from_pretrained(tmp_path / "first")
    assert torch.equal(score(loaded), score(model))
    assert loaded.config == model.config
    assert (loaded.trained, loaded.training_step) == (True, 12)
    assert not loaded.training
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    loaded.save_pretrained(tmp_path / "second", other)
    assert torch.equal(score(RewardModel.from_pretrained(tmp_path / "second", tiny_backbone)), score(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_not_trained_stays_untrained(tiny_backbone: Path, tmp_path: Path, layout: str) -> None:
    model = RewardModel.initialize(tiny_backbone, num_blocks=2)
    model.save_pretrained(tmp_path / "new", layout)
    assert not RewardModel.from_pretrained(tmp_path / "new").trained
    assert "random weights" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibration_and_defaults_are_kept(tiny_backbone: Path, tmp_path: Path, layout: str) -> None:
    model = make_tiny_reward(tiny_backbone, noise_levels=(0.2, 0.5))
    model.config = replace(model.config, calibrations=(Calibration(noise_levels=(0.2, 0.5), scale=0.7),))
    model.save_pretrained(tmp_path / "reward", layout)
    assert RewardModel.from_pretrained(tmp_path / "reward").config == model.config


def test_saving_a_merged_model_saves_it_unmerged(tiny_backbone: Path, tmp_path: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    before = score(model)
    model.save_pretrained(tmp_path / "reward")
    assert torch.equal(score(model), before)
    assert torch.equal(score(RewardModel.from_pretrained(tmp_path / "reward")), before)


def test_our_layout_holds_no_pickle(saved: Callable[..., Path]) -> None:
    folder = saved("dina", logistic=True)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "README.md",
        "reward_head.safetensors",
        "backbone_adapter/adapter_config.json",
        "backbone_adapter/adapter_model.safetensors",
    }
    record = json.loads((folder / "config.json").read_text())
    assert record["model"]["backbone_id"]
    assert record["versions"]["torch"] == metadata.version("torch")


def test_published_files_and_keys(saved: Callable[..., Path]) -> None:
    folder = saved("published", logistic=True) / "checkpoint"
    head = torch.load(folder / "rm_head.pt", weights_only=True)
    assert "query_tokens" in head
    assert not [name for name in head if "eta" in name], "a strict reader of rm_head.pt must not stumble"
    adapter = load_file(folder / "backbone_lora" / "adapter_model.safetensors")
    assert "base_model.model.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in adapter
    assert set(load_file(folder / "logistic.safetensors")) == {"eta3", "eta4"}


def test_published_full_model_keys(saved: Callable[..., Path]) -> None:
    folder = saved("published", lora_rank=0, tuning="full", logistic=True) / "checkpoint"
    assert [path.name for path in folder.iterdir()] == ["full_model.pt"]
    state = torch.load(folder / "full_model.pt", weights_only=True)
    assert {"eta3", "eta4", "backbone.pos_embed.pos_embed", "reward_head.query_tokens"} <= set(state)
    assert {name.split(".")[0] for name in state} == {"eta3", "eta4", "backbone", "reward_head"}


def test_peft_itself_reads_our_adapter(tiny_backbone: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = make_tiny_reward(tiny_backbone)
    model.save_pretrained(tmp_path / "reward")
    bare = RewardModel.initialize(tiny_backbone, num_blocks=3, image_taps=(1, 3), text_taps=(1, 3))
    tuned = PeftModel.from_pretrained(bare.backbone, tmp_path / "reward" / "backbone_adapter")
    args = (tiny_latents(), tiny_conditioning(), torch.full((3,), 0.4))
    ours = model.unmerge().backbone(*args)
    torch.testing.assert_close(tuned.base_model.model(*args).image[1], ours.image[1])


def test_weights_beside_config_json(saved: Callable[..., Path], tiny_backbone: Path) -> None:
    folder = saved("published")
    expected = score(RewardModel.from_pretrained(folder))
    for path in (folder / "checkpoint").iterdir():
        shutil.move(path, folder / path.name)
    (folder / "checkpoint").rmdir()
    assert torch.equal(score(RewardModel.from_pretrained(folder, tiny_backbone)), expected)


def test_published_checkpoints_without_our_section(saved: Callable[..., Path], tiny_backbone: Path) -> None:
    """What the paper's code writes: no dina_lrm section, no logistic file, so eta3 = 0 and eta4 = 0.15."""
    folder = saved("published", logistic=True)
    expected = score(RewardModel.from_pretrained(folder))
    record = json.loads((folder / "config.json").read_text())
    del record["dina_lrm"]
    (folder / "config.json").write_text(json.dumps(record))
    assert torch.equal(score(RewardModel.from_pretrained(folder, tiny_backbone)), expected)
    (folder / "checkpoint" / "logistic.safetensors").unlink()
    model = RewardModel.from_pretrained(folder, tiny_backbone)
    assert (model.squash.eta3.item(), round(model.squash.eta4.item(), 6)) == (0.0, 0.15)
    assert not torch.equal(score(model), expected)


def test_from_the_hub(
    saved: Callable[..., Path], tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder, asked = saved("published"), []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["allow_patterns"]))
        return str(folder if repo.endswith("reward") else tiny_backbone)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = score(RewardModel.from_pretrained(folder))
    model = RewardModel.from_pretrained("someone/reward", "someone/pipeline")
    assert torch.equal(score(model), expected)
    assert ("someone/pipeline", ["transformer/*"]) in asked
    assert not [patterns for _, patterns in asked if "vae/*" in patterns or "text_encoder/*" in patterns]


# --- atomic writing


def test_saving_over_a_checkpoint_keeps_foreign_files_and_leaves_no_stale_ones(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    folder = make_tiny_reward(tiny_backbone).save_pretrained(tmp_path / "reward")
    (folder / "training_state").mkdir()
    (folder / "training_state" / "state.pt").write_text("precious")
    frozen = make_tiny_reward(tiny_backbone, lora_rank=0)
    frozen.save_pretrained(folder)
    assert (folder / "training_state" / "state.pt").read_text() == "precious"
    assert not (folder / "backbone_adapter").exists()
    assert torch.equal(score(RewardModel.from_pretrained(folder)), score(frozen))
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_leaves_the_old_checkpoint(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    old = make_tiny_reward(tiny_backbone, seed=1)
    folder = old.save_pretrained(tmp_path / "reward", layout)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        make_tiny_reward(tiny_backbone, seed=2).save_pretrained(folder, layout)
    monkeypatch.undo()
    assert torch.equal(score(RewardModel.from_pretrained(folder)), score(old))
    assert [path.name for path in tmp_path.iterdir()] == ["reward"], "nothing left lying about"


def test_places_that_cannot_be_saved_to(tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="it is a file"):
        make_tiny_reward(tiny_backbone).save_pretrained(tmp_path / "file")
    with pytest.raises(InvalidInputError, match="layout"):
        make_tiny_reward(tiny_backbone).save_pretrained(tmp_path / "x", "zip")  # type: ignore[arg-type]
