"""`dina-lrm evaluate`: what is kept of a stopped run, with stand-ins for models; pairs of one's own."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.build.pairs import open_shards, prepare_source
from dina_lrm.cli import evaluate_public, main
from dina_lrm.cli.evaluate_options import last_written
from dina_lrm.cli.options import ModelOptions
from dina_lrm.data.latents import LatentPairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.benchmarks import evaluate_latent_pairs
from dina_lrm.evaluation.noise_sweep import Setting, score_pairs
from tests.pictures import noise_picture
from tests.tiny import make_tiny_reward

NUM_ROWS = 10


class Scorer:
    """Brightness; interrupted once it was shown `limit` pictures."""

    def __init__(self, limit: int = 1000) -> None:
        self.shown, self.limit = 0, limit

    def __call__(self, prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        self.shown += len(images)
        if self.shown > self.limit:
            raise KeyboardInterrupt
        return {"brightness": torch.tensor([float(np.asarray(image).mean()) for image in images])}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = []
    for row in range(NUM_ROWS):
        for side, grey in (("chosen", 10 * row + 5), ("rejected", 10 * row)):
            Image.new("L", (2, 2), grey).save(tmp_path / f"{row}-{side}.png")
        rows.append({"prompt": f"p{row}", "chosen": f"{row}-chosen.png", "rejected": f"{row}-rejected.png"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, **scorers: Scorer) -> None:
    monkeypatch.setattr(
        evaluate_public, "scorer_function", lambda options, name, location: (scorers[name], None)
    )


def test_a_later_model_that_stops_does_not_cost_an_earlier_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root / "out"
    command = ["evaluate", "--benchmark", "jsonl", "--root", str(root), "--output", str(out)]
    command += ["--scorers", "clip-score", "hpsv2", "--batch-size", "4"]
    first, second = Scorer(), Scorer(limit=9)
    use(monkeypatch, **{"clip-score": first, "hpsv2": second})
    assert main.main(command) == 130
    assert first.shown == 2 * NUM_ROWS + 1  # one more, whose operations are counted
    capsys.readouterr()

    first, second = Scorer(), Scorer()
    use(monkeypatch, **{"clip-score": first, "hpsv2": second})
    assert main.main(command) == 0
    assert first.shown == 0
    assert second.shown == 2 * NUM_ROWS - 8 + 1
    assert not list(out.rglob("*.part.jsonl"))
    results = [json.loads((out / name / "results.json").read_text()) for name in ("clip-score", "hpsv2")]
    assert [one["published"]["accuracy"]["value"] for one in results] == [1, 1]
    told = capsys.readouterr().err
    assert told.count("going on from") == 2


def test_a_model_that_was_trained_on_is_another(tmp_path: Path) -> None:
    assert last_written(Path("org/model")) is None
    weights = tmp_path / "checkpoint" / "head.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    os.utime(weights, ns=(5, 5))
    assert last_written(tmp_path) == 5
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text("{}")
    assert last_written(tmp_path) == 5
    os.utime(weights, ns=(7, 7))
    assert last_written(tmp_path) == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--learn-levels", "--benchmark", "jsonl", "--root", "."],
            "--learn-levels has no effect with --bench",
        ),
        (["--pairs", "x.safetensors", "--benchmark", "jsonl", "--root", "."], "--pairs has no effect with"),
        (["--against", "elsewhere"], "--against has no effect with --benchmark shapes"),
        (["--rule", "strict", "--pairs", "x.safetensors"], "--rule has no effect with --pairs x.safetensors"),
        (["--root", "."], "--root has no effect with --benchmark shapes"),
        (["--max-flipped", "0.1"], "--max-flipped goes with --learn-levels"),
        (
            ["--scorers", "hpsv2", "--num-draws", "3", "--benchmark", "jsonl", "--root", "."],
            "--num-draws has",
        ),
        (["--learn-levels", "--model", ".", "--num-draws", "3"], "--num-draws has no effect with --learn"),
        (["--benchmark", "hpdv2"], "--benchmark hpdv2 needs --root DIR"),
        (["--num-draws", "0"], "--num-draws is at least 1; got 0"),
        (["--pairs", "LATENTS/tset"], "no folder of prepared pairs at LATENTS/tset"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ModelOptions, "load", lambda options: None)
    assert main.main(["evaluate", *flags]) == main.EXIT_USAGE
    assert message in capsys.readouterr().err


# --- a prepared folder


@pytest.fixture(scope="module")
def prepared(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of 6 prompts and two latent shapes; a picture is in several pairs."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for index in range(12):
        size = (48, 32) if index % 2 else (32, 32)
        for name in range(3):
            noise_picture(3 * index + name, *size).save(folder / f"{index}-{name}.png")
        for chosen, rejected in ((0, 1), (0, 2)):
            names = {"chosen": f"{index}-{chosen}.png", "rejected": f"{index}-{rejected}.png"}
            rows.append(
                {"prompt": f"a red circle {index % 6}", "votes_chosen": 3, "votes_rejected": 1} | names
            )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_source("jsonl", folder / "rows.jsonl", folder / "latents", pipeline=str(tiny_pipeline))
    return folder / "latents"


def test_a_prepared_folder_scores_as_its_pairs_in_memory(prepared: Path, tiny_pipeline: Path) -> None:
    """Shards against a table of one shape with the same latents: the same scores, in the same places."""
    model = make_tiny_reward(str(tiny_pipeline))
    shards = open_shards(prepared, model)
    setting = Setting(noise_levels=(0.4,))
    whole = score_pairs(model, shards, setting, batch_size=5)
    assert len(shards.shapes) == 2
    torch.testing.assert_close(score_pairs(model, shards, setting).margin, whole.margin, atol=1e-5, rtol=0)
    own = (shards.bucket == 0).nonzero().flatten()
    batch = shards.batch(own).to("cpu")
    alone = LatentPairs(
        latents=torch.cat([batch.latents_chosen, batch.latents_rejected]),
        prompts=shards.prompts,
        prompt_embeds=torch.stack([row.prompt_embeds for row in shards.read_prompts(shards.prompts)]),
        pooled_prompt_embeds=torch.stack(
            [row.pooled_prompt_embeds for row in shards.read_prompts(shards.prompts)]
        ),
        prompt_index=shards.prompt_index[own],
        chosen=torch.arange(len(own)),
        rejected=torch.arange(len(own)) + len(own),
        target=shards.target[own],
    )
    memory = score_pairs(model, alone, setting)
    torch.testing.assert_close(memory.chosen[0], whole.chosen[0][own], atol=1e-5, rtol=0)
    torch.testing.assert_close(memory.rejected[0], whole.rejected[0][own], atol=1e-5, rtol=0)


def test_evaluate_on_a_prepared_folder(
    prepared: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_tiny_reward(str(tiny_pipeline)).save_pretrained(tmp_path / "run")
    command = ["evaluate", "--model", str(run), "--pairs", str(prepared), "--noise-levels", "0.2"]
    assert main.main([*command, "--ensembles", "0.2,0.6", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["output"] == str(run / "evaluation" / "latents")
    assert record["model"] == str(run)
    assert record["benchmark"] == str(prepared)
    assert (record["num_pairs"], record["num_prompts"], record["bayes"]) == (24, 6, None)
    assert record["default"]["accuracy"]["low"] <= record["default"]["accuracy"]["value"]
    assert 0 <= record["default"]["reliability"]["expected_calibration_error"] <= 1
    page = (run / "evaluation" / "latents" / "results.html").read_text()
    assert str(prepared) in page
    for text in (page, (run / "evaluation" / "latents" / "results.md").read_text()):
        assert "shapes" not in text.lower()
        assert "Bayes" not in text
    # Measured again, the results are the same; those of another seed or model do not take their place.
    assert main.main([*command, "--ensembles", "0.2,0.6", "--json"]) == 0
    capsys.readouterr()
    assert main.main([*command, "--seed", "3"]) == main.EXIT_USAGE
    assert f"holds the results of {run} with seed 0" in capsys.readouterr().err


def test_pairs_of_another_vae_are_refused(prepared: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    other = shutil.copytree(prepared, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["settings"]["latent_space"] = "AutoencoderKL of another generator"
    (other / "manifest.json").write_text(json.dumps(manifest))
    model = make_tiny_reward(str(tiny_pipeline))
    with pytest.raises(InvalidInputError, match="another generator"):
        evaluate_latent_pairs(model, open_shards(other, model))


def test_no_noise_draws_are_refused(prepared: Path, tiny_pipeline: Path) -> None:
    model = make_tiny_reward(str(tiny_pipeline))
    with pytest.raises(InvalidInputError, match="num_draws = 0: must be at least 1"):
        evaluate_latent_pairs(model, open_shards(prepared, model), num_draws=0)
    with pytest.raises(InvalidInputError, match="num_draws = 0"):
        Setting(noise_levels=(0.4,), num_draws=0)
