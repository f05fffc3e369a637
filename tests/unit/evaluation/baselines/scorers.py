"""Tiny random models of the published scorers' classes, their files, and what every scorer is asked."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dina_lrm.evaluation.baselines import (
    Scorer,
)
from tests.pictures import noise_picture
from tests.tiny import WORDS, randomize

PROMPTS = ["a red circle", "a blue square above a large green triangle", "two small"]
ROUNDING = 2e-5  # float32 in another order of summation, on scores of the order of 1
SIZE = 28  # of the tiny CLIP's pictures


def draw(height: int, width: int, seed: int) -> Image.Image:
    return noise_picture(seed, width, height)


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


def cropped_by_hand(image: Image.Image) -> Tensor:
    """The middle square of a picture whose shorter side is right already; otherwise resized by PIL first."""
    width, height = image.size
    scale = SIZE / min(width, height)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = np.asarray(image)[top : top + SIZE, left : left + SIZE].astype(np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)


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
