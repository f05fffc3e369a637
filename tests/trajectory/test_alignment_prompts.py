"""What text encoders do in an alignment run: every prompt once, for the policy and its reward together."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dina_lrm.alignment.config import MonitorConfig, PolicyConfig, ReflConfig, RewardConfig, SamplerConfig
from dina_lrm.backbones.sd3 import SD3Prompts
from dina_lrm.build.alignment import run_alignment
from tests.families import load_pipeline, make_family_reward


def test_a_prompt_is_encoded_once(
    family_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three updates of two prompts, four evaluations: policy and reward read the same embeddings."""
    make_family_reward(family_folders("sd3"), noise_levels=(0.3,)).save_pretrained(tmp_path / "reward")
    prompts = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    encoded: Counter[str] = Counter()
    encode_batch = SD3Prompts.encode_batch

    def counting(self: SD3Prompts, pipeline: Any, some: list[str], device: Any) -> Any:
        encoded.update(some)
        return encode_batch(self, pipeline, some, device)

    monkeypatch.setattr(SD3Prompts, "encode_batch", counting)
    config = ReflConfig(
        policy=PolicyConfig(lora_rank=2),
        reward=RewardConfig(models=(str(tmp_path / "reward"),)),
        sampler=SamplerConfig(num_steps=2, height=32, width=32),
        monitor=MonitorConfig(every=1, num_prompts=2, gold=(), grid_size=2),
        prompts=str(tmp_path / "prompts.txt"),
        num_steps=3,
        batch_size=2,
        precision="float32",
        cpu=True,
    )
    run_alignment(config, pipeline=load_pipeline(family_folders("sd3")))
    assert len(encoded) > 4
    assert set(encoded.values()) == {1}
