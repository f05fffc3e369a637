"""One clear error, or a warning that says what was done, for each thing a user can get wrong."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm import (
    CheckpointError,
    Conditioning,
    InvalidInputError,
    MissingComponentError,
    PromptWarning,
    RewardModel,
)
from dina_lrm.backbones.prompts import check_prompts, prompt_list
from dina_lrm.models.scoring import whole_number
from tests.tiny import MAX_TOKENS, PROMPT, copy_of, make_tiny_reward, tiny_conditioning, tiny_latents


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> RewardModel:
    return make_tiny_reward(tiny_pipeline).requires_grad_(False)


def spoiled(value: float) -> torch.Tensor:
    latents = tiny_latents()
    latents[1, 2, 3, 4] = value
    return latents


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(3, 4, 8, 8), "4 channels, this sd3 backbone takes 16"),
        (torch.zeros(3, 16, 7, 8), "latents of 8x7: width and height must be multiples of 2"),
        (torch.zeros(3, 16, 8, 26), "26x8 exceed the position table: at most 24 a side"),
        (spoiled(float("nan")), "1 NaN or infinite"),
        (spoiled(float("inf")), "1 NaN or infinite"),
        (torch.zeros(16, 8, 8), r"shape \(16, 8, 8\)"),
        (torch.zeros(0, 16, 8, 8), "no axis may be empty"),
        (torch.zeros(3, 16, 8, 8, dtype=torch.int64), "floating type"),
    ],
)
def test_latents(model: RewardModel, latents: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        model.score_latents(latents, tiny_conditioning(), seed=0)


@pytest.mark.parametrize("level", [-0.1, 1.01, float("nan"), [0.2, 1.5], torch.tensor([0.1, 0.2, 7.0])])
def test_sigma_outside_its_range(model: RewardModel, level: object) -> None:
    with pytest.raises(InvalidInputError, match=r"outside \[0, 1\]"):
        model.score_latents(tiny_latents(), tiny_conditioning(), level, seed=0)


def test_sigma_of_the_raw_module(model: RewardModel) -> None:
    with pytest.raises(InvalidInputError, match=r"sigma = 1.5 is outside \[0, 1\]"):
        model(tiny_latents(), tiny_conditioning(), torch.tensor([0.1, 1.5, 0.2]))
    with pytest.raises(InvalidInputError, match=r"must be a tensor \(3,\)"):
        model(tiny_latents(), tiny_conditioning(), torch.tensor([0.1]))


@pytest.mark.parametrize("levels", [[], torch.zeros(2), torch.zeros(2, 2), [True], ["0.4"]])
def test_malformed_levels(model: RewardModel, levels: object) -> None:
    with pytest.raises((InvalidInputError, TypeError), match="levels"):
        model.score_latents(tiny_latents(), tiny_conditioning(), levels, seed=0)


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        (Conditioning(torch.zeros(3, 5, 63), torch.zeros(3, 64)), "width 63"),
        (Conditioning(torch.zeros(3, 5, 64), torch.zeros(3, 65)), "pooled_prompt_embeds have width 65"),
        (Conditioning(torch.zeros(3, 5, 64)), "needs pooled_prompt_embeds"),
        (tiny_conditioning(2), "2 rows for 3 latents"),
        (Conditioning(torch.zeros(3, 5, 64), torch.zeros(2, 64)), "3 rows of prompt_embeds, 2 of pooled"),
        (
            Conditioning(torch.full((3, 5, 64), float("nan")), torch.zeros(3, 64)),
            "prompt_embeds holds 960 NaN",
        ),
        (Conditioning(torch.zeros(3, 64), torch.zeros(3, 64)), "prompt_embeds has shape"),
        (Conditioning(torch.zeros(3, 5, 64), torch.zeros(3, 64), torch.zeros(3, 5)), "attention_mask"),
    ],
)
def test_conditioning(model: RewardModel, conditioning: Conditioning, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        model.score_latents(tiny_latents(), conditioning, seed=0)


def test_noise_and_seeds(model: RewardModel) -> None:
    args = (tiny_latents(), tiny_conditioning(), 0.4)
    with pytest.raises(InvalidInputError, match="noise of shape"):
        model.score_latents(*args, noise=torch.zeros(1, 16, 8, 12))
    with pytest.raises(InvalidInputError, match="noise holds"):
        model.score_latents(*args, noise=spoiled(float("nan")))
    with pytest.raises(InvalidInputError, match="2 seeds for 3 samples"):
        model.score_latents(*args, seed=[1, 2])
    with pytest.raises(InvalidInputError, match="from -9223372036854775808 to 18446744073709551615"):
        model.score_latents(*args, seed=2**70)


@pytest.mark.parametrize("seed", ["0", b"0", True, 1.5, [0, True, 2], [0, 1, "2"], torch.zeros(3), 2**64])
def test_seeds_that_are_no_whole_numbers(model: RewardModel, seed: object) -> None:
    picture = Image.new("RGB", (16, 16))
    with pytest.raises(InvalidInputError, match=r"^seed = .*: it must be a whole number from"):
        model.score_latents(tiny_latents(), tiny_conditioning(), seed=seed)
    with pytest.raises(InvalidInputError, match=r"^seed = "):
        model.score(PROMPT, [picture] * 3, seed=seed)
    if not isinstance(seed, list | torch.Tensor):
        for method in (model.compare, model.compare_adaptively):
            with pytest.raises(InvalidInputError, match=r"^seed = "):
                method(PROMPT, picture, picture, seed=seed)


@pytest.mark.parametrize("num_draws", [0, -3, True, False])
def test_numbers_of_draws(model: RewardModel, num_draws: int) -> None:
    """Zero draws would have a mean of NaN."""
    picture, message = (
        Image.new("RGB", (16, 16)),
        f"num_draws = {num_draws}: it must be a whole number at least",
    )
    with pytest.raises(InvalidInputError, match=message):
        model.score(PROMPT, picture, num_draws=num_draws)
    with pytest.raises(InvalidInputError, match=message):
        model.score_latents(tiny_latents(), tiny_conditioning(), num_draws=num_draws)
    with pytest.raises(InvalidInputError, match=message):
        model.compare(PROMPT, picture, picture, num_draws=num_draws)
    with pytest.raises(InvalidInputError, match=message):
        model.rank(PROMPT, [picture], num_draws=num_draws)


@pytest.mark.parametrize("value", [1.0, 1.5, "1", None, True, np.True_, np.float32(1)])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^count = .*: it must be a whole number at least 1$"):
        whole_number(value, "count", 1)


def test_prompts_that_are_no_text(model: RewardModel) -> None:
    """A cut-off emoji leaves half of its UTF-16 pair, which nothing can encode."""
    cut, picture = "a red \ud83d circle", Image.new("RGB", (16, 16))
    message = r"holds '\\ud83d' at position 6, .*\(a surrogate\)"
    with pytest.raises(InvalidInputError, match=f"^prompt 1 {message}"):
        model.score([PROMPT, cut], picture)
    with pytest.raises(InvalidInputError, match=f"^prompt 1 {message}"):
        model.encode_prompts([PROMPT, cut])
    for method in (model.compare, model.compare_adaptively):
        with pytest.raises(InvalidInputError, match=f"^prompt 0 {message}"):
            method(cut, picture, picture)
    for adaptive in (False, True):
        with pytest.raises(InvalidInputError, match=f"^prompt 0 {message}"):
            model.rank(cut, [picture], adaptive=adaptive)
    with pytest.raises(InvalidInputError, match=f"^prompt 0 {message}"):
        model.prompt_notes(cut)


@pytest.mark.parametrize("prompts", [None, 3, b"a red circle", {"a": 1}])
def test_prompts_that_are_neither_one_nor_many(prompts: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^prompts is a .* string"):
        prompt_list(prompts)
    with pytest.raises(InvalidInputError, match=r"^prompt 1 is a "):
        check_prompts([PROMPT, prompts])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_empty_prompt(model: RewardModel, prompt: str) -> None:
    with pytest.raises(InvalidInputError, match="prompt 1 is empty"):
        model.encode_prompts([PROMPT, prompt])
    with pytest.raises(InvalidInputError, match="prompt 0 is empty"):
        model.score(prompt, Image.new("RGB", (16, 16)))


def test_prompt_longer_than_the_encoder_allows(model: RewardModel) -> None:
    words = "a red circle above a small blue square on a large gray background".split()
    with pytest.warns(PromptWarning, match="longer than the encoders read") as caught:
        model.encode_prompts(" ".join(words))
    message = str(caught[0].message)
    assert f"text_encoder ({MAX_TOKENS} tokens)" in message
    assert f"text_encoder_3 ({MAX_TOKENS} tokens)" in message
    assert "'large gray background'" in message, "two special tokens leave room for ten words"
    assert "'gray background'" in message, "T5 has only an end token"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts(" ".join(words))  # said once, when it was encoded


def test_unknown_words_are_named_once(model: RewardModel) -> None:
    with pytest.warns(PromptWarning, match="unknown to the tokenizer") as caught:
        model.encode_prompts(["a purple circle", "a red zebra and a purple square"])
    assert len(caught) == 1
    assert str(caught[0].message).endswith("purple, zebra")


def test_known_prompts_pass_without_a_word(model: RewardModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_prompts("A Red Circle")


def test_unreadable_and_missing_images(model: RewardModel, tmp_path: Path) -> None:
    good = Image.new("RGB", (16, 16))
    good.save(tmp_path / "good.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("not an image")
    for path in (broken, tmp_path / "text.png"):
        with pytest.raises(InvalidInputError, match=rf"{path.name}' is not a readable image"):
            model.score(PROMPT, [good, path])
    with pytest.raises(InvalidInputError, match=r"missing file: .*nothing.png"):
        model.score(PROMPT, tmp_path / "nothing.png")
    with pytest.raises(InvalidInputError, match=r"^image 1 \(4 bytes\) is not a readable image$"):
        model.score(PROMPT, [good, b"1234"])
    with pytest.raises(InvalidInputError, match="no images"):
        model.score(PROMPT, [])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(16, 16), "tensors must be"),
        (torch.zeros(2, 16, 16), "1, 3 or 4 channels"),
        (torch.zeros(3, 16, 16, dtype=torch.int32), "must be uint8, or floating"),
        (torch.full((3, 16, 16), 200.0), r"must be in \[0, 1\]"),
        (torch.full((3, 16, 16), float("nan")), r"must be in \[0, 1\]"),
        (torch.zeros(3, 7, 40), "too small or too narrow"),
        (3.5, "is a float"),
    ],
)
def test_images_of_the_wrong_kind(model: RewardModel, image: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        model.score(PROMPT, [image])


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (("text_encoder",), "has no text_encoder,"),
        (("text_encoder_2",), "has no text_encoder_2,"),
        (("tokenizer",), "has no tokenizer,"),
        (("text_encoder_3",), "text_encoder_3 in model_index.json but has no such folder"),
    ],
)
def test_pipeline_without_a_text_encoder(
    tiny_pipeline: Path, tmp_path: Path, left_out: tuple, message: str
) -> None:
    model = make_tiny_reward(copy_of(tiny_pipeline, tmp_path / "partial", without=left_out))
    with pytest.raises(MissingComponentError, match=message):
        model.score(PROMPT, Image.new("RGB", (16, 16)))
    assert model.encode_images(Image.new("RGB", (16, 16))).shape == (1, 16, 4, 4)
    assert model.score_latents(tiny_latents(), tiny_conditioning(), seed=0).shape == (3,)


def test_pipeline_without_a_vae(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = make_tiny_reward(copy_of(tiny_pipeline, tmp_path / "partial", without=("vae",)))
    assert len(model.encode_prompts(PROMPT)) == 1
    with pytest.raises(MissingComponentError, match="no vae"):
        model.encode_images(Image.new("RGB", (16, 16)))


def test_pipeline_of_transformer_and_scheduler_alone(tiny_backbone: Path) -> None:
    model = make_tiny_reward(tiny_backbone)
    assert model.encoders is None
    with pytest.raises(MissingComponentError, match="no text_encoder"):
        model.score(PROMPT, Image.new("RGB", (16, 16)))
    with pytest.raises(MissingComponentError, match="no vae, so images cannot be encoded"):
        model.encode_images(Image.new("RGB", (16, 16)))


def test_pipeline_without_a_scheduler_or_transformer(tiny_backbone: Path, tmp_path: Path) -> None:
    for part in ("scheduler", "transformer"):
        folder = copy_of(tiny_backbone, tmp_path / part, without=(part,))
        with pytest.raises(MissingComponentError, match=f"has no {part}/ folder"):
            make_tiny_reward(folder)


def test_pipeline_that_is_nothing_of_the_kind(tmp_path: Path) -> None:
    with pytest.raises(MissingComponentError, match="neither a folder nor a hub id"):
        RewardModel.initialize(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingComponentError, match="a file, not a folder"):
        RewardModel.initialize(tmp_path / "file")
    with pytest.raises(MissingComponentError, match="not int"):
        RewardModel.initialize(3)


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(MissingComponentError, match=r"'someone/something'.*no route to host"):
        RewardModel.initialize("someone/something")
    with pytest.raises(CheckpointError, match="no route to host"):
        RewardModel.from_pretrained("someone/something")
