"""HPSv3 from its published files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.evaluation.baselines import (
    HPSv3,
)
from tests.unit.evaluation.baselines.scorers import (
    INSTRUCTION,
    PROMPTS,
    check_interface,
    published_hpsv3,
    qwen_tokenizer,
    tiny_qwen,
)


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
    with pytest.raises(InvalidInputError, match=r"<\|Reward\|> once.* 0x"):
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
    with pytest.raises(CheckpointError, match=r"tokenizer .*weights"):
        load(state | {table: state[table][:-1].clone()})


def test_hpsv3_refuses_prompts_and_pictures_it_cannot_read(hpsv3_folder: Path, images: list[Any]) -> None:
    scorer = HPSv3.from_pretrained(hpsv3_folder)
    with pytest.raises(InvalidInputError, match=r"must not hold <\|Reward\|>"):
        scorer.score(["red <|Reward|>"], images[:1])
    with pytest.raises(InvalidInputError, match="too narrow for HPSv3"):
        scorer.score(["red"], [Image.new("RGB", (402, 2))])
