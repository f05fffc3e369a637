"""Progress of long work, and what carries the hint how to go on."""

import sys

import pytest

from dina_lrm.cli.console import print_json, resumable
from dina_lrm.errors import ScoringError
from dina_lrm.runs import pace
from dina_lrm.runs.pace import WorkProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds as the test says; advance by `clock[0] += ...`."""
    now = [1000.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def test_lines_where_no_bar_is_drawn(clock, capsys):
    """5 % of 1,000 rows at 10 a second are 5 s; 400 rows were there before and do not count for the rate."""
    with WorkProgress() as progress:
        progress.tell("rows", 400, 400, total=1000)
        for done in range(410, 1001, 10):
            clock[0] += 1
            progress.tell("rows", done, 400, total=1000)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 12
    assert lines[0] == "450 of 1,000 rows, 10 a second, 55 s left"
    assert lines[-2] == "950 of 1,000 rows, 10 a second, 5 s left"
    assert lines[-1] == "1,000 of 1,000 rows, 10 a second"


def test_slow_work_speaks_twice_a_minute_and_quick_work_is_quiet(clock, capsys):
    with WorkProgress({"pairs": 10_000}) as progress:
        for done in range(1, 61):
            clock[0] += 5
            progress.tell("pairs", done)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert len(lines) == 10
    assert lines[0] == "6 of 10,000 pairs, 0.2 a second, 13 h 53 min left"
    with WorkProgress() as progress:
        for done in range(1, 2001):
            clock[0] += 0.0005
            progress.tell("rows", done, total=2000)
    assert capsys.readouterr().err == ""


def test_without_a_total_there_is_a_rate(clock, capsys):
    with WorkProgress({"pairs": 5}) as progress:
        for done in (10, 20):
            clock[0] += 31
            progress.tell("prompts", done)
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "10 prompts, 0.323 a second",
        "20 prompts, 0.323 a second",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk"), ScoringError("no server")])
def test_the_hint_travels_with_what_ends_the_work(error):
    with pytest.raises(type(error)) as caught, resumable("the same command goes on"):
        raise error
    assert caught.value.__notes__ == ["the same command goes on"]


def test_a_mistake_brings_no_hint():
    with pytest.raises(ValueError, match="wrong") as caught, resumable("the same command goes on"):
        raise ValueError("wrong")
    assert not hasattr(caught.value, "__notes__")


def test_names_that_are_not_utf8_are_json_all_the_same(capsys):
    print_json({"image": "gr\udce4y.png"})
    assert capsys.readouterr().out == '{"image": "gr\\udce4y.png"}\n'
    assert sys.stdout.encoding.lower() == "utf-8"
