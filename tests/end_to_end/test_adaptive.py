"""Learning levels on pairs, and comparing with them, as typed."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dina_lrm.cli import main as cli
from dina_lrm.data.latents import LatentPairs
from tests.tiny import PROMPT, make_tiny_reward


@pytest.fixture
def reward(tiny_pipeline: Path, tmp_path: Path) -> Path:
    make_tiny_reward(str(tiny_pipeline)).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def pairs(reward: Path, num: int) -> LatentPairs:
    """Random latents, labelled by the reward's own scores, so that there is something to agree on."""
    from dina_lrm import RewardModel
    from dina_lrm.core.conditioning import Conditioning

    model = RewardModel.from_pretrained(reward)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2 * num, 16, 4, 4, generator=generator)
    embeds, pooled = torch.randn(1, 5, 64, generator=generator), torch.randn(1, 64, generator=generator)
    with torch.no_grad():
        scores = model.score_latents(latents, Conditioning(embeds, pooled), [0.1, 0.6], seed=0)
    first, second = torch.arange(num), torch.arange(num) + num
    wins = scores[first] > scores[second]
    return LatentPairs(
        latents=latents,
        prompts=[f"p{index}" for index in range(num)],
        prompt_embeds=embeds.repeat(num, 1, 1),
        pooled_prompt_embeds=pooled.repeat(num, 1),
        prompt_index=torch.arange(num),
        chosen=torch.where(wins, first, second),
        rejected=torch.where(wins, second, first),
        target=torch.ones(num),
    )


def test_learn_then_compare(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs(reward, 240).save(tmp_path / "pairs.safetensors")
    images = []
    for name, colour in (("a.png", (250, 0, 0)), ("b.png", (0, 20, 90))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
        images.append(str(tmp_path / name))
    compare = ["compare", PROMPT, *images, "--model", str(reward), "--adaptive", "--json"]
    assert cli.main(compare) == 2
    assert "--learn-levels" in capsys.readouterr().err
    learn = ["evaluate", "--model", str(reward), "--pairs", str(tmp_path / "pairs.safetensors")]
    assert cli.main([*learn, "--learn-levels", "--json"]) == 0
    learned = json.loads(capsys.readouterr().out)
    assert learned["flipped"] <= 0.05
    assert 1 <= learned["num_levels"] <= len(learned["noise_levels"]) <= 5
    assert cli.main(compare) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["probability_a_preferred"] < 1
    assert told["noise_levels"] == learned["noise_levels"][: told["num_levels"]]
    assert cli.main([*compare, "--noise-levels", "0.4"]) == 2
    assert (
        cli.main(["score", PROMPT, images[0], "--model", str(reward), "--target-error", "0.05", "--json"])
        == 0
    )
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["standard_error"] > 0
    assert cli.main(["score", PROMPT, images[0], "--model", str(reward), "--target-error", "0"]) == 2


def test_too_few_pairs(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs(reward, 20).save(tmp_path / "pairs.safetensors")
    command = ["evaluate", "--model", str(reward), "--pairs", str(tmp_path / "pairs.safetensors")]
    assert cli.main([*command, "--learn-levels"]) == 2
    assert "too few to learn levels on" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "bundled", "--learn-levels"]) == 2
