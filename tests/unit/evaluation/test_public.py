"""Public benchmarks as a stream: what is held in memory, what a stopped run keeps, what is scored once."""

import io
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.cli.evaluate_options import percent
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import PreferencePair, Reject, StoredLatent, image_name
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.picture_scores import PartFile, PictureScores
from dina_lrm.evaluation.public import PublicResult, evaluate_comparisons
from dina_lrm.reporting.evaluation import public_page


def bitmap(red: int, *, side: int = 2) -> bytes:
    """A picture of one colour, uncompressed: as many bytes for every colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (red, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


def compared(row: int, prompt: str, chosen: bytes, rejected: bytes, *, tie: bool = False) -> Comparison:
    pair = PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, tie=tie)
    return Comparison(pair=pair, row=row, file="rows.parquet")


class Redness:
    """Scores a picture's red channel, from 0 to 255, in one draw and in two; counts what it is shown."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.shown: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def __call__(self, prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        if self.stop_after is not None and len(self.shown) >= self.stop_after:
            raise KeyboardInterrupt
        reds = [int(np.asarray(image)[0, 0, 0]) for image in images]
        if len(reds) > 1 or not self.shown:  # the one picture whose operations are counted aside
            self.shown += zip(prompts, reds, strict=True)
        red = torch.tensor(reds, dtype=torch.float64)
        return {"red": red / 3, "waves": torch.stack([red.sin(), red.cos()])}


def some_comparisons(count: int = 40) -> Iterator[Comparison | Reject]:
    """Eight prompts, pictures that recur, ties, a reject, and one picture that cannot be read."""
    rng = np.random.default_rng(0)
    for row in range(count):
        chosen, rejected = (bitmap(int(red)) for red in rng.integers(0, 100, size=2))
        yield compared(row, f"prompt {row % 8}", chosen, rejected, tie=row % 5 == 0)
    yield Reject(row=count, reason="no image: jpg_0 is missing", file="rows.parquet")
    yield compared(count + 1, "prompt 1", b"broken", bitmap(3))


def evaluate(score: Redness, *, batch_size: int = 4, part: PartFile | None = None) -> PublicResult:
    return evaluate_comparisons(
        score, some_comparisons(), rule="three-way", threshold=5.0, batch_size=batch_size, part=part
    )


def figures(result: PublicResult) -> dict[str, object]:
    """Everything but time and memory."""
    record = result.to_dict()
    return {**record, "cost": {"flops": record["cost"]["flops"]}}


def same_scores(first: PublicResult, second: PublicResult) -> bool:
    return first.scores.keys() == second.scores.keys() and all(
        np.array_equal(a, b)
        for label in first.scores
        for a, b in zip(first.scores[label], second.scores[label], strict=True)
    )


# --- memory ------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_pictures() -> None:
    """120 more comparisons of two pictures of 120 kB are 29 MB; what stays of a comparison is below 2 kB."""
    side = 200

    def stream(count: int) -> Iterator[Comparison]:
        for row in range(count):
            pictures = (bytearray(bitmap(0, side=side)) for _ in range(2))
            chosen, rejected = (
                one[:-4] + (2 * row + which).to_bytes(4) for which, one in enumerate(pictures)
            )
            yield compared(row, f"prompt {row % 4}", bytes(chosen), bytes(rejected))

    def redness(prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return {"red": torch.tensor([float(np.asarray(image)[0, -1].sum()) for image in images])}

    def peak(count: int) -> int:
        tracemalloc.start()
        result = evaluate_comparisons(redness, stream(count), rule="strict", batch_size=8)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len({item.chosen for item in result.comparisons}) == count
        return held

    evaluate_comparisons(redness, stream(4), rule="strict")  # loads what is loaded at first use
    few, many = peak(40), peak(160)
    assert 8 * 3 * side**2 < few, "a batch of pictures is seen by the measurement"
    assert many - few < 120 * 2_000


# --- each picture once -------------------------------------------------------------------------------------


def test_a_picture_is_scored_once_for_each_prompt() -> None:
    """Three bitmaps under p, in all pairs and one pair twice, two of them again under q: 3 + 2 pictures."""
    a, b, c = bitmap(1), bitmap(2), bitmap(3)
    listed = [("p", c, a), ("p", c, b), ("p", b, a), ("p", c, a), ("q", a, c)]
    stream = [compared(row, *one) for row, one in enumerate(listed)]
    score = Redness()
    result = evaluate_comparisons(score, stream, rule="strict", batch_size=5)
    assert sorted(score.shown[1:]) == [("p", 1), ("p", 2), ("p", 3), ("q", 1), ("q", 3)]
    assert (result.score_chosen - result.score_rejected) * 3 == pytest.approx([2, 1, 1, 2, -2])
    assert result.by_pair.accuracy.value == 4 / 5


def test_batches_change_nothing() -> None:
    results = [evaluate(Redness(), batch_size=size) for size in (2, 7, 1000)]
    for other in results[1:]:
        assert same_scores(results[0], other)
        assert figures(results[0]) == figures(other)
        assert results[0].comparisons == other.comparisons
    assert results[0].rejects[0].reason.startswith("no image")
    assert results[0].rejects[1].reason.startswith("unreadable image: 6 bytes")
    assert (results[0].num_rows, len(results[0].comparisons)) == (42, 40)


def test_names_tell_pictures_apart() -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    names = [image_name(one) for one in (bitmap(1), bitmap(2), picture, picture.resize((1, 2)))]
    assert len(set(names)) == 4
    assert image_name(picture.copy()) == names[2]
    assert image_name(StoredLatent(b"", name="a.png")) == "a.png"


def test_correlations_of_a_list_of_pictures_in_memory() -> None:
    """Raters: a, b, c; redness: b, a, c, so tau is 1/3 and rho 1/2. The bitmaps are of one length."""
    a, b, c = bitmap(20), bitmap(30), bitmap(10)
    stream = [compared(0, "p", a, b), compared(0, "p", a, c), compared(0, "p", b, c)]
    result = evaluate_comparisons(Redness(), stream, rule="strict")
    assert result.kendall.value == pytest.approx(1 / 3)
    assert result.spearman.value == pytest.approx(0.5)


def test_another_result_on_pictures_in_memory(tmp_path: Path) -> None:
    """The list above against a model of the opposite order: right on two pairs of three, and on the third."""
    a, b, c = bitmap(20), bitmap(30), bitmap(10)
    stream = [compared(0, "p", a, b), compared(0, "p", a, c), compared(0, "p", b, c)]
    ours = evaluate_comparisons(Redness(), stream, rule="strict")
    opposite = {label: (chosen, rejected) for label, (rejected, chosen) in ours.scores.items()}
    replace(ours, scores=opposite).save(tmp_path)
    found = ours.against(tmp_path)
    assert (found.only_first, found.only_second) == (2, 1)
    assert found.difference.value == pytest.approx(1 / 3)


# --- a run that was stopped --------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"", b'{"pictures": ["00', b'{"pictures": []}\xff\n'])
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path, torn: bytes) -> None:
    whole = evaluate(Redness())
    part = PartFile(tmp_path / "out" / "scores.part.jsonl", {"seed": 0, "levels": (0.2, 0.5)})
    first = Redness(stop_after=21)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, part=part)
    with part.path.open("ab") as file:
        file.write(torn)
    second = Redness()
    resumed = evaluate(second, part=part)
    assert figures(resumed) == figures(whole)
    assert same_scores(resumed, whole)
    assert resumed.comparisons == whole.comparisons
    assert resumed.rejects == whole.rejects
    assert not set(first.shown) & set(second.shown[1:]), "nothing is scored again"
    assert len(first.shown) > 20

    third = Redness()
    again = evaluate(third, part=part)
    assert third.shown == []
    assert figures(again) == figures(whole)
    assert again.cost.seconds == resumed.cost.seconds > 0


def test_progress_tells_what_was_there(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "scores.part.jsonl", {})
    told: list[tuple[int, int]] = []

    def run(score: Redness) -> None:
        told.clear()
        evaluate_comparisons(
            score,
            [compared(row, "p", bitmap(2 * row), bitmap(2 * row + 1)) for row in range(6)],
            rule="strict",
            batch_size=4,
            part=part,
            on_progress=lambda done, found: told.append((done, found)),
        )

    with pytest.raises(KeyboardInterrupt):
        run(Redness(stop_after=5))  # a batch of four pictures, two comparisons, and the one counted aside
    assert told == []
    run(Redness())
    assert told == [(4, 2), (6, 2)]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "scores.part.jsonl", {"seed": 0, "model": "a"})
    evaluate(Redness(), part=part)
    with pytest.raises(InvalidInputError, match=r"scores\.part\.jsonl .*another model, seed: "):
        evaluate(Redness(), part=PartFile(part.path, {"seed": 1, "model": "b"}))
    with pytest.raises(InvalidInputError, match="with another levels: "):
        evaluate(Redness(), part=PartFile(part.path, {**part.settings, "levels": [0.5]}))
    lines = part.path.read_text().splitlines()
    assert json.loads(lines[0]) == {"seed": 0, "model": "a"}


def test_a_header_that_was_not_written_whole_is_no_run(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "scores.part.jsonl", {"seed": 0})
    part.path.write_text('{"se')
    assert figures(evaluate(Redness(), part=part)) == figures(evaluate(Redness()))
    assert json.loads(part.path.read_text().splitlines()[0]) == {"seed": 0}


# --- rows and comparisons ----------------------------------------------------------------------------------


def test_rows_and_comparisons_are_counted_apart() -> None:
    """A ranked list is one row: two of its three comparisons can be scored, and one more row is none."""
    a, b = bitmap(1), bitmap(2)
    stream = [compared(0, "p", a, b), compared(0, "p", b, b"broken"), compared(0, "p", b, a)]
    result = evaluate_comparisons(
        Redness(), [*stream, Reject(row=1, line=7, reason="no prompt", file="rows.parquet")], rule="strict"
    )
    record = result.to_dict()
    assert [record[f"num_{name}"] for name in ("rows", "items", "comparisons", "rejects")] == [2, 4, 2, 2]
    assert "2 rows, 2 of 4 comparisons rejected" in result.to_markdown()


def test_one_prompt_has_no_interval_and_says_so(tmp_path: Path) -> None:
    stream = [compared(0, "p", bitmap(2), bitmap(1)), compared(1, "p", bitmap(1), bitmap(3))]
    result = evaluate_comparisons(Redness(), stream, rule="strict")
    folder = result.save(tmp_path)
    public_page(result, "jsonl", folder)
    record = json.loads((folder / "results.json").read_text())
    assert record["by_pair"]["accuracy"] == {"value": 0.5, "low": None, "high": None, "confidence": 0.95}
    for name in ("results.md", "results.html"):
        text = (folder / name).read_text()
        assert "nan" not in text.lower()
        assert "- (one prompt)" in text
    assert str(result.by_pair.accuracy) == "0.500 - (one prompt)"
    assert percent(result.by_pair.accuracy) == "50.0 - (one prompt)"


# --- bad input ---------------------------------------------------------------------------------------------


def test_nothing_to_evaluate() -> None:
    with pytest.raises(InvalidInputError, match=r"none of 0 comparisons of 0 rows can be evaluated$"):
        evaluate_comparisons(Redness(), [], rule="strict")
    broken = [compared(0, "p", b"broken", b"too")]
    told = r"none of 1 comparisons of 1 rows can be evaluated: 1 unreadable image; first: row 0, unreadable"
    with pytest.raises(InvalidInputError, match=told):
        evaluate_comparisons(Redness(), broken, rule="strict")


def test_a_score_that_is_not_finite_is_an_error() -> None:
    def score(prompts: list[str], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        return {"nan": torch.full((len(images),), float("nan"))}

    pictures = PictureScores(score, batch_size=1)
    with pytest.raises(InvalidInputError, match=r"nan .*'p'"):
        pictures.add("p", "a.png", bitmap(1))
