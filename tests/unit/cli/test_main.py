"""Exit codes, and that a mistake is one line and not a traceback."""

import re
import subprocess
import sys

import pytest

import dina_lrm
from dina_lrm.alignment.processes import AlignmentError
from dina_lrm.cli import main as cli
from dina_lrm.errors import CheckpointError, InvalidInputError, RunError, ScoringError
from dina_lrm.sampling.rewards import RewardError


def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in output


def test_no_command_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage" in captured.err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dina-lrm {dina_lrm.__version__}\n"


def test_unknown_command(capsys):
    assert cli.main(["scoer"]) == 2
    assert "'scoer'" in capsys.readouterr().err


LEAVES = [["train", "shapes"], ["label", "export"], ["demo", "pictures"]]
LEAVES += [["align", method, "shapes"] for method in ("refl", "grpo", "dpo", "step-dpo")]


@pytest.mark.parametrize("command", [*([name] for name in cli.COMMANDS), *LEAVES], ids=" ".join)
def test_help_of_each_command(command, capsys):
    assert cli.main([*command, "--help"]) == 0
    output = capsys.readouterr().out
    assert "usage" in output
    fragments = re.findall(r"(?m)^[│\s]*(?:-\S+(?: \S+)?\s\s+)?Of .*", output)
    assert not fragments, "what an option is, in plain words"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("the head lacks queries"), 2, "the head lacks queries"),
        (ValueError("sigma = 1.5"), 2, "sigma = 1.5"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "a.png"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (InvalidInputError("batch_size = 0"), 2, "batch_size = 0"),
        (RunError("the loss is nan at step 3"), 1, "the loss is nan"),
        (AlignmentError("the gradient norm is inf in update 1"), 1, "is inf in update 1"),
        (RewardError("the reward of 4 of 4 pictures is not finite"), 1, "is not finite"),
        (ScoringError("no server answers"), 1, "no server answers"),
    ],
)
def test_users_mistakes_and_failures_show_no_traceback(error, code, message, capsys):
    assert cli.explain(error) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_our_own_fault_shows_where(monkeypatch, capsys):
    def lose(arguments):
        raise KeyError("lost")

    monkeypatch.setattr("dina_lrm.cli.compare.main", lose)
    assert cli.main(["compare"]) == 1
    captured = capsys.readouterr()
    assert "error: KeyError: 'lost'" in captured.err
    assert "in lose" in captured.err


def test_overview_loads_nothing_heavy():
    code = (
        "import sys; from dina_lrm.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
