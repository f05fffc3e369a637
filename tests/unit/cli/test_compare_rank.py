"""`compare` of two pictures and of a file of pairs, `rank`, around a model that is known."""

import json
from dataclasses import replace
from statistics import NormalDist

import pyarrow.parquet
import pytest
from PIL import Image

from dina_lrm.checkpoints.config import AdaptiveLevels
from dina_lrm.cli.main import main
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.scoring import RankedImage
from tests.pictures import write_grays
from tests.unit.cli.fakes import use_brightness_model


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """gray0.png to gray4.png, of brightness 0, 0.2, 0.4, 0.6, 0.8, in the working directory."""
    write_grays(tmp_path, 5, prefix="gray")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wins(lead: float, sigma: float = 0.4) -> float:
    """Phi(lead / sqrt(2 v)) with v = 2 sigma^2 + 0.05."""
    return NormalDist().cdf(lead / (2 * (2 * sigma**2 + 0.05)) ** 0.5)


def test_compare(pictures, monkeypatch, capsys):
    model = use_brightness_model(monkeypatch)
    assert main(["compare", "bright", "gray4.png", "gray0.png", "--num-draws", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["probability_a_preferred"] == pytest.approx(wins(0.8))
    assert record["num_draws"] == 3
    assert model.calls[0]["num_draws"] == 3
    assert main(["compare", "bright", "gray4.png", "gray0.png"]) == 0
    output = capsys.readouterr().out
    assert f"{wins(0.8):.1%}" in output
    assert f"{wins(-0.8):.1%}" in output


def test_a_file_of_pairs(pictures, monkeypatch, capsys):
    """All columns are kept, pairs that cannot be compared are rejects, the probabilities are those of single
    comparisons."""
    model = use_brightness_model(monkeypatch)
    pairs = [("gray4.png", "gray0.png"), ("gray1.png", "gray2.png"), ("gray1.png", "absent.png")]
    rows = "".join(f"{index:03d},bright,{a},{b}\n" for index, (a, b) in enumerate(pairs))
    (pictures / "pairs.csv").write_text("id,prompt,image_a,image_b\n" + rows)
    arguments = [
        "compare",
        "--input",
        "pairs.csv",
        "--output",
        "out.parquet",
        "--noise-levels",
        "0.1",
        "--json",
    ]
    assert main([*arguments, "--num-draws", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["scored"], summary["rejected"]) == (3, 2, 1)
    table = pyarrow.parquet.read_table("out.parquet")
    assert table["id"].to_pylist() == ["000", "001", "002"]
    assert table["image_b"].to_pylist() == ["gray0.png", "gray2.png", "absent.png"]
    found = table["probability_a_preferred"].to_pylist()
    assert found[:2] == pytest.approx([wins(0.8, 0.1), wins(-0.2, 0.1)], abs=1e-6)
    assert found[2] is None
    assert {call["num_draws"] for call in model.calls} == {2}
    (reject,) = (
        json.loads(line) for line in (pictures / "out.parquet.rejects.jsonl").read_text().splitlines()
    )
    assert (reject["row"], reject["image_b"]) == (2, "absent.png")
    assert "absent.png" in reject["error"]


def test_rank(pictures, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    names = ["gray1.png", "gray4.png", "gray2.png"]
    assert main(["rank", "gray", *names]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
    assert rows == [
        ["1", "gray4.png", "+0.800", f"{wins(0.4):.1%}"],
        ["2", "gray2.png", "+0.400", f"{wins(0.2):.1%}"],
        ["3", "gray1.png", "+0.200"],
    ]
    arguments = ["rank", "gray", *names, "absent.png", "--num-draws", "4", "--batch-size", "2", "--json"]
    assert main(arguments) == 2
    assert "absent.png" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [(one["rank"], one["image"]) for one in records] == [
        (1, "gray4.png"),
        (2, "gray2.png"),
        (3, "gray1.png"),
    ]
    assert records[0]["standard_error"] == pytest.approx(0.01)
    assert records[0]["probability_preferred_to_next"] == pytest.approx(wins(0.4), abs=1e-6)
    assert records[2]["probability_preferred_to_next"] is None
    assert "skipped: missing file: absent.png" in captured.err


def test_rank_adaptively(pictures, monkeypatch, capsys):
    """Scores are probits, so neighbours are told apart by Phi of their difference; a picture that is cut off
    or too small is left out when asked."""
    plan = AdaptiveLevels(
        noise_levels=(0.2, 0.6),
        thresholds=(0.1,),
        scales=(1.0, 1.0),
        offsets=(0.0, 0.0),
        error=0.05,
        num_pairs=9,
    )
    model = use_brightness_model(monkeypatch)
    model.config = replace(model.config, adaptive=plan)

    def rank(prompt, images, *, seed, adaptive):
        assert (prompt, seed, adaptive) == ("gray", 3, True)
        scores = model.score([prompt], images, num_draws=1).scores.tolist()
        ranked = [RankedImage(index, None, score, num_levels=1) for index, score in enumerate(scores)]
        return sorted(ranked, key=lambda one: -one.score)

    def picture_size(height, width, name):
        if height < 8:
            raise InvalidInputError(f"{name} of {width}x{height} pixels is too small")

    monkeypatch.setattr(model, "rank", rank, raising=False)
    monkeypatch.setattr(model, "picture_size", picture_size, raising=False)
    Image.new("RGB", (4, 4)).save("small.png")
    arguments = ["rank", "gray", "gray1.png", "small.png", "gray4.png", "--adaptive", "--seed", "3"]
    assert main(arguments) == 2
    assert "small.png of 4x4 pixels" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad", "--json"]) == 0
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.out.splitlines())
    assert (first["image"], second["image"]) == ("gray4.png", "gray1.png")
    assert first["probability_preferred_to_next"] == pytest.approx(NormalDist().cdf(0.6), abs=1e-6)
    assert (first["num_levels"], second["probability_preferred_to_next"]) == (1, None)
    assert "skipped: small.png" in captured.err
    assert main([*arguments, "--skip-bad"]) == 0
    assert "decided after 1.0 noise levels of an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "gray0.png", "gray1.png"], 'dina-lrm compare "PROMPT" gray0.png gray1.png'),
        (["compare", "gray", "gray0.png"], "give a prompt and two images"),
        (["compare", "gray", "gray0.png", "gray1.png", "gray2.png"], "give a prompt and two images"),
        (["compare", "gray", "gray0.png", "absent.png"], "missing file: absent.png"),
        (
            ["compare", "gray", "gray0.png", "gray1.png", "--adaptive", "--num-draws", "1"],
            "--num-draws is chosen",
        ),
        (["compare", "--input", "rows.jsonl", "--output", "o.csv", "--adaptive"], "is for two images"),
        (["compare", "--input", "rows.jsonl", "--output", "o.csv"], "has image_a or image_b"),
        (["compare", "gray", "gray0.png", "gray1.png", "--output", "o.csv"], "--output goes with --input"),
        (["rank", "gray0.png", "gray1.png"], 'dina-lrm rank "PROMPT" gray0.png gray1.png'),
        (["rank", "gray"], "give a prompt and images"),
        (["rank", "\udce4", "gray0.png"], "the prompt is not text"),
        (["rank", "gray", "absent.png", "--skip-bad"], "absent.png"),
        (["rank", "gray", "gray0.png", "--adaptive", "--noise-levels", "0.4"], "--noise-levels is chosen"),
    ],
)
def test_mistakes_are_named(arguments, message, pictures, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    (pictures / "rows.jsonl").write_text(json.dumps({"prompt": "gray", "image": "gray1.png"}) + "\n")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("error:") == 1
    assert captured.out == ""
    assert not list(pictures.glob("o.csv*"))
