"""Baselines on tiny random networks of the published classes: scores by hand, loading, refusals."""

import base64
import http.server
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dina_lrm.errors import CheckpointError, InvalidInputError, MissingComponentError
from dina_lrm.evaluation.baselines import (
    SCORERS,
    UNIFIED_REWARD,
    VISUAL_QUALITY_R1,
    ClipScore,
    HPSv2,
    HPSv3,
    ImageReward,
    PickScore,
    PixelFusion,
    PixelNetwork,
    RewardScorer,
    Scorer,
    ServerScorer,
    load_scorer,
)
from dina_lrm.evaluation.baselines.open_clip import clip_state_from_open_clip
from dina_lrm.evaluation.baselines.pixels import cropped_pixels, padded_pixels
from dina_lrm.evaluation.baselines.weights import read_state
from tests.tiny import WORDS, make_tiny_reward, randomize

PROMPTS = ["a red circle", "a blue square above a large green triangle", "two small"]
ROUNDING = 2e-5  # float32 in another order of summation, on scores of the order of 1
SIZE = 28  # of the tiny CLIP's pictures


def draw(height: int, width: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [draw(40, 32, 0), draw(33, 61, 1), draw(28, 28, 2)]


def tokenizer(
    start: str, end: str, *, pad: str = "<pad>", extra: tuple[str, ...] = (), length: int = 12
) -> Any:
    """Words of the shapes domain; what it does not know is <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = dict.fromkeys((pad, "<unk>", start, end, *extra))
    vocabulary = {word: index for index, word in enumerate((*names, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if not extra:
        words.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (start, end)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=length,
        pad_token=pad,
        unk_token="<unk>",
        bos_token=start,
        eos_token=end,
        additional_special_tokens=list(extra),
    )


def check_interface(scorer: Any, images: list[Any], tolerance: float = ROUNDING) -> Tensor:
    """What every scorer owes: shape, type, no gradient, same result twice and in any company."""
    assert isinstance(scorer, Scorer)
    scores = scorer.score(PROMPTS, images)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, scorer.score(PROMPTS, images))
    alone = torch.cat([scorer.score([p], [i]) for p, i in zip(PROMPTS, images, strict=True)])
    torch.testing.assert_close(scores, alone, rtol=tolerance, atol=tolerance)
    order = [2, 0, 1]
    shuffled = scorer.score([PROMPTS[i] for i in order], [images[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], rtol=tolerance, atol=tolerance)
    scorer.batch_size = 2
    torch.testing.assert_close(scorer.score(PROMPTS, images), scores, rtol=tolerance, atol=tolerance)
    return scores


# --- CLIP score, PickScore, HPSv2 --------------------------------------------------------------------------


def tiny_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    tokens = tokenizer("<s>", "</s>")
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 12,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 14,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    randomize(model)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    return model


def save_clip_processor(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer("<s>", "</s>").save_pretrained(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    save_clip_processor(folder)
    return folder


def cosine_by_hand(prompt: str, pixels: Tensor) -> float:
    """In float64, one unpadded prompt, tower by tower."""
    model = tiny_clip().double()
    tokens = tokenizer("<s>", "</s>")
    ids = tokens(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids).last_hidden_state[0]
        end = ids[0].tolist().index(tokens.eos_token_id)
        text = model.text_projection.weight @ hidden[end]
        vision = model.vision_model(pixel_values=pixels.double()[None]).pooler_output[0]
        image = model.visual_projection.weight @ vision
        return float(text @ image / (text.square().sum().sqrt() * image.square().sum().sqrt()))


def cropped_by_hand(image: Image.Image) -> Tensor:
    """The middle square of a picture whose shorter side is right already; otherwise resized by PIL first."""
    width, height = image.size
    scale = SIZE / min(width, height)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = np.asarray(image)[top : top + SIZE, left : left + SIZE].astype(np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)


@pytest.fixture(scope="module")
def even_images() -> list[Image.Image]:
    """Sizes whose margins are even, so that no rule of rounding decides where the square is cut."""
    return [draw(56, 64, 0), draw(SIZE, 44, 1), draw(SIZE, SIZE, 2)]


@pytest.mark.parametrize(("kind", "scale"), [(ClipScore, 100.0), (PickScore, math.exp(3.0))])
def test_cosine_scorers_by_hand(
    kind: Any, scale: float, clip_folder: Path, even_images: list[Image.Image]
) -> None:
    scorer = kind.from_pretrained(clip_folder)
    scores = check_interface(scorer, even_images, tolerance=100 * ROUNDING)
    expected = [
        scale * cosine_by_hand(prompt, cropped_by_hand(image))
        for prompt, image in zip(PROMPTS, even_images, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=scale * 1e-5)
    assert len(set(scores.tolist())) == 3


def test_long_prompt_is_cut_not_refused(clip_folder: Path, images: list[Image.Image]) -> None:
    scorer = ClipScore.from_pretrained(clip_folder)
    long = " ".join(["red"] * 40)
    kept = " ".join(["red"] * 10)  # 12 positions, two of them taken by start and end
    assert torch.equal(scorer.score([long], images[:1]), scorer.score([kept], images[:1]))


def test_kinds_of_images_agree(clip_folder: Path, tmp_path: Path, images: list[Image.Image]) -> None:
    scorer = ClipScore.from_pretrained(clip_folder)
    buffer = io.BytesIO()
    images[0].save(buffer, format="PNG")
    images[0].save(tmp_path / "a.png")
    given = [images[0], buffer.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")]
    scores = scorer.score(["a red circle"] * 4, given)
    torch.testing.assert_close(scores, scores[:1].expand(4), rtol=1e-5, atol=1e-4)


def test_no_pairs_no_scores(clip_folder: Path) -> None:
    assert ClipScore.from_pretrained(clip_folder).score([], []).shape == (0,)


def test_pickscore_takes_a_processor_from_elsewhere(
    clip_folder: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    tiny_clip().save_pretrained(tmp_path / "weights")
    save_clip_processor(tmp_path / "processor")
    scorer = PickScore.from_pretrained(tmp_path / "weights", processor=tmp_path / "processor")
    assert torch.equal(
        scorer.score(PROMPTS, images), PickScore.from_pretrained(clip_folder).score(PROMPTS, images)
    )


def to_open_clip(model: Any) -> dict[str, Tensor]:
    """open_clip's names, written the other way round from the code under test."""
    state = model.state_dict()
    moved = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        moved[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        moved[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        moved[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
            for layer in range(2):
                ours, theirs = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
                fused = [state[f"{ours}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
                moved[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(fused)
                moved[f"{theirs}.attn.out_proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
                moved[f"{theirs}.ln_1.{kind}"] = state[f"{ours}.layer_norm1.{kind}"]
                moved[f"{theirs}.ln_2.{kind}"] = state[f"{ours}.layer_norm2.{kind}"]
                moved[f"{theirs}.mlp.c_fc.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
                moved[f"{theirs}.mlp.c_proj.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
    return moved


@pytest.fixture(scope="module")
def pixel_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoImageProcessor

    network = PixelFusion(tiny_clip(), width=16, num_layers=2, num_heads=2)
    randomize(network.fusion)
    folder = tmp_path_factory.mktemp("pixel")
    processor = AutoImageProcessor.from_pretrained(clip_folder)
    PixelNetwork(network, tokenizer("<s>", "</s>"), processor).save_pretrained(folder)
    return folder


def test_pixel_network_by_hand(pixel_folder: Path, images: list[Image.Image]) -> None:
    """In float64, one unpadded prompt at a time, the fusion's transformer written out."""
    scorer = load_scorer("pixel-network", location=pixel_folder)
    scores = check_interface(scorer, images)
    network = PixelNetwork.from_pretrained(pixel_folder).network.double()
    fusion = network.fusion
    for prompt, image, score in zip(PROMPTS, images, scores.tolist(), strict=True):
        ids = tokenizer("<s>", "</s>")(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            pixels = scorer.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            seen = network.clip.vision_model(pixel_values=pixels.double())
            read = network.clip.text_model(input_ids=ids)
            x = torch.cat(
                [
                    fusion.kind[:1],
                    fusion.project_image(seen.last_hidden_state[0]) + fusion.kind[1],
                    fusion.project_text(read.last_hidden_state[0]) + fusion.kind[2],
                ]
            )
            for layer in fusion.layers.layers:
                y = layer.norm1(x)
                q, k, v = (y @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(
                    3, dim=1
                )
                heads = [
                    torch.softmax(a @ b.T / math.sqrt(8), dim=1) @ c
                    for a, b, c in zip(q.split(8, 1), k.split(8, 1), v.split(8, 1), strict=True)
                ]
                x = x + layer.self_attn.out_proj(torch.cat(heads, dim=1))
                x = x + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm2(x))))
            by_hand = float(fusion.score(fusion.norm(x[0])))
        assert score == pytest.approx(by_hand, abs=1e-4, rel=1e-4)


def test_pixel_network_refuses_what_is_not_there(
    clip_folder: Path, pixel_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"needs a folder that holds fusion\.json"):
        load_scorer("pixel-network", location=clip_folder)
    with pytest.raises(CheckpointError, match=r"needs a folder that holds fusion\.json.* got None"):
        load_scorer("pixel-network")
    shutil.copytree(pixel_folder, tmp_path / "copy")
    state = read_state(pixel_folder / "fusion.safetensors")
    state.pop("kind")
    save_file(state, tmp_path / "copy" / "fusion.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: kind"):
        load_scorer("pixel-network", location=tmp_path / "copy")


def test_open_clip_there_and_back() -> None:
    model = tiny_clip()
    back = clip_state_from_open_clip(to_open_clip(model) | {"attn_mask": torch.zeros(12, 12)})
    assert back.keys() == model.state_dict().keys()
    other = tiny_clip()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(back)
    ids = torch.tensor([[2, 5, 6, 3]])
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image
        assert torch.equal(other(input_ids=ids, pixel_values=pixels).logits_per_image, expected)


def test_fused_attention_is_also_what_torch_computes() -> None:
    """open_clip's block is torch's own attention: an independent reading of in_proj_weight."""
    model = tiny_clip()
    state = to_open_clip(model)
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    prefix = "visual.transformer.resblocks.1.attn."
    attention.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = attention(hidden, hidden, hidden, need_weights=False)[0]
        found = model.vision_model.encoder.layers[1].self_attn(hidden_states=hidden, attention_mask=None)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["visual.trunk.blocks.0.norm.weight", "transformer.resblocks.0.ls_1.gamma"])
def test_open_clip_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not the weights of an open_clip ViT: " + name):
        clip_state_from_open_clip({name: torch.zeros(1)})


@pytest.fixture
def hpsv2_folder(tmp_path: Path) -> Path:
    model = tiny_clip()
    model.config.save_pretrained(tmp_path)
    save_clip_processor(tmp_path)
    torch.save({"state_dict": to_open_clip(model)}, tmp_path / "HPS_v2.1_compressed.pt")
    return tmp_path


def test_hpsv2_by_hand(hpsv2_folder: Path, images: list[Image.Image]) -> None:
    scorer = HPSv2.from_pretrained(hpsv2_folder)
    scores = check_interface(scorer, images)
    pixels = padded_pixels(images, SIZE)
    expected = [cosine_by_hand(prompt, one) for prompt, one in zip(PROMPTS, pixels, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    from_file = HPSv2.from_pretrained(hpsv2_folder / "HPS_v2.1_compressed.pt", processor=hpsv2_folder)
    assert torch.equal(from_file.score(PROMPTS, images), scores)


def test_hpsv2_refuses_what_does_not_fit(hpsv2_folder: Path) -> None:
    path = hpsv2_folder / "HPS_v2.1_compressed.pt"
    state = read_state(path)
    del state["visual.proj"]
    state["ln_final.bias"] = torch.zeros(7)
    torch.save(state, path)
    message = (
        r"1 missing: visual_projection.weight; 1 of another shape: .*final_layer_norm.bias \(7,\) for \(24,\)"
    )
    with pytest.raises(CheckpointError, match=message):
        HPSv2.from_pretrained(hpsv2_folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no HPS_v2\.1_compressed\.pt"):
        HPSv2.from_pretrained(hpsv2_folder)


class Trap:
    """What a pickle would run."""


def test_no_pickled_object_is_loaded(hpsv2_folder: Path) -> None:
    path = hpsv2_folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(CheckpointError, match="cannot load weights from"):
        HPSv2.from_pretrained(hpsv2_folder)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        HPSv2.from_pretrained(hpsv2_folder)


# --- pixels ------------------------------------------------------------------------------------------------


def test_padded_pixels_fit_the_longer_side_between_black_bars() -> None:
    white = Image.new(
        "RGB", (80, 20), (255, 255, 255)
    )  # scale 1/2: 10 rows of white, 15 black above, 15 below
    (pixels,) = padded_pixels([white], 40)
    restored = pixels[0] * 0.26862954 + 0.48145466
    expected = torch.zeros(40, 40)
    expected[15:25] = 1
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


def test_cropped_pixels_are_the_middle_square() -> None:
    image = draw(SIZE, SIZE + 10, 3)
    (pixels,) = cropped_pixels([image], SIZE)
    torch.testing.assert_close(pixels.double(), cropped_by_hand(image), rtol=0, atol=1e-6)
    tall = draw(3 * SIZE, 2 * SIZE, 4)
    (pixels,) = cropped_pixels([tall], SIZE)
    torch.testing.assert_close(pixels.double(), cropped_by_hand(tall), rtol=0, atol=1e-6)


# --- ImageReward -------------------------------------------------------------------------------------------

MED_CONFIG = {
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 768,
    "model_type": "bert",
}


def bert() -> Any:
    return tokenizer("[CLS]", "[SEP]", pad="[PAD]", length=512)


def tiny_blip() -> tuple[Any, Any, nn.Sequential]:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
    )
    text_settings = {
        name: value for name, value in MED_CONFIG.items() if name not in ("encoder_width", "model_type")
    }
    text = BlipTextModel(
        BlipTextConfig(**text_settings, vocab_size=len(bert()), encoder_hidden_size=128, is_decoder=True),
        add_pooling_layer=False,
    )
    widths = (36, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    head = nn.Sequential(*layers)
    for seed, module in enumerate((vision, text, head)):
        randomize(module, seed)
    return vision.eval(), text.eval(), head.eval()


def published_image_reward() -> dict[str, Tensor]:
    """timm's names for the vision tower, the same ones for the text encoder, head layers 0, 2, 4, 6, 7."""
    vision, text, head = tiny_blip()
    state = {
        "blip.vision_proj.weight": torch.zeros(2, 2),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
    }
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "post_layernorm.": "norm.",
        "encoder.layers.": "blocks.",
        ".layer_norm": ".norm",
        ".self_attn.projection.": ".attn.proj.",
        ".self_attn.qkv.": ".attn.qkv.",
    }
    for name, value in vision.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"blip.visual_encoder.{name}"] = value
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    for layer, number in zip(head, (0, 2, 4, 6, 7), strict=True):
        state[f"mlp.layers.{number}.weight"] = layer.weight.detach()
        state[f"mlp.layers.{number}.bias"] = layer.bias.detach()
    return state


@pytest.fixture
def image_reward_folder(tmp_path: Path) -> Path:
    torch.save(published_image_reward(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG), encoding="utf-8")
    bert().save_pretrained(tmp_path)
    return tmp_path


def test_image_reward_by_hand(image_reward_folder: Path, images: list[Image.Image]) -> None:
    scorer = ImageReward.from_pretrained(image_reward_folder)
    scores = check_interface(scorer, images)
    vision, text, head = (module.double() for module in tiny_blip())
    expected = []
    with torch.no_grad():
        for prompt, pixels in zip(PROMPTS, cropped_pixels(images, 32), strict=True):
            seen = vision(pixel_values=pixels.double()[None]).last_hidden_state
            ids = bert()(prompt, return_tensors="pt")["input_ids"]  # neither padded nor masked
            value = text(input_ids=ids, encoder_hidden_states=seen).last_hidden_state[0, 0]
            for layer in head:
                value = layer.weight @ value + layer.bias
            expected.append((float(value) - 0.16717362830052426) / 1.0333394966054072)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_image_reward_reads_35_tokens(image_reward_folder: Path, images: list[Image.Image]) -> None:
    scorer = ImageReward.from_pretrained(image_reward_folder)
    prompts = [" ".join(["red"] * count) for count in (32, 33, 60)]  # and [CLS] and [SEP]
    fewer, full, cut = scorer.score(prompts, images[:1] * 3).tolist()
    assert full == pytest.approx(cut, abs=1e-5)
    assert fewer != pytest.approx(full, abs=1e-3)


def test_image_reward_refuses_what_does_not_fit(image_reward_folder: Path) -> None:
    path = image_reward_folder / "ImageReward.pt"
    whole = published_image_reward()
    lacking = {name: value for name, value in whole.items() if name != "mlp.layers.7.bias"}
    torch.save(lacking, path)
    with pytest.raises(CheckpointError, match=r"\(head\) do not fit: 1 missing: 7\.bias"):
        ImageReward.from_pretrained(image_reward_folder)
    torch.save(whole | {"blip.visual_encoder.rel_pos": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"names unknown to ImageReward: blip\.visual_encoder\.rel_pos"):
        ImageReward.from_pretrained(image_reward_folder)
    torch.save({}, path)
    with pytest.raises(CheckpointError, match="vision tower's sizes"):
        ImageReward.from_pretrained(image_reward_folder)
    torch.save(whole, path)
    (image_reward_folder / "med_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="text encoder lacks hidden_size"):
        ImageReward.from_pretrained(image_reward_folder)
    (image_reward_folder / "med_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no med_config\.json"):
        ImageReward.from_pretrained(image_reward_folder)


# --- HPSv3 -------------------------------------------------------------------------------------------------

INSTRUCTION = "look at the two circle\nprompt {text_prompt}\n\nand <|Reward|>\n\nabove\n"
QWEN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def qwen_tokenizer() -> Any:
    return tokenizer("<s>", "</s>", extra=QWEN_TOKENS, length=4096)


def tiny_qwen() -> tuple[Any, nn.Sequential]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokens = qwen_tokenizer()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokens) + 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "pad_token_id": tokens.pad_token_id,
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
        **{
            f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{text}|>")
            for name, text in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    head = nn.Sequential(
        nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    ).eval()
    randomize(model)
    randomize(head)
    return model, head


def published_hpsv3() -> dict[str, Tensor]:
    model, head = tiny_qwen()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state | {f"rm_head.{name}": value for name, value in head.state_dict().items()}


def save_tiny_hpsv3(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = tiny_qwen()
    model.config.save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}), encoding="utf-8"
    )
    (folder / "instruction.txt").write_text(INSTRUCTION, encoding="utf-8")
    save_file(published_hpsv3(), folder / "HPSv3.safetensors")


@pytest.fixture(scope="module")
def hpsv3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    save_tiny_hpsv3(folder)
    return folder


def hpsv3_by_hand(prompt: str, image: Image.Image, size: tuple[int, int]) -> float:
    """One pair, in float64: embeddings with the picture put in, the language model alone, the head."""
    model, head = (module.double() for module in tiny_qwen())
    tokens = qwen_tokenizer()
    tokens.add_tokens(["<|Reward|>"], special_tokens=True)
    pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    pixels = (pixels - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    rows, columns = size[0] // 14, size[1] // 14
    # rows of 14 x 14 patches, 2 x 2 neighbours next to each other, the picture twice as two frames
    blocks = pixels.reshape(rows // 2, 2, 14, columns // 2, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = np.repeat(blocks.reshape(rows * columns, 3, 1, 14, 14), 2, axis=2).reshape(rows * columns, -1)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (rows * columns // 4)
        + "<|vision_end|>"
        + INSTRUCTION.replace("{text_prompt}", prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokens(text, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        embedded = model.model.language_model.embed_tokens(ids)
        seen = model.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor([[1, rows, columns]]))
        embedded[ids == model.config.image_token_id] = seen.pooler_output
        hidden = model.model.language_model(inputs_embeds=embedded[None]).last_hidden_state[0]
        (at,) = (ids == tokens.convert_tokens_to_ids("<|Reward|>")).nonzero().flatten().tolist()
        mu, _ = head(hidden[at]).tolist()
    return mu


def test_hpsv3_by_hand(hpsv3_folder: Path, images: list[Image.Image]) -> None:
    scorer = HPSv3.from_pretrained(hpsv3_folder)
    scores = check_interface(scorer, images)
    # About 200,704 pixels in multiples of 28: sqrt(200704 / (40 * 32)) = 12.52, so 500.9 x 400.7, rounded up
    sizes = [(504, 420), (336, 616), (448, 448)]
    expected = [
        hpsv3_by_hand(prompt, image, size) for prompt, image, size in zip(PROMPTS, images, sizes, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert len(set(scores.tolist())) == 3


def test_hpsv3_reads_names_of_older_transformers(
    hpsv3_folder: Path, tmp_path: Path, images: list[Any]
) -> None:
    state = published_hpsv3()
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in state.items()
    }
    assert "visual.patch_embed.proj.weight" in older
    save_file(older, tmp_path / "HPSv3.safetensors")
    other = HPSv3.from_pretrained(
        tmp_path / "HPSv3.safetensors", backbone=hpsv3_folder, instruction=INSTRUCTION
    )
    assert torch.equal(
        other.score(PROMPTS[:1], images[:1]),
        HPSv3.from_pretrained(hpsv3_folder).score(PROMPTS[:1], images[:1]),
    )


def test_hpsv3_refuses_what_does_not_fit(hpsv3_folder: Path, tmp_path: Path) -> None:
    def load(state: dict[str, Tensor], instruction: str | None = INSTRUCTION) -> HPSv3:
        save_file(state, tmp_path / "HPSv3.safetensors")
        return HPSv3.from_pretrained(tmp_path, backbone=hpsv3_folder, instruction=instruction)

    state = published_hpsv3()
    with pytest.raises(CheckpointError, match=r"has no instruction\.txt"):
        load(state, None)
    with pytest.raises(InvalidInputError, match=r"must hold <\|Reward\|> once, not 0x"):
        load(state, "{text_prompt}")
    with pytest.raises(CheckpointError, match=r"rm_head\) do not fit: 1 missing: 5\.bias"):
        load({name: value for name, value in state.items() if name != "rm_head.5.bias"})
    with pytest.raises(CheckpointError, match=r"1 missing: language_model\.norm\.weight"):
        load({name: value for name, value in state.items() if name != "model.language_model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"names unknown to HPSv3: value_head\.weight"):
        load(state | {"value_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no token embeddings"):
        load({"rm_head.0.bias": torch.zeros(1024)})
    table = "model.language_model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match="tokenizer does not belong to the weights"):
        load(state | {table: state[table][:-1].clone()})


def test_hpsv3_refuses_prompts_and_pictures_it_cannot_read(hpsv3_folder: Path, images: list[Any]) -> None:
    scorer = HPSv3.from_pretrained(hpsv3_folder)
    with pytest.raises(InvalidInputError, match=r"must not hold <\|Reward\|>"):
        scorer.score(["red <|Reward|>"], images[:1])
    with pytest.raises(InvalidInputError, match="too narrow for HPSv3"):
        scorer.score(["red"], [Image.new("RGB", (402, 2))])


# --- what all refuse ---------------------------------------------------------------------------------------


@pytest.fixture
def scorers(clip_folder: Path, image_reward_folder: Path, hpsv3_folder: Path) -> list[Any]:
    return [
        ClipScore.from_pretrained(clip_folder),
        ImageReward.from_pretrained(image_reward_folder),
        HPSv3.from_pretrained(hpsv3_folder),
        ServerScorer("http://127.0.0.1:9", "none", UNIFIED_REWARD, num_retries=0),
    ]


def test_bad_input_is_named(scorers: list[Any], tmp_path: Path, images: list[Image.Image]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    half = tmp_path / "half.png"
    images[0].save(half)
    half.write_bytes(half.read_bytes()[:500])
    for scorer in scorers:
        with pytest.raises(InvalidInputError, match="2 prompts for 3 images"):
            scorer.score(PROMPTS[:2], images)
        with pytest.raises(InvalidInputError, match="prompt 1 must be a non-empty string, not '  '"):
            scorer.score(["red", "  "], images[:2])
        with pytest.raises(InvalidInputError, match="prompts must be a list"):
            scorer.score("red", images[:1])
        with pytest.raises(InvalidInputError, match=r"image 0: unreadable image: .*broken\.png"):
            scorer.score(["red"], [broken])
        with Image.open(half) as lazy, pytest.raises(InvalidInputError, match=r"image 0: .*truncated"):
            scorer.score(["red"], [lazy])
        with pytest.raises(InvalidInputError, match=r"image 0: missing file: .*none\.png"):
            scorer.score(["red"], [str(tmp_path / "none.png")])
        with pytest.raises(InvalidInputError, match="image 0 is a Tensor"):
            scorer.score(["red"], [torch.zeros(3, 4, 4)])


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_missing_file_in_a_folder(file: str, tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path)
    save_clip_processor(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"from {tmp_path}"):
        ClipScore.from_pretrained(tmp_path)


def test_missing_weights_are_never_left_random(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path)
    save_clip_processor(tmp_path)
    state = read_state(tmp_path / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of CLIPModel: text_projection\.weight"):
        ClipScore.from_pretrained(tmp_path)


def test_nothing_at_the_location(tmp_path: Path) -> None:
    for kind in (ClipScore, ImageReward):
        with pytest.raises(CheckpointError, match="there is nothing at"):
            kind.from_pretrained(tmp_path / "none")


# --- servers -----------------------------------------------------------------------------------------------


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers with the next of `plan` (status, reply text), then by the picture: its red share, 1 to 5."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.plan: list[tuple[int, str]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.paths.append(self.path)
        status, reply = self.server.plan.pop(0) if self.server.plan else (200, self._judge(body))
        if status == 0:  # hang up without a word
            self.connection.close()
            return
        if status == 200 and not reply.startswith("{"):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply.encode())))
        self.end_headers()
        self.wfile.write(reply.encode())

    def _judge(self, body: dict[str, Any]) -> str:
        red = np.asarray(sent_image(body))[..., 0].mean() / 255
        return f"It shows 2 things.\n**Final Score:** {1 + 4 * red:.2f}"

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def sent_image(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def asking(server: FakeServer, **settings: Any) -> ServerScorer:
    return ServerScorer(server.address, "judge-7b", UNIFIED_REWARD, **{"backoff_seconds": 0.0} | settings)


def test_server_is_asked_about_each_pair_in_order(server: FakeServer) -> None:
    reds = [Image.new("RGB", (4, 3), (51 * level, 0, 0)) for level in range(6)]
    prompts = [f"{level} {{prompt}}" for level in range(6)]
    scorer = asking(server, concurrency=3)
    assert isinstance(scorer, Scorer)
    scores = scorer.score(prompts, reds)
    assert scores.tolist() == pytest.approx([1, 1.8, 2.6, 3.4, 4.2, 5])
    assert scores.dtype == torch.float32
    assert set(server.paths) == {"/v1/chat/completions"}
    for body in server.requests:
        level = round(np.asarray(sent_image(body))[0, 0, 0] / 51)
        assert body["model"] == "judge-7b"
        assert body["temperature"] == 0
        assert body["messages"][0]["content"][1]["text"].endswith(f"Caption: {level} {{prompt}}")
        assert sent_image(body).size == (4, 3)
    assert "Authorization" not in server.headers[0]


def test_address_with_v1_and_key(server: FakeServer) -> None:
    scorer = ServerScorer(f"{server.address}/v1/", "m", UNIFIED_REWARD, api_key="secret")
    scorer.score(["red"], [Image.new("RGB", (2, 2))])
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_server_is_asked_again_when_it_is_busy_or_hangs_up(server: FakeServer) -> None:
    server.plan = [(429, "slow down"), (503, "loading"), (0, ""), (200, "Final Score: 3.5")]
    assert asking(server).score(["red"], [Image.new("RGB", (2, 2))]).tolist() == [3.5]
    assert len(server.requests) == 4


def test_retries_end(server: FakeServer) -> None:
    server.plan = [(500, "out of memory")] * 9
    with pytest.raises(MissingComponentError, match=r"in 3 attempts, last: HTTP 500 'out of memory'"):
        asking(server, num_retries=2).score(["red"], [Image.new("RGB", (2, 2))])
    assert len(server.requests) == 3


def test_nobody_listens() -> None:
    scorer = ServerScorer("http://127.0.0.1:9", "m", UNIFIED_REWARD, num_retries=1, backoff_seconds=0.0)
    with pytest.raises(MissingComponentError, match=r"no answer from http://127\.0\.0\.1:9/v1"):
        scorer.score(["red"], [Image.new("RGB", (2, 2))])


def test_a_refusal_is_not_repeated(server: FakeServer) -> None:
    server.plan = [(404, "no such model")]
    with pytest.raises(InvalidInputError, match="refused the request: HTTP 404 'no such model'"):
        asking(server).score(["red"], [Image.new("RGB", (2, 2))])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("I cannot judge 2 cats.", "no score in the reply 'I cannot judge 2 cats.'"),
        ("Final Score: 7", r"7 is not in \[1, 5\] in the reply 'Final Score: 7'"),
        ("", "no score in the reply ''"),
        ('{"error": "none"}', 'sent no chat completion but \'{"error": "none"}\''),
        ('{"choices": [{"message": {"content": null}}]}', "sent no chat completion"),
    ],
)
def test_reply_without_a_score_is_quoted(server: FakeServer, reply: str, message: str) -> None:
    server.plan = [(200, reply)]
    with pytest.raises(InvalidInputError, match=message):
        asking(server).score(["red"], [Image.new("RGB", (2, 2))])


def test_long_replies_are_quoted_in_part() -> None:
    with pytest.raises(InvalidInputError, match=r"a \.\.\.'$"):
        UNIFIED_REWARD.read("a" * 1000)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Final Score: 4", 4.0),
        ("final score:**3.25**", 3.25),
        ("I would say Final Score: 2, no: Final Score: 3", 3.0),
        ("<think>Final Score: 1</think> Final Score: 5", 5.0),
        (" 2.5\n", 2.5),
    ],
)
def test_reading_a_reply(reply: str, score: float) -> None:
    assert UNIFIED_REWARD.read(reply) == score


def test_visual_quality_asks_without_the_prompt(server: FakeServer) -> None:
    server.plan = [(200, "<think>3 or 4?</think>\n<answer> 3.75 </answer>")]
    scorer = load_scorer("visualquality-r1", location=server.address, model="vq")
    assert scorer.name == VISUAL_QUALITY_R1.name
    assert scorer.score(["a very special prompt"], [Image.new("RGB", (2, 2))]).tolist() == [3.75]
    assert "special" not in json.dumps(server.requests)


def test_own_question(server: FakeServer) -> None:
    server.plan = [(200, "4")]
    scorer = load_scorer("unified-reward", location=server.address, model="u", template="How is {prompt}?")
    assert scorer.score(["tea"], [Image.new("RGB", (2, 2))]).tolist() == [4.0]
    assert server.requests[0]["messages"][0]["content"][1]["text"] == "How is tea?"


def test_server_settings_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="base_url must start with http"):
        ServerScorer("file:///etc/passwd", "m", UNIFIED_REWARD)
    with pytest.raises(InvalidInputError, match="concurrency = 0 must be at least 1"):
        ServerScorer("http://a", "m", UNIFIED_REWARD, concurrency=0)
    with pytest.raises(InvalidInputError, match="unified-reward runs on a server"):
        load_scorer("unified-reward", model="m")


# --- our own reward, and the registry ----------------------------------------------------------------------


def test_reward_scorer_is_the_reward_model(tiny_pipeline: Path, images: list[Image.Image]) -> None:
    model = make_tiny_reward(tiny_pipeline)
    scorer = RewardScorer(model, noise_levels=[0.2, 0.6], seed=3)
    prompts = ["a red circle", "a blue square", "two small circle"]
    scores = scorer.score(prompts, images)
    expected = [
        float(model.score(prompt, image, noise_levels=[0.2, 0.6], seed=3, allow_untrained=True).scores)
        for prompt, image in zip(prompts, images, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_dina_by_name() -> None:
    scorer = load_scorer("dina", noise_levels=[0.4], seed=1)
    prompts, pictures = (
        ["a red circle on a gray background"] * 2,
        [draw(64, 64, 0), Image.new("RGB", (64, 64))],
    )
    scores = scorer.score(prompts, pictures)
    assert isinstance(scorer, RewardScorer)
    expected = scorer.model.score(prompts, pictures, noise_levels=[0.4], seed=1).scores
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-5)


def test_half_precision_is_near(
    clip_folder: Path, image_reward_folder: Path, hpsv3_folder: Path, images: list[Image.Image]
) -> None:
    """bfloat16 has 8 bits: a relative error of 0.004 a rounding, over a handful of layers."""
    folders = {"clip-score": clip_folder, "imagereward": image_reward_folder, "hpsv3": hpsv3_folder}
    for name, folder in folders.items():
        half, full = (
            load_scorer(name, location=folder, dtype=dtype).score(PROMPTS, images)
            for dtype in (torch.bfloat16, torch.float32)
        )
        torch.testing.assert_close(half, full, rtol=0.1, atol=5.0 if name == "clip-score" else 0.1)
        assert not torch.equal(half, full)


def test_registry(clip_folder: Path, hpsv2_folder: Path, images: list[Image.Image]) -> None:
    assert list(SCORERS) == [
        "clip-score",
        "pickscore",
        "hpsv2",
        "imagereward",
        "hpsv3",
        "unified-reward",
        "visualquality-r1",
        "pixel-network",
        "dina",
    ]
    for name, folder in (("clip-score", clip_folder), ("pickscore", clip_folder), ("hpsv2", hpsv2_folder)):
        scorer = load_scorer(name, location=str(folder), batch_size=2)
        assert scorer.name == name
        assert scorer.score(PROMPTS, images).shape == (3,)
    with pytest.raises(InvalidInputError, match="unknown scorer 'mps'; known: clip-score, pickscore"):
        load_scorer("mps")


def test_import_is_light() -> None:
    code = (
        "import sys, dina_lrm.evaluation.baselines;"
        "assert not {'transformers', 'torchvision'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
