"""Writes that fail say where, and leave nothing behind."""

import errno
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dina_lrm.files import atomic_folder, atomic_write, naming


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The kernel refuses to write further, as it does on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def fill(folder: Path) -> None:
    (folder / "small").write_text("written")
    save_file({"a": torch.zeros(100_000)}, folder / "tensors.safetensors")


@pytest.mark.parametrize("owned", [("a",), None])
def test_a_folder_that_does_not_fit_is_named_and_leaves_the_old_one(
    tmp_path: Path, owned: tuple[str, ...] | None
) -> None:
    target = tmp_path / "model"
    with atomic_folder(target, owned) as aside:
        (aside / "a").write_text("old")
    with (
        no_file_above(50_000),
        pytest.raises(OSError, match="File too large") as caught,
        atomic_folder(target, owned) as aside,
    ):
        fill(aside)
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["a"]


def test_a_file_that_does_not_fit_is_named_and_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    atomic_write(target, b"old")
    with no_file_above(50_000), pytest.raises(OSError, match="File too large") as caught:
        atomic_write(target, bytes(100_000))
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_is_named() -> None:
    """/dev/full is always full."""
    with pytest.raises(OSError, match="No space left") as caught, naming(Path("/runs/x")):
        with open("/dev/full", "w") as file:
            file.write("x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/runs/x")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere") as caught, naming(tmp_path):
        (tmp_path / "nowhere").read_text()
    assert caught.value.filename == str(tmp_path / "nowhere")
    with pytest.raises(SafetensorError, match=r"^shape$"), naming(tmp_path):
        raise SafetensorError("shape")
    with pytest.raises(OSError, match=r"^of our own$"), naming(tmp_path):
        raise OSError("of our own")
