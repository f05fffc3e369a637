"""Importing the package costs nothing, and even its classes load no pipeline library."""

import subprocess
import sys

import pytest

PROBE = """
import sys
import dina_lrm
{access}
heavy = {{"diffusers", "transformers", "peft", "accelerate", "datasets", "matplotlib", "gradio", "ray"}}
print(sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""


@pytest.mark.parametrize("access", ["", "dina_lrm.RewardModel, dina_lrm.Conditioning"])
def test_import_loads_no_pipeline_library(access: str) -> None:
    command = [sys.executable, "-c", PROBE.format(access=access)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
