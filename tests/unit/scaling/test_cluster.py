"""What is handed out to how many processes; Ray itself is met in tests/end_to_end."""

import os
import subprocess
import sys

import pytest

from dina_lrm import CheckpointError, InvalidInputError
from dina_lrm.scaling.cluster import share, whole_path
from dina_lrm.scaling.replicas import serve_replicas
from dina_lrm.serving.settings import ServerSettings


@pytest.mark.parametrize(
    ("resources", "device", "processes", "expected"),
    [
        ({"CPU": 2.0}, "auto", None, (2, False)),
        ({"CPU": 1.0}, "cpu", None, (1, False)),
        ({"CPU": 64.0, "GPU": 8.0}, "auto", None, (8, True)),
        ({"CPU": 64.0, "GPU": 8.0}, "cpu", 20, (20, False)),
        ({"CPU": 64.0, "GPU": 8.0}, "cuda", 3, (3, True)),
    ],
)
def test_share(resources, device, processes, expected):
    assert share(resources, device, processes) == expected


@pytest.mark.parametrize(
    ("resources", "device", "processes", "message"),
    [
        ({"CPU": 2.0}, "cpu", 3, "3 processes for 2 CPU cores"),
        ({"CPU": 2.0}, "cuda", None, "0 processes for 0 GPUs"),
        ({"CPU": 64.0, "GPU": 2.0}, "auto", 3, "3 processes for 2 GPUs"),
    ],
)
def test_no_room(resources, device, processes, message):
    with pytest.raises(InvalidInputError, match=message):
        share(resources, device, processes)


def test_whole_path_leaves_hub_ids_alone(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert whole_path("run") == str(tmp_path / "run")
    assert whole_path("owner/name") == "owner/name"
    assert whole_path("s3://bucket/folder") == "s3://bucket/folder"


def test_replicas_of_what_cannot_be_served():
    with pytest.raises(InvalidInputError, match="device = 'cuda:1'"):
        serve_replicas(ServerSettings(device="cuda:1"), replicas=2)
    with pytest.raises(CheckpointError, match="absent"):
        serve_replicas(ServerSettings(model=("/absent",)), replicas=2)


@pytest.mark.parametrize(
    "module", ["dina_lrm", "dina_lrm.cli.score", "dina_lrm.scaling.bulk", "dina_lrm.scaling.replicas"]
)
def test_importing_starts_no_ray(module):
    code = f"import sys, {module}; assert not {{'ray', 'fastapi', 'gradio'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
