"""The demo from the first picture to the page, with budgets of seconds."""

import json

from dina_lrm.cli.main import main


def test_demo(tmp_path, capsys):
    budget = {
        "--train-seconds": 6,
        "--train-prompts": 4,
        "--test-prompts": 4,
        "--num-samples": 2,
        "--num-rankings": 2,
    }
    arguments = [str(part) for pair in budget.items() for part in pair]
    assert main(["demo", "--output", str(tmp_path / "demo"), *arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<img ") >= 2 + 2 * 8
    assert len(summary["rewards"]) == 2
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["seconds"] == summary["seconds"]
    assert (tmp_path / "demo" / "reward" / "config.json").is_file()
