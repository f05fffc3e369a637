"""Checkpoints: both layouts keep every number, writing is atomic, and damage is an error that says where."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_lrm import Calibration, CheckpointError, InvalidInputError, RewardModel
from tests.tiny import make_tiny_reward, tiny_conditioning, tiny_latents, tiny_transformer_only

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
LAYOUTS = ["dina", "published"]


def score(model: RewardModel) -> torch.Tensor:
    with torch.no_grad():
        return model.score_latents(tiny_latents(), tiny_conditioning(), [0.3, 0.6], tiny_latents(seed=1))


@pytest.fixture
def saved(tiny_backbone: Path, tmp_path: Path) -> Callable[..., Path]:
    def save(layout: str, **settings: object) -> Path:
        return make_tiny_reward(tiny_backbone, **settings).save_pretrained(tmp_path / "reward", layout)

    return save


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
    model.config = replace(model.config, calibration=Calibration(noise_levels=(0.2, 0.5), scale=0.7))
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


# --- damage


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_missing_file_is_an_error(saved: Callable[..., Path], layout: str) -> None:
    folder = saved(layout)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name.split(".")[0]):
            RewardModel.from_pretrained(folder)
        file.write_bytes(content)
    score(RewardModel.from_pretrained(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 0, "tuning": "full"}])
def test_every_truncated_file_is_an_error(saved: Callable[..., Path], layout: str, settings: dict) -> None:
    folder = saved(layout, **settings)
    for file in [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]:
        content = file.read_bytes()
        for length in (0, 10, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            if file.suffix == ".json" and length == len(content) - 1 and content.endswith(b"\n"):
                continue  # only the last newline is gone
            with pytest.raises(CheckpointError, match=file.name):
                RewardModel.from_pretrained(folder)
        file.write_bytes(content)


def test_a_changed_byte_is_noticed(saved: Callable[..., Path]) -> None:
    folder = saved("dina")
    for file in folder.rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=f"{file.name} is not the file that was saved"):
            RewardModel.from_pretrained(folder)
        content[-3] ^= 1
        file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("model"), "damaged"),
        (lambda r: r.pop("files"), "damaged"),
        (lambda r: r.update(trained="yes"), "damaged"),
        (lambda r: r.update(format="other"), "neither ours"),
        (lambda r: r.update(format_version=9), "format_version 9"),
        (lambda r: r["model"].update(num_blocks="3"), "model.num_blocks = '3'"),
        (lambda r: r["model"].update(extra=1), "unknown entries"),
        (lambda r: r["model"].update(image_taps=[2, 3]), "changed after saving"),
        (lambda r: r["model"].update(num_blocks=4), "changed after saving"),
        (lambda r: r["model"].update(lora_alpha=40.0), "disagree"),
        (lambda r: r["model"].update(tuning="full"), r"lacks backbone.safetensors"),
        (lambda r: r["backbone"]["architecture"].update(num_layers=7), "another backbone"),
        (lambda r: r["backbone"].update(probes={"x": "y"}), "fingerprint is damaged"),
    ],
)
def test_tampered_config(saved: Callable[..., Path], change: Callable, message: str) -> None:
    folder = saved("dina")
    edit_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        RewardModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["model"].pop("visual_head_idx"), "'visual_head_idx' is missing"),
        (lambda r: r["model"].update(model_type="hinge"), "hinge"),
        (lambda r: r["model"].update(visual_head_idx=[1, 9]), "from 0 to num_blocks"),
        (lambda r: r["model"]["reward_head"].update(out_dim=2), "out_dim"),
        (lambda r: r["model"].update(text_head_idx=[1]), r"disagree about \['text_taps'"),
        (lambda r: r["model"]["lora_config"].update(r=8), "disagree"),
        (
            lambda r: (r.pop("dina_lrm"), r["model"].update(visual_head_idx=[1, 2, 3])),
            "missing: agg|layer_adapters",
        ),
        (lambda r: (r.pop("dina_lrm"), r["model"].update(num_transformer_layers=4)), "transformer_blocks.3"),
        (lambda r: (r.pop("dina_lrm"), r["model"]["reward_head"].update(width=64)), "proj_in"),
    ],
)
def test_tampered_published_config(saved: Callable[..., Path], change: Callable, message: str) -> None:
    folder = saved("published")
    backbone = RewardModel.from_pretrained(folder).config.backbone_id
    edit_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        RewardModel.from_pretrained(folder, backbone)


def drop(state: dict) -> dict:
    return {
        name: tensor
        for name, tensor in state.items()
        if "agg_visual.bias" not in name and "0.attn.to_q" not in name
    }


def add(state: dict) -> dict:
    return state | {"surplus.weight": torch.zeros(1)}


def reshape(state: dict) -> dict:
    return {name: tensor[:1] if tensor.ndim == 2 else tensor for name, tensor in state.items()}


def poison(state: dict) -> dict:
    return {name: tensor * float("nan") for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(drop, "missing: "), (add, "unexpected: surplus.weight"), (reshape, "shapes differ"), (poison, "NaN")],
)
@pytest.mark.parametrize("part", ["head", "adapter"])
def test_partly_matching_files_are_listed(
    saved: Callable[..., Path], spoil: Callable, message: str, part: str
) -> None:
    folder = saved("published") / "checkpoint"
    if part == "head":
        torch.save(spoil(torch.load(folder / "rm_head.pt", weights_only=True)), folder / "rm_head.pt")
    else:
        file = folder / "backbone_lora" / "adapter_model.safetensors"
        save_file({k: v.contiguous() for k, v in spoil(load_file(file)).items()}, file)
    with pytest.raises(CheckpointError, match=message):
        RewardModel.from_pretrained(folder.parent)


@pytest.mark.parametrize("spoil", [add, reshape, poison])
def test_partly_matching_full_models(saved: Callable[..., Path], spoil: Callable) -> None:
    folder = saved("published", lora_rank=0, tuning="full")
    file = folder / "checkpoint" / "full_model.pt"
    torch.save(spoil(torch.load(file, weights_only=True)), file)
    with pytest.raises(CheckpointError, match=r"surplus|shape|NaN"):
        RewardModel.from_pretrained(folder)


def test_no_code_runs_from_a_pickle(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("published")

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"query_tokens": Evil()}, folder / "checkpoint" / "rm_head.pt")
    with pytest.raises(CheckpointError, match="plain tensors"):
        RewardModel.from_pretrained(folder)
    assert not (tmp_path / "owned").exists()


def test_unsupported_adapters_are_refused(saved: Callable[..., Path]) -> None:
    folder = saved("published")
    edit_json(
        folder / "checkpoint" / "backbone_lora" / "adapter_config.json", lambda r: r.update(use_dora=True)
    )
    with pytest.raises(CheckpointError, match="use_dora"):
        RewardModel.from_pretrained(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "transformer",
    [
        {"num_attention_heads": 8},
        {"num_layers": 3},
        {"qk_norm": None},
        {"dual_attention_layers": ()},
        {"seed": 5},
    ],
)
def test_a_checkpoint_for_another_backbone(
    saved: Callable[..., Path], tmp_path: Path, layout: str, transformer: dict
) -> None:
    folder = saved(layout)
    if transformer.get("num_attention_heads"):
        transformer = transformer | {"caption_projection_dim": 64}
    other = tiny_transformer_only(tmp_path / "other", **transformer)
    with pytest.raises(CheckpointError, match=r"another backbone|does not fit"):
        RewardModel.from_pretrained(folder, other)


def test_the_same_backbone_in_half_precision_passes(saved: Callable[..., Path], tiny_backbone: Path) -> None:
    folder = saved("dina")
    half = RewardModel.from_pretrained(folder, tiny_backbone, dtype=torch.bfloat16)
    torch.testing.assert_close(score(half), score(RewardModel.from_pretrained(folder)), atol=0.1, rtol=0)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        RewardModel.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"/empty is no reward: it is empty. A reward is a folder with"):
        RewardModel.from_pretrained(tmp_path / "empty")


def test_folders_that_are_mistaken_for_rewards(
    saved: Callable[..., Path], tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is named in full, says what it is, and what would be a reward."""

    def message(location: Path | str) -> str:
        with pytest.raises(CheckpointError) as caught:
            RewardModel.from_pretrained(location)
        assert "A reward is a folder with config.json and reward_head.safetensors" in str(caught.value)
        return str(caught.value)

    run, latents, pictures = (tmp_path / name for name in ("run", "latents", "pictures"))
    run.mkdir()
    (run / "train_config.json").write_text("{}")
    assert f"{run} is no reward: it is a training run that has not saved a checkpoint yet" in message(run)
    saved("dina").rename(run / "last")
    assert f"take its last checkpoint, {run / 'last'}" in message(run)
    (latents / "pairs").mkdir(parents=True)
    (latents / "manifest.json").write_text("{}")
    assert "it holds latents that `dina-lrm prepare` made" in message(latents)
    assert "it is a diffusers pipeline, whose place is pipeline=..." in message(tiny_backbone)
    adapter = run / "last" / "backbone_adapter"
    assert f"it is a LoRA adapter without a reward head; the reward it belongs to is {run / 'last'}" in (
        message(adapter)
    )
    assert "'_class_name'" not in message(tiny_backbone / "transformer")
    assert "its entries are _class_name, " in message(tiny_backbone / "transformer")
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"")
    monkeypatch.chdir(pictures)
    assert f"{pictures} is no reward: there is no config.json among a.png" in message(".")


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
