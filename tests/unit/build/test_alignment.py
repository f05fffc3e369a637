"""Which reward goes with which policy: shared on the same weights, refused where latents differ."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dina_lrm.build.alignment import latent_reward
from dina_lrm.errors import InvalidInputError
from tests.families import load_pipeline, make_family_reward

Folders = Callable[[str], Path]


def test_a_reward_on_the_policys_backbone_shares_it(family_folders: Folders, tmp_path: Path) -> None:
    make_family_reward(family_folders("sd3")).save_pretrained(tmp_path / "reward")
    pipeline = load_pipeline(family_folders("sd3"))
    reward = latent_reward(str(tmp_path / "reward"), pipeline)
    assert reward.model.attached
    own = {parameter.data_ptr() for parameter in pipeline.transformer.parameters()}
    assert reward.model.backbone.weight.data_ptr() in own
    apart = latent_reward(str(tmp_path / "reward"), load_pipeline(family_folders("sd3")), share=False)
    assert not apart.model.attached
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "two blue square"]
    torch.testing.assert_close(
        reward(latents, prompts, [1, 2]), apart(latents, prompts, [1, 2]), rtol=1e-4, atol=1e-4
    )


def test_a_reward_of_another_generator_is_refused(family_folders: Folders, tmp_path: Path) -> None:
    make_family_reward(family_folders("sd15")).save_pretrained(tmp_path / "reward")
    with pytest.raises(InvalidInputError, match="another generator"):
        latent_reward(str(tmp_path / "reward"), load_pipeline(family_folders("sd3")))


def test_a_policy_with_other_weights_is_not_shared(family_folders: Folders, tmp_path: Path) -> None:
    """On another training of the same architecture, or on a fused style, a reward would score nonsense."""
    make_family_reward(family_folders("sd3")).save_pretrained(tmp_path / "reward")
    pipeline = load_pipeline(family_folders("sd3"))
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.1)
    reward = latent_reward(str(tmp_path / "reward"), pipeline)
    assert not reward.model.attached
    alone = latent_reward(str(tmp_path / "reward"), load_pipeline(family_folders("sd3")), share=False)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "two blue square"]
    assert torch.equal(reward(latents, prompts, [1, 2]), alone(latents, prompts, [1, 2]))
