"""HPSv3: Qwen2-VL reads an instruction about the picture, and a head on one token gives mean and spread."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dina_lrm.core.tensors import Score
from dina_lrm.errors import CheckpointError, InvalidInputError
from dina_lrm.evaluation.baselines.scorer import score_in_batches
from dina_lrm.evaluation.baselines.weights import (
    check_names,
    fill,
    load_part,
    loading,
    own_or,
    read_state,
    weights_file,
)

__all__ = ["HPSv3"]

_REWARD, _IMAGE = "<|Reward|>", "<|image_pad|>"
_PROMPT = "{text_prompt}"
_NUM_PIXELS = 256 * 28 * 28
"""Lower and upper limit at once: every picture is brought to about this size."""
_MAX_ASPECT = 200
_HEAD_WIDTHS = (1024, 16)
_QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{instruction}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""Qwen2-VL's chat template, written out for one picture and one text."""


class HPSv3:
    """mu of (mu, sigma), the head's output at the token <|Reward|> (arXiv:2508.03789).

    Token positions simply count up, for pictures too: the published model hands embeddings to the language
    model without the picture grids from which Qwen2-VL would derive its three-axis positions.

    Args:
        model: transformers' `Qwen2VLModel`, its vocabulary holding <|Reward|>.
        head: (batch, width) to (batch, 2), float32.
        tokenizer: Qwen2-VL's; <|Reward|> is added behind its last token.
        image_processor: Qwen2-VL's.
        instruction: the text around the prompt, with {text_prompt} and <|Reward|> once each.
        batch_size: pairs per forward pass; no effect on scores.
    """

    name = "hpsv3"

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        tokenizer: Any,
        image_processor: Any,
        instruction: str,
        *,
        batch_size: int = 4,
    ) -> None:
        for part in (_PROMPT, _REWARD):
            if instruction.count(part) != 1:
                raise InvalidInputError(
                    f"the instruction must hold {part} once, not {instruction.count(part)}x"
                )
        self.model = model.eval()
        self.head = head.eval()
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.instruction = instruction
        self.batch_size = batch_size
        tokenizer.add_tokens([_REWARD], special_tokens=True)
        tokenizer.padding_side = "right"
        self.reward_id, self.image_id = (tokenizer.convert_tokens_to_ids(name) for name in (_REWARD, _IMAGE))
        rows = model.get_input_embeddings().num_embeddings
        if self.reward_id >= rows or self.image_id != model.config.image_token_id:
            raise CheckpointError(
                f"the tokenizer does not belong to the weights: {_REWARD} is {self.reward_id} of {rows} "
                f"rows, {_IMAGE} is {self.image_id}, in the config {model.config.image_token_id}"
            )

    @classmethod
    def from_pretrained(
        cls,
        location: str | Path = "MizzenAI/HPSv3",
        *,
        backbone: str | Path | None = None,
        instruction: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 4,
    ) -> "HPSv3":
        """From HPSv3.safetensors in a folder or on the hub.

        Args:
            backbone: folder or hub id for config, tokenizer and image processor; None: the folder's own, else
                Qwen/Qwen2-VL-7B-Instruct.
            instruction: the published text (INSTRUCTION and prompt_with_special_token, joined, of
                hpsv3/dataset/data_collator_qwen.py in MizzenAI/HPSv3), which is not in the weights and not in
                this package; None: read from instruction.txt in the folder.
            dtype: of the backbone; published in bfloat16. The head is float32.

        Raises:
            CheckpointError: a part is missing or damaged, or the tensors are not HPSv3's.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLModel

        if instruction is None:
            file = Path(location) / "instruction.txt"
            if not file.is_file():
                raise CheckpointError(
                    f"{location} has no instruction.txt: HPSv3 scores by a text that is published with its "
                    f"code; put it there or pass instruction=..."
                )
            instruction = file.read_bytes().decode("utf-8")  # every blank and line end counts
        path = weights_file(location, "HPSv3.safetensors")
        if backbone is None:
            backbone = own_or(location, "config.json", "Qwen/Qwen2-VL-7B-Instruct")
        backbone_state, head_state = split_state(read_state(path), str(path))
        config = load_part(AutoConfig, backbone)
        embeddings = backbone_state.get("language_model.embed_tokens.weight")
        if embeddings is None:
            raise CheckpointError(f"weights in {path} do not fit: no token embeddings")
        config.text_config.vocab_size = embeddings.shape[
            0
        ]  # the published one is cut to the tokenizer, plus 1
        with torch.device("meta"):
            expected = Qwen2VLModel(config).state_dict()
        check_names(expected, backbone_state, str(path))
        with loading(
            "Qwen2VLModel", str(path)
        ):  # through transformers, which skips drawing 7e9 random numbers
            model: Any = Qwen2VLModel.from_pretrained(
                None, config=config, state_dict=backbone_state, dtype=dtype
            )
        head = reward_head(config.text_config.hidden_size)
        fill(head, head_state, f"{path} (rm_head)")
        return cls(
            model.to(device),
            head.to(device),
            load_part(AutoTokenizer, backbone),
            load_part(AutoImageProcessor, backbone),
            instruction,
            batch_size=batch_size,
        )

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """See `Scorer.score`.

        Raises:
            InvalidInputError: also for a prompt with <|Reward|> or <|image_pad|> in it.
        """
        return score_in_batches(prompts, images, self._score_batch, batch_size=self.batch_size)

    def _score_batch(self, prompts: list[str], images: list[Image.Image]) -> Tensor:
        device = self.model.device
        pictures = self.image_processor(
            images=[_sized(image) for image in images], do_resize=False, return_tensors="pt"
        )
        grids = pictures["image_grid_thw"]
        merged = self.image_processor.merge_size**2
        texts = [
            self._question(prompt, int(grid.prod()) // merged)
            for prompt, grid in zip(prompts, grids, strict=True)
        ]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        ids = tokens["input_ids"]
        positions = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        hidden = self.model(
            input_ids=ids,
            attention_mask=tokens["attention_mask"],
            position_ids=positions,
            pixel_values=pictures["pixel_values"].to(device),
            image_grid_thw=grids.to(device),
            use_cache=False,
        ).last_hidden_state
        at_reward = hidden[ids == self.reward_id]
        return self.head(at_reward.float())[:, 0].cpu()

    def _question(self, prompt: str, num_image_tokens: int) -> str:
        for token in (_REWARD, _IMAGE):
            if token in prompt:
                raise InvalidInputError(f"a prompt must not hold {token}: {prompt!r}")
        question = _QUESTION.replace("{instruction}", self.instruction).replace(_PROMPT, prompt)
        return question.replace(_IMAGE, _IMAGE * num_image_tokens)


def reward_head(width: int) -> nn.Sequential:
    """width-1024-16-2 with ReLU; the published layer 2 is dropout."""
    first, second = _HEAD_WIDTHS
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 2),
    )


def split_state(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors as those of `Qwen2VLModel`, and the head's.

    Both ways transformers has named Qwen2-VL are read: `model.layers.*` and `visual.*` before 4.52,
    `model.language_model.*` and `model.visual.*` since.

    Raises:
        CheckpointError: names that HPSv3 does not have.
    """
    backbone: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        inner = name.removeprefix("model.")
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = tensor
        elif inner.startswith(("language_model.", "visual.")):
            backbone[inner] = tensor
        elif name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            backbone[f"language_model.{inner}"] = tensor
        elif not name.startswith("lm_head."):  # words are never predicted
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{source} has names unknown to HPSv3: {', '.join(sorted(unknown)[:5])}")
    return backbone, head


def _sized(image: Image.Image) -> Image.Image:
    """About 256 x 28 x 28 pixels, both sides multiples of 28 (PIL bicubic), as qwen_vl_utils does."""
    width, height = image.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise InvalidInputError(f"a picture of {height} x {width} pixels is too narrow for HPSv3")
    sides = [max(28, round(side / 28) * 28) for side in (width, height)]
    if math.prod(sides) != _NUM_PIXELS:
        shrink = math.prod(sides) > _NUM_PIXELS
        scale = math.sqrt(_NUM_PIXELS / (width * height))
        to_whole = math.floor if shrink else math.ceil
        sides = [max(28, to_whole(side * scale / 28) * 28) for side in (width, height)]
    return image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
