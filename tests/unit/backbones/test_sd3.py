"""The SD3 adapter: it is diffusers' transformer, cut off after L blocks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dina_lrm import CheckpointError, Conditioning, InvalidInputError, MissingComponentError, RewardModel
from dina_lrm.backbones.architecture import empty_parts, load_parts
from dina_lrm.backbones.backbone import Backbone
from dina_lrm.backbones.sd3 import SD35_MEDIUM, SD3Architecture
from dina_lrm.pipelines import weights
from dina_lrm.pipelines.weights import from_folder
from tests.tiny import copy_of, make_tiny_reward, tiny_conditioning, tiny_latents, tiny_transformer_only


@pytest.fixture(scope="module")
def transformer(tiny_backbone: Path):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(tiny_backbone / "transformer").eval()


def backbone_of(folder: Path, num_blocks: int, image_taps: tuple = (1,), text_taps: tuple = ()) -> Backbone:
    model = RewardModel.initialize(folder, num_blocks=num_blocks, image_taps=image_taps, text_taps=text_taps)
    return model.backbone


def diffusers_taps(transformer, latents: Tensor, conditioning: Conditioning, timestep: Tensor):
    """Outputs of every block of the whole transformer, caught by hooks."""
    caught = []
    hooks = [
        block.register_forward_hook(lambda *a: caught.append(a[2]))
        for block in transformer.transformer_blocks
    ]
    with torch.no_grad():
        transformer(latents, conditioning.prompt_embeds, conditioning.pooled_prompt_embeds, timestep)
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("num_blocks", [1, 3, 4])
def test_taps_are_the_blocks_outputs(tiny_backbone: Path, transformer, num_blocks: int) -> None:
    text_taps = tuple(range(min(num_blocks, 3) + 1))
    backbone = backbone_of(tiny_backbone, num_blocks, tuple(range(num_blocks + 1)), text_taps)
    latents, conditioning = tiny_latents(), tiny_conditioning()
    matched = backbone.schedule.match(torch.tensor([0.1, 0.4, 0.9]))
    with torch.no_grad():
        features = backbone(latents, conditioning, matched.sigma)
    blocks = diffusers_taps(transformer, latents, conditioning, matched.timestep)
    for depth in range(1, num_blocks + 1):
        torch.testing.assert_close(features.image[depth], blocks[depth - 1][1], atol=0, rtol=0)
        if depth in text_taps:
            torch.testing.assert_close(features.text[depth], blocks[depth - 1][0], atol=0, rtol=0)


def test_last_kept_block_keeps_its_text_stream(tiny_backbone: Path) -> None:
    """A transformer built with 3 layers would drop the text output of block 3; a truncated one must not."""
    blocks = backbone_of(tiny_backbone, 3).kept_blocks
    assert [block.context_pre_only for block in blocks] == [False, False, False]
    assert [block.context_pre_only for block in backbone_of(tiny_backbone, 4).kept_blocks] == [False] * 3 + [
        True
    ]
    assert [block.use_dual_attention for block in blocks] == [True, False, False]
    assert all(block.attn.norm_q is not None for block in blocks)


def test_text_tap_at_the_transformers_last_block_is_refused(tiny_backbone: Path) -> None:
    with pytest.raises(InvalidInputError, match="puts out no text tokens"):
        backbone_of(tiny_backbone, 4, (4,), (2, 4))


def test_more_blocks_than_there_are(tiny_backbone: Path) -> None:
    with pytest.raises(InvalidInputError, match="the transformer has 4 blocks"):
        backbone_of(tiny_backbone, 5, (5,))


def test_tap_order_means_nothing(tiny_backbone: Path) -> None:
    forward = make_tiny_reward(tiny_backbone, image_taps=(0, 1, 3), text_taps=(0, 2))
    backward = make_tiny_reward(tiny_backbone, image_taps=(3, 0, 1), text_taps=(2, 0))
    args = (tiny_latents(), tiny_conditioning(), 0.4, tiny_latents(seed=1))
    torch.testing.assert_close(forward.score_latents(*args), backward.score_latents(*args), atol=0, rtol=0)


def test_blocks_after_the_last_tap_are_not_computed(tiny_backbone: Path) -> None:
    backbone = backbone_of(tiny_backbone, 4, (1, 2), (1,))
    backbone.kept_blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("block 3 was run"))
    backbone(tiny_latents(), tiny_conditioning(), torch.full((3,), 0.4))


def test_dropped_blocks_are_never_read(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = weights.read_safetensor
    monkeypatch.setattr(
        weights, "read_safetensor", lambda file, name: (read.append(name), original(file, name))[1]
    )
    backbone = backbone_of(tiny_backbone, 2)
    assert sorted(read) == sorted(backbone.state_dict())
    assert not [
        name for name in read if name.startswith(("transformer_blocks.2", "transformer_blocks.3", "proj_out"))
    ]
    assert {parameter.device.type for parameter in backbone.parameters()} == {"cpu"}


def test_building_allocates_nothing_for_dropped_blocks(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor made while loading, added up: not more than twice what is kept (read, then cast)."""
    made = 0
    original = weights.read_safetensor

    def counting(file: Path, name: str) -> Tensor:
        nonlocal made
        tensor = original(file, name)
        made += tensor.numel()
        return tensor

    monkeypatch.setattr(weights, "read_safetensor", counting)
    real = torch.empty
    allocated = 0

    def watching(*args: object, **kwargs: object) -> Tensor:
        nonlocal allocated
        tensor = real(*args, **kwargs)
        allocated += 0 if tensor.device.type == "meta" else tensor.numel()
        return tensor

    monkeypatch.setattr(torch, "empty", watching)
    architecture = SD3Architecture.from_config(
        {"_class_name": "SD3Transformer2DModel", **read_config(tiny_backbone)}
    )
    parts = load_parts(architecture, 1, from_folder(tiny_backbone / "transformer"))
    assert made == sum(tensor.numel() for tensor in parts.state_dict().values())
    assert allocated == 0


def read_config(folder: Path) -> dict:
    import json

    return json.loads((folder / "transformer" / "config.json").read_text())


def test_shards_and_variants(tiny_backbone: Path, tmp_path: Path, transformer) -> None:
    folder = copy_of(tiny_backbone, tmp_path / "sharded")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB", variant="fp16")
    assert len(list((folder / "transformer").glob("*.fp16*.safetensors"))) > 1
    with pytest.raises(MissingComponentError, match="variant"):
        backbone_of(folder, 3)
    sharded = RewardModel.initialize(folder, num_blocks=3, image_taps=(3,), variant="fp16").backbone
    whole = backbone_of(tiny_backbone, 3, (3,))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor), name
    next((folder / "transformer").glob("*-00001-of-*")).unlink()
    with pytest.raises(CheckpointError, match="shard"):
        RewardModel.initialize(folder, num_blocks=3, image_taps=(3,), variant="fp16")


def test_missing_and_unexpected_weights_are_listed(tiny_backbone: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_backbone, tmp_path / "damaged")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.1.attn.to_q.weight"]
    save_file(state | {"something.else": torch.zeros(1)}, file)
    with pytest.raises(
        CheckpointError, match=r"1 missing: transformer_blocks.1.attn.to_q.weight.*1 unexpected: something"
    ):
        backbone_of(folder, 3)


def test_truncated_base_weights(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_backbone, tmp_path / "damaged")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        backbone_of(folder, 3)


def test_another_kind_of_transformer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="FluxTransformer2DModel"):
        SD3Architecture.from_config({"_class_name": "FluxTransformer2DModel"})


def test_full_size_on_meta_takes_no_memory() -> None:
    parts = empty_parts(SD35_MEDIUM, 12)
    assert {tensor.device.type for tensor in parts.state_dict().values()} == {"meta"}
    assert sum(parameter.numel() for parameter in parts.parameters()) == 1_232_739_840


def test_position_table_is_cropped_in_the_middle(tmp_path: Path) -> None:
    """Height and width are told apart: a latent and its transpose see transposed tables."""
    backbone = backbone_of(tiny_transformer_only(tmp_path), 1, (0,))
    zeros = torch.zeros(1, 16, 8, 12)
    sigma = torch.tensor([0.4])
    conditioning = tiny_conditioning(1)
    wide = backbone(zeros, conditioning, sigma).image[0].reshape(4, 6, -1)
    table = backbone.get_buffer("pos_embed.pos_embed").reshape(12, 12, -1)[4:8, 3:9]
    torch.testing.assert_close(wide - wide[0, 0], table - table[0, 0], atol=1e-5, rtol=0)
