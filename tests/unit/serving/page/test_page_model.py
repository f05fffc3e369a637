"""The page's scores are the library's, asked for in the model's thread only; wrong uploads are told apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dina_lrm import RewardModel
from dina_lrm.errors import InvalidInputError, ScoringError
from dina_lrm.serving.page_model import LEVELS, NUM_DRAWS, PageModel, mean_score, places
from tests.unit.serving.page.conftest import PROMPT, ModelThread


@pytest.mark.parametrize("levels", [(0.2, 0.5, 0.7), (LEVELS[0],), (LEVELS[-1],)])
@pytest.mark.parametrize("name", ["fits", "wide"])
def test_scores_are_the_librarys(
    page_model: PageModel, reward: RewardModel, files: dict[str, Path], name: str, levels: tuple[float, ...]
) -> None:
    expected = reward.score(PROMPT, files[name], list(levels), seed=0, num_draws=NUM_DRAWS)
    latents = page_model.latents(page_model.open(str(files[name]), name)[0], name)
    found = mean_score(page_model.draws(latents, page_model.prompt(PROMPT), levels))
    assert found.value == pytest.approx(expected.scores.item(), rel=1e-5)
    assert expected.standard_errors is not None
    assert found.standard_error == pytest.approx(expected.standard_errors.item(), rel=1e-3)
    assert found.num_draws == NUM_DRAWS


def test_levels_are_the_models_own(page_model: PageModel, reward: RewardModel) -> None:
    assert page_model.model_levels == tuple(reward.config.noise_levels)
    assert len(LEVELS) == 9
    assert (LEVELS[0], LEVELS[-1]) == (0.05, 0.95)


def test_the_model_is_used_in_its_thread_only(
    page_model: PageModel, reward: RewardModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def watch(name: str) -> None:
        method = getattr(reward, name)

        def watched(*args: Any, **options: Any) -> Any:
            assert ModelThread.here(), name
            assert not torch.is_grad_enabled(), name
            used.append(name)
            return method(*args, **options)

        monkeypatch.setattr(reward, name, watched)

    for name in ("read_prompts", "encode_images", "score_latents", "decode_latents"):
        watch(name)
    latents = page_model.latents(page_model.open(str(files["fits"]), "fits")[0], "fits")
    page_model.draws(latents, page_model.prompt(PROMPT), (0.4,))
    page_model.decoded(latents)
    assert sorted(used) == [
        "decode_latents",
        "encode_images",
        "read_prompts",
        "score_latents",
    ]


def test_a_picture_survives_the_way_there_and_back(page_model: PageModel, files: dict[str, Path]) -> None:
    """The autoencoder's picture is near the one that went in: 5 of 255 steps on average."""
    picture, notes = page_model.open(str(files["fits"]), "fits")
    assert notes == []
    decoded = page_model.decoded(page_model.latents(picture, "fits"))
    assert decoded.size == (64, 64)
    pixels = torch.tensor(list(decoded.convert("RGB").tobytes())).reshape(64, 64, 3)
    assert (pixels / 255 - picture.permute(1, 2, 0)).abs().mean() < 5 / 255


def test_what_the_encoders_do_not_see_is_noted(page_model: PageModel) -> None:
    assert page_model.prompt(PROMPT).notes == []
    (note,) = page_model.prompt("a red zebra on a gray background").notes
    assert "zebra" in note


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("text", "fits.png: not a readable picture"),
        ("huge", r"fits.png: 700 ?x ?700 pixels, at most 0.4 million are taken"),
        ("bomb", r"fits.png: far more than the 0.4 million pixels that are taken"),
        ("narrow", "fits.png of 64x2 pixels is too small"),
    ],
)
def test_wrong_pictures_are_named(
    page_model: PageModel, files: dict[str, Path], name: str, told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        page_model.latents(page_model.open(str(files[name]), "fits.png")[0], "fits.png")
    assert isinstance(page_model.run, ModelThread)
    assert page_model.run.jobs == 0


@pytest.mark.parametrize(
    ("form", "size", "orientation", "was", "now"),
    [
        ("PNG", (500, 250), 1, "500x250", (446, 223)),
        ("WEBP", (250, 500), 1, "250x500", (223, 446)),
        ("JPEG", (500, 250), 1, "500x250", (446, 223)),
        ("JPEG", (500, 250), 6, "250x500", (223, 446)),  # as a telephone that is held upright has it
        ("JPEG", (3000, 2000), 1, "3000x2000", (387, 258)),  # 60 times the limit, decoded at an eighth
    ],
)
def test_a_picture_over_the_limit_is_shrunk(
    page_model: PageModel,
    tmp_path: Path,
    form: str,
    size: tuple[int, int],
    orientation: int,
    was: str,
    now: tuple[int, int],
) -> None:
    """To what the limit takes, turned as its viewer sees it, and the visitor is told."""
    picture, exif = Image.new("RGB", size, "red"), Image.Exif()
    picture.paste("blue", (0, 0, size[0], size[1] // 4))  # a quarter at the top, which rotation moves
    exif[0x0112] = orientation
    picture.save(tmp_path / "a", form, exif=exif)
    pixels, notes = page_model.open(str(tmp_path / "a"), "Picture")
    width, height = now
    assert pixels.shape == (3, height, width)
    assert width * height <= 100_000
    assert notes == [
        f"Picture was shrunk from {was} to {width}x{height} pixels: at most 0.1 million are scored."
    ]
    corner = (height // 2, width - 20) if orientation == 6 else (20, width // 2)
    assert pixels[2][corner] > 0.9
    assert pixels[2].mean() == pytest.approx(0.25, abs=0.02)


def test_places_are_shared_where_scores_cannot_be_told_apart() -> None:
    """By hand, from differences draw by draw: 1 and 2 differ by 0.1 under every draw, though both scatter by
    far more; 2 and 3 by 0.01 with a standard error of 0.1; 3 and 4 again clearly, 4 and 5 not at all."""
    noise = torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0, -1.0, 0.5, -0.5])
    jitter = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.3, -0.3, 0.3, -0.3])
    draws = [noise + 1.1, noise + 1.0, noise + 0.99 + jitter, noise - 5.0, noise - 5.0]
    assert places([one.double() for one in draws]) == [1, 2, 2, 4, 4]
    assert places([noise]) == [1]


def test_no_picture_is_told(page_model: PageModel) -> None:
    with pytest.raises(InvalidInputError, match="Picture A: none is given"):
        page_model.open(None, "Picture A")


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "Prompt: empty"), ("  ", "Prompt: empty"), (None, "Prompt: empty"), ("a" * 201, "at most 200")],
)
def test_wrong_prompts_are_told(page_model: PageModel, text: Any, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        page_model.prompt(text)


def test_a_busy_server_is_told(reward: RewardModel) -> None:
    def busy(job: Any) -> Any:
        raise ScoringError("the server is busy")

    page_model = PageModel(model=reward, run=busy, max_megapixels=1.0, max_prompt_length=200)
    with pytest.raises(ScoringError, match="busy"):
        page_model.prompt(PROMPT)
