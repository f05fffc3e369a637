"""Devices and dtypes by name."""

from pathlib import Path

import pytest
import torch

from dina_lrm import InvalidInputError, RewardModel
from dina_lrm.models.placement import resolve_device, resolve_dtype
from tests.tiny import make_tiny_reward


def test_dtypes_by_name(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = make_tiny_reward(tiny_backbone).save_pretrained(tmp_path / "reward")
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert RewardModel.initialize(tiny_backbone, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float23", "nn", "int8", torch.int64])
def test_dtypes_that_cannot_be(dtype: torch.dtype | str) -> None:
    with pytest.raises(InvalidInputError, match=r"dtype = .* float32, bfloat16, float16"):
        resolve_dtype(dtype)
    with pytest.raises(InvalidInputError, match="dtype = "):
        RewardModel.from_pretrained("bundled", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_devices_that_do_not_exist(device: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^device = '{device}' ") as e:
        RewardModel.from_pretrained("bundled", device=device)
    assert "\n" not in str(e.value)
    with pytest.raises(InvalidInputError, match=r"^device = "):
        RewardModel.initialize("bundled", device=device)


def test_devices_that_exist() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("meta") == torch.device("meta")
    assert resolve_device(None) is None
