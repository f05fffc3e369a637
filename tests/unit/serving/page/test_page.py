"""What the page answers, and how it refuses wrong input: in words, in the place of the result."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from dina_lrm import RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.serving import page as page_module
from dina_lrm.serving import page_parts
from dina_lrm.serving.page import MAX_PICTURES
from dina_lrm.shapes.pipeline import GUIDANCE_SCALE
from tests.unit.serving.page.conftest import OTHER, PROMPT, built

# Gradio computes statistics of its queue with options of pandas that are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.PandasDeprecationWarning")


def handler(page: gr.Blocks, name: str) -> Any:
    return next(one.fn for one in page.fns.values() if getattr(one.fn, "__name__", "") == name)


def upload(path: Path) -> dict[str, str]:
    return {"path": str(path)}


# --- answers -----------------------------------------------------------------------------------------------


def test_a_score(page: gr.Blocks, reward: RewardModel, files: dict[str, Path]) -> None:
    first, last = handler(page, "score")(upload(files["fits"]), PROMPT)
    (expected,) = reward.score(PROMPT, files["fits"], seed=0, num_draws=8).scores.tolist()
    shown = f"{expected:.2f}".replace("-", "−")
    assert shown in first
    assert shown in last
    assert last.count("<tr>") == 10  # nine levels and the head


def test_a_comparison_is_the_librarys(page: gr.Blocks, reward: RewardModel, files: dict[str, Path]) -> None:
    *_, last = handler(page, "compare")(upload(files["fits"]), upload(files["other"]), PROMPT)
    expected = reward.compare(PROMPT, files["fits"], files["other"], num_draws=8)
    assert expected > 0.5
    assert f"A {100 * expected:.1f} %" in last


def test_a_ranking_is_the_librarys(page: gr.Blocks, reward: RewardModel, files: dict[str, Path]) -> None:
    paths = [files[name] for name in ("other", "fits", "wide")]
    *steps, last = handler(page, "rank")([upload(path) for path in paths], PROMPT)
    assert len(steps) == 3
    expected = reward.rank(PROMPT, paths, num_draws=8)
    names = [Path(one.image).name for one in expected]
    assert [row[0] for row in re.findall(r'reward-text">(\w+\.png)()', last[2])] == names
    assert "marks a place" not in last[2]  # these three are told apart
    captions = [caption for _, caption in last[1]["value"]]
    assert captions == [
        f"{place}: {one.score:.2f}".replace("-", "−") for place, one in enumerate(expected, start=1)
    ]


def test_equal_pictures_share_a_place(page: gr.Blocks, files: dict[str, Path]) -> None:
    *_, last = handler(page, "rank")([upload(files[name]) for name in ("fits", "other", "fits")], PROMPT)
    captions = [caption for _, caption in last[1]["value"]]
    assert [caption.partition(":")[0] for caption in captions] == ["=1", "=1", "3"]
    assert "marks a place" in last[2]


@pytest.mark.long
def test_a_shrunk_picture_is_told(page: gr.Blocks, tmp_path: Path) -> None:
    """Twice the pixels that are taken, as a telephone makes them, on every tab that takes pictures."""
    Image.new("1", (8000, 4000)).save(tmp_path / "large.png")
    large = upload(tmp_path / "large.png")
    told = "was shrunk from 8000x4000 to"
    assert told in next(iter(handler(page, "score")(large, PROMPT)))
    assert told in next(iter(handler(page, "compare")(large, large, PROMPT)))
    *_, last = handler(page, "rank")([large, large], PROMPT)
    assert last[2].count(told) == 2


def test_a_sampling(page: gr.Blocks) -> None:
    *steps, last = handler(page, "generate")(PROMPT, 3, 4, GUIDANCE_SCALE)
    assert len(steps) == 4
    assert "Step 4 of 4" in steps[-1][0]
    assert steps[-1][2].count("<figure>") == 4
    assert steps[-1][2].count("<tr>") == 5
    assert last[1]["value"].size == (64, 64)
    again = list(handler(page, "generate")(PROMPT, 3, 4, GUIDANCE_SCALE))
    assert again[-1][0] == last[0]


def test_what_was_not_understood_is_noted(page: gr.Blocks, files: dict[str, Path]) -> None:
    first, _ = handler(page, "score")(upload(files["fits"]), "a red <zebra> on a gray background")
    assert re.search(r'role="note">[^<]*zebra', first)


def test_examples_fit_the_inputs_and_are_told_apart(page: gr.Blocks, reward: RewardModel) -> None:
    """Every example fills the inputs of its tab; of the first comparison, the sharp picture is preferred."""
    examples = [one for one in page.fns.values() if hasattr(one.fn, "args")]
    assert len(examples) == 11
    for one in examples:
        values = one.fn()
        assert len(one.outputs) == (len(values) if isinstance(values, tuple | list) else 1)
    compared = [one.fn() for one in examples if len(one.outputs) == 3]
    sharp, blurred, prompt = compared[0]
    assert reward.compare(prompt, sharp, blurred) > 0.5
    (ranked,) = [one for one in examples if len(one.outputs) == 2 and isinstance(one.outputs[0], gr.File)]
    paths, prompt = ranked.fn()
    assert len(paths) == 4
    assert Path(reward.rank(prompt, paths)[0].image).name == "fits.png"


def test_a_page_alone_takes_one_job_at_a_time() -> None:
    run, inside, most = page_module.one_at_a_time(), [0], [0]

    def job() -> int:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1
        return 7

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: run(job), range(16))) == [7] * 16
    assert most == [1]


def test_no_generator(reward: RewardModel) -> None:
    page = built(reward)
    assert "This server has no generator" in json.dumps(page.get_config_file())
    assert not [one for one in page.fns.values() if getattr(one.fn, "__name__", "") == "generate"]


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tab", "values", "told"),
    [
        ("score", (None, PROMPT), "Picture: none is given"),
        ("score", ("fits", ""), "Prompt: empty"),
        ("score", ("text", PROMPT), "Picture: not a readable picture"),
        ("score", ("bomb", PROMPT), "Picture: far more than the 64 million pixels that are taken"),
        ("compare", ("fits", None, PROMPT), "Picture B: none is given"),
        ("compare", ("narrow", "fits", PROMPT), "Picture A of 64x2 pixels is too small"),
        ("rank", (None, PROMPT), f"Pictures: 0 given, 2 to {MAX_PICTURES} can be ranked"),
        ("rank", (["fits"], PROMPT), f"Pictures: 1 given, 2 to {MAX_PICTURES} can be ranked"),
        ("rank", (["fits"] * 65, PROMPT), f"Pictures: 65 given, 2 to {MAX_PICTURES} can be ranked"),
        ("rank", (["fits", "text"], PROMPT), "text.png: not a readable picture"),
        ("generate", ("", 0, 4, 4.0), "Prompt: empty"),
        ("generate", (PROMPT, -1, 4, 4.0), "seed = -1: must be a whole number"),
    ],
)
def test_wrong_input_is_told_in_place_of_the_result(
    page: gr.Blocks, files: dict[str, Path], tab: str, values: tuple[Any, ...], told: str
) -> None:
    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(one) for one in value]
        return upload(files[value]) if isinstance(value, str) and value in files else value

    with pytest.warns(UserWarning, match=re.escape(told)):
        *_, last = handler(page, tab)(*map(given, values))
    alert, *others = last if isinstance(last, tuple) else (last,)
    assert 'role="alert"' in alert
    assert told in alert
    assert all(one == "" or one["visible"] is False for one in others)


def test_a_busy_server_is_told(reward: RewardModel, files: dict[str, Path]) -> None:
    def busy(job: Any) -> Any:
        raise ScoringError("the server is busy: try again in a moment")

    page = built(reward, run=busy)
    with pytest.warns(UserWarning, match="busy"):
        (alert,) = handler(page, "score")(upload(files["fits"]), OTHER)
    assert "try again in a moment" in alert


def test_a_fault_is_logged_and_not_shown(
    reward: RewardModel, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(job: Any) -> Any:
        raise RuntimeError("/a/secret/path")

    page = built(reward, run=broken)
    page_parts.log.propagate = True
    with pytest.warns(UserWarning, match="A fault of the server"):
        (alert,) = handler(page, "score")(upload(files["fits"]), PROMPT)
    assert "secret" not in alert
    assert "/a/secret/path" in caplog.text


# --- what is refused, in the server's own words ------------------------------------------------------------


def test_a_probability_comes_first(page: gr.Blocks) -> None:
    tabs = [one.label for one in page.blocks.values() if isinstance(one, gr.Tab)]
    assert tabs == ["Compare", "Rank", "Score", "Generate"]
