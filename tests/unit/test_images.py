"""Every kind of picture a user may hold, and what a message calls it."""

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.data.pairs import load_image
from dina_lrm.images import as_picture, as_pictures
from tests.tiny import PROMPT, make_tiny_reward


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> RewardModel:
    return make_tiny_reward(tiny_pipeline).requires_grad_(False)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Noise, (height, width, channel) = (16, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


# --- arrays


def test_arrays_are_height_width_channel(pixels: np.ndarray) -> None:
    expected = as_picture(Image.fromarray(pixels))
    assert expected.shape == (3, 16, 24)
    assert torch.equal(as_picture(pixels), expected)
    for dtype in (np.float16, np.float32, np.float64, np.dtype(">f4")):
        torch.testing.assert_close(as_picture((pixels / 255).astype(dtype)), expected, atol=5e-4, rtol=0)
    assert torch.equal(as_picture(pixels[::-1, ::-1]), expected.flip(1, 2)), "strides may be negative"
    frozen = pixels.copy()
    frozen.flags.writeable = False
    assert torch.equal(as_picture(frozen), expected)


def test_grey_and_transparent_arrays(pixels: np.ndarray) -> None:
    grey = as_picture(pixels[..., 0])
    assert torch.equal(grey, as_picture(pixels[..., :1]))
    assert torch.equal(grey[0], grey[2])
    clear = np.concatenate([pixels, np.zeros((16, 24, 1), np.uint8)], axis=2)
    assert as_picture(clear).eq(1).all(), "transparency becomes white"


def test_a_batch_of_arrays_is_a_list_of_pictures(pixels: np.ndarray) -> None:
    batch = np.stack([pixels, pixels[::-1]])
    found = as_pictures(batch)
    assert len(found) == 2
    assert torch.equal(found[1], as_picture(pixels[::-1]))
    assert all(map(torch.equal, found, as_pictures(list(batch))))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 16, 24), np.uint8), r"shape \(3, 16, 24\): arrays must be \(height, width, channel\)"),
        (np.zeros((16,), np.uint8), r"arrays must be \(height, width, channel\)"),
        (np.zeros((0, 16, 3), np.uint8), "no side may be empty"),
        (np.zeros((16, 24, 3), np.int64), "dtype int64: arrays must be uint8, or floating"),
        (np.zeros((16, 24, 3), bool), "dtype bool"),
        (np.zeros((16, 24, 3), object), "dtype object"),
        (np.full((16, 24, 3), 200.0), r"values from 200 to 200: floating pixels must be in \[0, 1\]"),
        (np.full((16, 24, 3), np.nan), r"must be in \[0, 1\]"),
    ],
)
def test_arrays_that_are_no_pictures(array: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^image 1 has .*{message}"):
        as_pictures([Image.new("RGB", (8, 8)), array])


# --- files


def test_open_files_and_paths(pixels: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.fromarray(pixels).save(file)

    class Located:
        def __fspath__(self) -> str:
            return str(file)

    expected, content = as_picture(pixels), file.read_bytes()
    with file.open("rb") as opened:
        kinds: list[Any] = [opened, io.BytesIO(content), bytearray(content), memoryview(content), Located()]
        for picture in as_pictures(kinds) + as_pictures(kinds):  # read twice: an open file stays usable
            assert torch.equal(picture, expected)
        assert len(as_pictures(opened)) == len(as_pictures(Located())) == len(as_pictures(bytearray(content)))
    with (
        file.open(encoding="latin-1") as text,
        pytest.raises(InvalidInputError, match=r"picture.png' is a file opened as text: .*'rb'"),
    ):
        as_picture(text, "'picture.png'")


def test_a_lazily_opened_picture_that_is_cut_off(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as image:
        with pytest.raises(InvalidInputError, match=r"cut.png' is not a readable image \(.*truncated"):
            as_pictures(image)
    with pytest.raises(InvalidInputError, match=r"^image 0 is not a readable image \("):
        as_pictures(io.BytesIO(content[:60]))


@pytest.mark.parametrize("read", [as_pictures, load_image])
def test_what_is_no_file_is_never_opened(read: Any, tmp_path: Path) -> None:
    """A named pipe without a writer would be waited for without end."""
    os.mkfifo(tmp_path / "pipe.png")
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    for name, what in (("pipe.png", "a FIFO"), ("link.png", "a FIFO"), (".", "a folder")):
        with pytest.raises(InvalidInputError, match=rf"no file: .* is {what}$"):
            read(tmp_path / name)
    with pytest.raises(InvalidInputError, match=r"no file: /dev/zero is a device"):
        read(Path("/dev/zero"))
    with pytest.raises(InvalidInputError, match=r"missing file: .*gone.png"):
        read(tmp_path / "gone.png")
    for name in ("a\0b.png", "a" * 5000):
        with pytest.raises(InvalidInputError, match=r"no file: .* cannot be read"):
            read(Path(name))


# --- names and sizes


def test_sizes_are_told_as_width_x_height_of_a_named_picture(model: RewardModel, tmp_path: Path) -> None:
    Image.new("RGB", (40, 2)).save(tmp_path / "strip.png")
    good = Image.new("RGB", (16, 16))
    with pytest.raises(InvalidInputError, match=r"^'.*strip\.png' of 40x2 pixels .*small"):
        model.score(PROMPT, [good, tmp_path / "strip.png"])
    with Image.open(tmp_path / "strip.png") as image:
        with pytest.raises(InvalidInputError, match=r"^'.*strip.png' of 40x2 pixels"):
            model.compare(PROMPT, good, image)
    with pytest.raises(InvalidInputError, match=r"^image 1 of 40x2 pixels"):
        model.rank(PROMPT, [good, Image.new("RGB", (40, 2))])
    with pytest.raises(InvalidInputError, match=r"latents of different sizes \(4x4, 6x4\)"):
        model.encode_images([good, Image.new("RGB", (24, 16))])


def test_what_is_no_picture_is_named(model: RewardModel) -> None:
    for images in (None, [None], 3.5, {"a": 1}):
        with pytest.raises(InvalidInputError, match=r"^image 0 is a .* path"):
            model.score(PROMPT, images)
    with pytest.raises(InvalidInputError, match=r"^image 1 is a NoneType"):
        model.compare(PROMPT, Image.new("RGB", (16, 16)), None)


def test_rank_of_a_single_picture(model: RewardModel, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    (ranked,) = model.rank(PROMPT, path)
    assert (ranked.index, ranked.image) == (0, path)
    assert ranked.score == model.score(PROMPT, path).scores.item()
