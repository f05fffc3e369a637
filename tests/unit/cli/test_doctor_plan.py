"""`dina-lrm doctor --pipeline ID`: what would be done with a generator, from its configs alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dina_lrm.cli.doctor import main
from tests.families import FAMILIES
from tests.tiny import copy_of


def plan_of(pipeline: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    code = main(["--pipeline", str(pipeline), "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return code, {finding["name"]: finding["detail"] for finding in findings}


def test_the_bundled_pipeline_has_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = plan_of("bundled", capsys)
    assert code == 0
    assert plan["network"] == "SD3Transformer2DModel, read by the sd3 backbone, 6 blocks"
    assert "latents, pictures and prompts can be scored" in plan["components"]
    assert plan["reward"].startswith("recipe shapes: first 5 of 6 blocks, image taps [1, 3, 5]")
    assert "backbone 6.8M of 7.8M" in plan["parameters"]
    assert "model" not in plan, "no reward is loaded"
    assert any(name.startswith("score at") for name in plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    family: str, family_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = plan_of(family_folders(family), capsys)
    assert code == 0, plan
    assert "so the defaults: first" in plan["reward"]
    assert ("guidance 3.5" in plan["reward"]) == (family == "flux")
    scores = [detail for name, detail in plan.items() if name.startswith("score at")]
    assert scores
    assert all("TFLOP at K = 1, 3 noise levels" in detail for detail in scores)


def test_no_weights_are_read(
    tmp_path: Path, family_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(family_folders("flux"), tmp_path / "bare", without=("text_encoder_2", "vae"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    code, plan = plan_of(folder, capsys)
    assert code == 0
    assert "missing vae, text_encoder_2, so pictures and prompts cannot be scored" in plan["components"]


def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, family_folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(family_folders("flux"), tmp_path / "odd")
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace("FluxTransformer2DModel", "PixArtTransformer2DModel"))
    for pipeline, message in (
        (folder, "no backbone reads a PixArt"),
        (tmp_path / "none", "neither a folder"),
    ):
        code, plan = plan_of(pipeline, capsys)
        assert code == 1
        assert message in plan["plan"]
