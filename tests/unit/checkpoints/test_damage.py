"""Damaged, incomplete, foreign and missing checkpoints: an error that says where."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_lrm import CheckpointError, RewardModel
from tests.tiny import tiny_transformer_only
from tests.unit.checkpoints.conftest import LAYOUTS, score


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
    with pytest.raises(CheckpointError, match=r"/empty is no reward.* empty"):
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
