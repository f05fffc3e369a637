"""`dina-lrm evaluate` on human preferences in a published layout, with the bundled reward."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from dina_lrm import RewardModel
from dina_lrm.cli import main as cli
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import CaptionSpec, change_attribute, sample_caption, sample_scene

NUM_PROMPTS = 12


@pytest.fixture(scope="module")
def hpdv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HPDv2's test layout: a fitting render, one with a wrong attribute, and one that raters tied with it."""
    root = tmp_path_factory.mktemp("hpdv2")
    (root / "test").mkdir()
    rng = np.random.default_rng(5)
    items = []
    for index in range(NUM_PROMPTS):
        spec = sample_caption(rng, num_objects=1)
        files = []
        for side, shown in (("right", spec), ("wrong", change_attribute(rng, spec)), ("also", spec)):
            files.append(f"{index}-{side}.png")
            render(sample_scene(rng, shown)).save(root / "test" / files[-1])
        items.append({"prompt": spec.caption, "image_path": files, "rank": [1, 2, 2]})
    (root / "test" / "0-also.png").write_bytes(b"broken")
    items.append({"prompt": "no such picture", "image_path": ["x.png", "y.png"], "rank": [1, 2]})
    (root / "test.json").write_text(json.dumps(items))
    return root


def test_published_rule_rejects_and_scores(
    hpdv2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--benchmark", "hpdv2", "--root", str(hpdv2), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["published"]["rule"] == "inversions"
    # 3 comparisons a prompt; two of the first prompt's touch the broken picture, and one row has no pictures
    assert (result["num_comparisons"], result["num_rejects"]) == (3 * NUM_PROMPTS - 2, 3)
    assert result["num_items"] == result["num_comparisons"] + result["num_rejects"]
    assert result["published"]["num_rater_ties"] == NUM_PROMPTS - 1
    assert result["by_pair"]["num_pairs"] == result["num_comparisons"] - (NUM_PROMPTS - 1)

    assert -1 <= result["kendall"]["low"] <= result["kendall"]["value"] <= 1

    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(reject["reason"].split(":")[0] for reject in rejects) == [
        "missing file",
        "unreadable image",
        "unreadable image",
    ]
    table = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(table) == result["num_comparisons"]
    strict = [row["score_chosen"] > row["score_rejected"] for row in table if not row["tie"]]
    assert result["by_pair"]["accuracy"]["value"] == pytest.approx(np.mean(strict))

    model = RewardModel.from_pretrained("bundled")
    row = table[0]
    again = model.score(row["prompt"], [row["chosen"], row["rejected"]]).scores.tolist()
    assert again == pytest.approx([row["score_chosen"], row["score_rejected"]], abs=1e-4)


def test_the_rule_changes_the_figure_and_is_named(
    hpdv2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--benchmark", "hpdv2", "--root", str(hpdv2), "--output", str(tmp_path)]
    assert cli.main([*arguments, "--rule", "concordance"]) == 0
    captured = capsys.readouterr()
    assert "chosen: concordance" in captured.out
    assert f"{NUM_PROMPTS - 1} rater ties" in captured.err
    assert "3 of" in captured.err


def test_two_models_are_compared_pair_by_pair(
    hpdv2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--benchmark", "hpdv2", "--root", str(hpdv2), "--rule", "strict", "--json"]
    assert cli.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    again = [*arguments, "--output", str(tmp_path / "two"), "--against", str(tmp_path / "one")]
    assert cli.main(again) == 0
    same = json.loads(capsys.readouterr().out.splitlines()[-1])["against"]
    assert (same["only_first"], same["only_second"], same["p_value"]) == (0, 0, 1.0)
    assert same["difference"]["value"] == 0

    table = parquet.read_table(tmp_path / "one" / "scores.parquet")
    rows = table.to_pylist()
    right = [row for row in rows if not row["tie"] and row["score_chosen"] > row["score_rejected"]]
    for row in right[:4]:  # another model: the first four right answers turned around
        row["score_chosen"], row["score_rejected"] = row["score_rejected"], row["score_chosen"]
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "one" / "scores.parquet")
    assert cli.main(again) == 0
    worse = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (worse["against"]["only_first"], worse["against"]["only_second"]) == (4, 0)
    assert worse["against"]["difference"]["value"] == pytest.approx(4 / worse["by_pair"]["num_pairs"])
    assert worse["against"]["p_value"] == pytest.approx(2 * 0.5**4)

    parquet.write_table(pyarrow.Table.from_pylist(rows[1:]), tmp_path / "one" / "scores.parquet")
    assert cli.main(again) == 2
    assert "holds other comparisons" in capsys.readouterr().err


def test_a_threshold_is_fitted_on_another_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pick-a-Pic's layout: equal renders that raters tied on, and right against wrong ones."""
    import io

    import pyarrow

    rng = np.random.default_rng(9)

    def png(spec: CaptionSpec) -> bytes:
        buffer = io.BytesIO()
        render(sample_scene(rng, spec)).save(buffer, "PNG")
        return buffer.getvalue()

    for split in ("validation_unique", "test_unique"):
        rows = []
        for index in range(10):
            spec = sample_caption(rng, num_objects=1)
            tied = index % 2 == 0
            other = spec if tied else change_attribute(rng, spec)
            labels = (0.5, 0.5) if tied else (1.0, 0.0)
            rows.append(
                {"caption": spec.caption, "jpg_0": png(spec), "jpg_1": png(other), "has_label": True}
                | dict(zip(("label_0", "label_1"), labels, strict=True))
            )
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    arguments = ["evaluate", "--benchmark", "pickapic", "--root", str(tmp_path), "--json"]
    arguments += ["--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    plain = json.loads(capsys.readouterr().out)["published"]
    assert (plain["rule"], plain["threshold"], plain["num_score_ties"]) == ("three-way", 0.0, 0)
    assert cli.main([*arguments, "--threshold-split", "validation_unique"]) == 0
    captured = capsys.readouterr()
    fitted = json.loads(captured.out)["published"]
    assert fitted["threshold"] > 0
    assert "fitted on 10 comparisons of validation_unique" in captured.err
    assert fitted["accuracy"]["value"] > plain["accuracy"]["value"], "small margins on ties now count as ties"
    assert cli.main([*arguments, "--rule", "strict", "--threshold-split", "validation_unique"]) == 2


def test_levels_ensembles_and_draws_beside_the_default(
    hpdv2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every way of scoring is a row with its calibration, and its scores are kept: the default's equal those
    of a run without; the mean of levels is the mean of their scores."""
    arguments = [
        "evaluate",
        "--benchmark",
        "hpdv2",
        "--root",
        str(hpdv2),
        "--output",
        str(tmp_path),
        "--json",
    ]
    arguments += ["--noise-levels", "0.2,0.5", "--ensembles", "0.2,0.5", "--num-draws", "2"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    labels = [row["label"] for row in result["settings"]]
    default = labels[0]
    assert labels == [default, "0.2", "0.5", "0.2+0.5", "mean(0.2, 0.5)", f"{default} x2"]
    assert result["settings"][0]["accuracy"] == result["published"]
    assert result["settings"][-1]["draw_agreement"] > 0.5
    assert all(0 <= row["reliability"]["expected_calibration_error"] <= 1 for row in result["settings"])
    assert result["cost"]["flops"] > 1e6
    assert result["cost"]["seconds"] > 0
    assert -1 <= result["spearman"]["value"] <= 1
    columns = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    averaged = (np.array(columns["0.2: chosen"]) + np.array(columns["0.5: chosen"])) / 2
    assert np.allclose(columns["mean(0.2, 0.5): chosen"], averaged, atol=1e-5)
    assert np.allclose(columns[f"{default} x2: chosen #0"], columns["score_chosen"], atol=1e-5)
    page = (tmp_path / "results.html").read_text()
    assert page.count("<svg") == 2
    assert "mean(0.2, 0.5)" in page
    assert "| mean(0.2, 0.5) |" in (tmp_path / "results.md").read_text()


def test_several_models_on_one_benchmark(
    hpdv2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled reward beside a CLIP score with random weights: results of each, and what they cost."""
    from tests.unit.evaluation.baselines.scorers import save_clip_processor, tiny_clip

    clip = tmp_path / "clip"
    tiny_clip().save_pretrained(clip)
    save_clip_processor(clip)
    arguments = ["evaluate", "--benchmark", "hpdv2", "--root", str(hpdv2), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--scorers", "dina", f"clip-score={clip}", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["model"] for record in records] == ["dina", "clip-score"]
    assert all(record["num_comparisons"] == records[0]["num_comparisons"] for record in records)
    assert records[0]["cost"]["flops"] > records[1]["cost"]["flops"] > 0
    page = (tmp_path / "out" / "costs.html").read_text()
    assert page.count("<svg") == 3
    assert cli.main([*arguments, "--scorers", "clipp"]) == 2
    assert "unknown scorer 'clipp'" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(
    hpdv2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle; the same command then ends in the results of a run that was left alone."""
    arguments = ["evaluate", "--benchmark", "hpdv2", "--root", str(hpdv2), "--batch-size", "1", "--output"]
    part = tmp_path / "killed" / "scores-default.part.jsonl"
    command = [sys.executable, "-m", "dina_lrm", *arguments, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not part.is_file() or part.read_bytes().count(b"\n") < 4):
            time.sleep(0.002)
        process.kill()
    kept = part.read_bytes()
    assert 4 <= kept.count(b"\n") < 1 + 3 * NUM_PROMPTS, "it was in the middle"

    assert cli.main([*arguments, str(tmp_path / "killed"), "--seed", "1"]) == 2
    assert "unfinished run with another seed" in capsys.readouterr().err
    assert part.read_bytes() == kept

    assert cli.main([*arguments, str(tmp_path / "killed")]) == 0
    assert f"going on from {part}" in capsys.readouterr().err
    assert not part.exists()
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("killed", "whole")]
    assert results[0].pop("cost")["flops"] == results[1].pop("cost")["flops"]
    assert results[0] == results[1]
    tables = [parquet.read_table(tmp_path / run / "scores.parquet") for run in ("killed", "whole")]
    assert tables[0].equals(tables[1])
    rejects = [(tmp_path / run / "rejects.jsonl").read_bytes() for run in ("killed", "whole")]
    assert rejects[0] == rejects[1]
    assert (tmp_path / "whole" / "results.html").exists()


def test_root_is_asked_for(hpdv2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--benchmark", "hpdv2"]) == 2
    assert cli.main(["evaluate", "--benchmark", "shapes", "--root", str(hpdv2)]) == 2
    told = capsys.readouterr().err
    assert "--benchmark hpdv2 needs --root DIR" in told
    assert "--root has no effect with --benchmark shapes" in told
