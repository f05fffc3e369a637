"""`dina-lrm doctor --pipeline ID`: what would be done with a generator, from its configs alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dina_lrm.backbones.architecture import Architecture
from dina_lrm.backbones.z_image import Z_IMAGE
from dina_lrm.cli.main import main
from dina_lrm.cli.plan import make_plan, recipe_for
from dina_lrm.evaluation.cost import FULL_SIZE
from dina_lrm.pipelines.source import bundled_folder
from dina_lrm.recipes.training import recipe, recipe_names
from tests.families import FAMILIES
from tests.tiny import copy_of

pytestmark = pytest.mark.long  # networks of their full size, on shapes

SMALL = replace(Z_IMAGE, n_layers=2)


def report_of(pipeline: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--pipeline", str(pipeline), "--json"])
    return code, json.loads(capsys.readouterr().out)


def change_config(folder: Path, component: str, **entries: Any) -> None:
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def generator_folder(folder: Path, architecture: Architecture, **entries: Any) -> Path:
    """Configs alone, as the hub has them."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    config = {"_class_name": architecture.diffusers_class} | architecture.to_dict() | entries
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.mark.parametrize("pipeline", ["bundled", str(bundled_folder("pipeline"))])
def test_the_bundled_pipeline(pipeline: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = report_of(pipeline, capsys)
    assert code == 0
    assert report["healthy"]
    assert not {"model", "score", "bundled reward"} & {finding["name"] for finding in report["findings"]}
    plan = report["plan"]
    assert (plan["family"], plan["network"]) == ("sd3", "SD3Transformer2DModel")
    assert (plan["latent_channels"], plan["pixels_per_latent"]) == (16, 4)
    assert (plan["recipe"], plan["recipe_pipeline"]) == ("shapes", "bundled")
    assert (plan["num_blocks"], plan["total_blocks"]) == (5, 6)
    assert (plan["image_taps"], plan["text_taps"], plan["lora_rank"]) == ([1, 3, 5], [3, 5], 16)
    assert plan["text_tokens"] == 40, "its own tokenizers stop at 20"
    assert [(cost["pixels"], cost["num_levels"]) for cost in plan["costs"]] == [(128, 1), (128, 3)]
    parts = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    assert plan["components"] == {
        "present": ["transformer", "scheduler", "vae", *parts],
        "missing": [],
        "latents": True,
        "pictures": True,
        "prompts": True,
    }


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--pipeline", "bundled"]) == 0
    lines = {line[5:23].strip(): line[24:] for line in capsys.readouterr().out.splitlines()}
    assert lines["can take"] == "latents, pictures, prompts"
    assert lines["recipe"] == "shapes"
    assert lines["reward"].startswith("first 5 of 6 blocks; image taps 1, 3, 5; text taps 3, 5; LoRA rank 16")
    assert lines["parameters"] == "6.8M of 7.8M kept, head 1.9M, LoRA 0.2M"
    assert lines["score at 128 px"].endswith("40 text tokens, the largest picture")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    family: str, family_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = report_of(family_folders(family), capsys)
    assert code == 0, report
    plan = report["plan"]
    assert (plan["recipe"], plan["tuning"], plan["lora_rank"]) == (None, "lora", 32)
    assert plan["guidance"] == (3.5 if family == "flux" else None)
    assert plan["components"]["prompts"]
    assert all(cost["flops"] > 0 for cost in plan["costs"])


def test_no_weights_are_read(
    tmp_path: Path, family_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(family_folders("flux"), tmp_path / "configs")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    code, report = report_of(folder, capsys)
    assert code == 0
    assert report["plan"] == report_of(family_folders("flux"), capsys)[1]["plan"] | {"pipeline": str(folder)}


@pytest.mark.parametrize(
    ("without", "takes"),
    [
        (("vae", "text_encoder", "text_encoder_2", "text_encoder_3"), "latents, not pictures or prompts"),
        (("vae",), "latents, prompts, not pictures"),
        (("tokenizer_2",), "latents, pictures, not prompts"),
        (("text_encoder_3", "tokenizer_3"), "latents, pictures, not prompts"),  # model_index.json lists them
    ],
)
def test_what_a_folder_lacks(
    tmp_path: Path, tiny_pipeline: Path, without: tuple[str, ...], takes: str
) -> None:
    plan = make_plan(str(copy_of(tiny_pipeline, tmp_path / "part", without=without)))
    lines = {name: (detail, ok) for name, detail, ok in plan.lines()}
    assert lines["can take"] == (takes, True)
    assert plan.components.missing == without
    assert f"missing: {', '.join(without)}" in lines["components"][0]


def test_a_transformer_and_a_scheduler_take_latents(tiny_backbone: Path) -> None:
    components = make_plan(str(tiny_backbone)).components
    assert (components.latents, components.pictures, components.prompts) == (True, False, False)


def test_nothing_works_without_a_scheduler(
    tmp_path: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = report_of(copy_of(tiny_pipeline, tmp_path / "part", without=("scheduler",)), capsys)
    assert code == 1
    assert [finding["name"] for finding in report["findings"] if finding["ok"] is False] == ["can take"]


def test_a_copy_of_a_generator_gets_its_recipe(tmp_path: Path) -> None:
    """Though its config states another length of the position tables, which no weight depends on."""
    folder = generator_folder(tmp_path / "copy", Z_IMAGE, axes_lens=[2048, 512, 512])
    plan = make_plan(str(folder))
    assert (plan.recipe, plan.recipe_pipeline) == ("zimage-16-layers", "Tongyi-MAI/Z-Image-Turbo")
    assert (plan.num_blocks, plan.image_taps, plan.lora_rank) == (16, (4, 8, 12, 16), 32)
    lines = {name: detail for name, detail, _ in plan.lines()}
    assert lines["recipe"].endswith("written for Tongyi-MAI/Z-Image-Turbo, which has the same architecture")


@pytest.mark.parametrize("generator", FULL_SIZE)
def test_recipes_go_by_id_then_by_architecture(generator: str) -> None:
    found = recipe_for("a/copy", FULL_SIZE[generator])
    assert found is not None
    assert recipe(found).model.pipeline == generator
    assert recipe_for(generator, SMALL) == found
    assert recipe_for("a/copy", SMALL) is None


def test_every_recipe_is_over_a_generator_of_known_shapes() -> None:
    assert {recipe(name).model.pipeline for name in recipe_names()} - {"bundled"} == set(FULL_SIZE)


def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = copy_of(tiny_pipeline, tmp_path / "odd")
    change_config(odd, "transformer", _class_name="PixArtTransformer2DModel")
    unknown_noise = copy_of(tiny_pipeline, tmp_path / "noise")
    file = unknown_noise / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDPMWuerstchenScheduler"}))
    (tmp_path / "empty").mkdir()
    for pipeline, message in (
        (odd, "no backbone reads a PixArtTransformer2DModel: known are SD3Transformer2DModel"),
        (unknown_noise, "DDPMWuerstchenScheduler"),
        (tmp_path / "empty", "has no transformer/ folder"),
        (tmp_path / "none", "neither a folder nor a hub id"),
    ):
        code, report = report_of(pipeline, capsys)
        assert code == 1
        assert not report["healthy"]
        assert "plan" not in report
        (failed,) = (finding for finding in report["findings"] if finding["ok"] is False)
        assert failed["name"] == "pipeline"
        assert message in failed["detail"]
        assert "\n" not in failed["detail"]


def test_with_a_reward_it_is_loaded_over_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(options: Any) -> None:
        raise ValueError(f"{options.model} over {options.pipeline}")

    monkeypatch.setattr("dina_lrm.cli.options.ModelOptions.load", load)
    assert main(["doctor", "--model", "reward", "--pipeline", "bundled", "--json"]) == 1
    assert "reward over bundled" in capsys.readouterr().out
