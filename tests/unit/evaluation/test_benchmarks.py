"""Evaluation end to end on a model whose scores are known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from torch import Tensor, nn

from dina_lrm.checkpoints.config import Calibration, RewardModelConfig
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.data.latents import LatentPairs
from dina_lrm.evaluation.benchmarks import evaluate_latent_pairs
from dina_lrm.evaluation.noise_sweep import Setting, noise_sweep, score_pairs
from dina_lrm.models.reward_model import RewardModel


class KnownModel(RewardModel):
    """Scores by the latent's first channel, read at noise sigma: (1 - sigma) z + sigma eps.

    Levels together give the sum of their scores, so that tokens and averages can be told apart.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.num_images = 0

    device = torch.device("cpu")  # type: ignore[assignment]
    dtype = torch.float32  # type: ignore[assignment]

    def check_inputs(self, *_: object) -> None:
        """It has no backbone that could object."""

    def score_latents(self, latents: Tensor, conditioning: Conditioning, **settings: object) -> Tensor:  # type: ignore[override]
        levels, noise = settings["noise_levels"], settings["noise"]
        assert len(conditioning) == len(latents)
        self.num_images += len(latents) * len(levels)
        return sum((1 - s) * latents[:, 0].mean((1, 2)) + s * noise[:, 0].mean((1, 2)) for s in levels)


CONFIG = RewardModelConfig(
    num_blocks=1,
    image_taps=(1,),
    tuning="frozen",
    noise_levels=(0.4,),
    calibrations=(Calibration(noise_levels=(0.4,), scale=0.5),),
)


@pytest.fixture
def model() -> KnownModel:
    return KnownModel(CONFIG)


@pytest.fixture(scope="module")
def pairs() -> LatentPairs:
    """200 pairs over 50 prompts, four images a prompt; raters prefer by the first channel's mean, noisily."""
    generator = torch.Generator().manual_seed(0)
    num_prompts = 50
    latents = torch.randn(4 * num_prompts, 2, 2, 2, generator=generator)
    first = torch.arange(4 * num_prompts)
    second = first - first % 4 + (first + 1) % 4
    utility = latents[:, 0].mean((1, 2)).double()
    p = torch.special.ndtr((utility[first] - utility[second]) / 0.7)
    wins = torch.rand(len(p), generator=generator) < p
    return LatentPairs(
        latents=latents,
        prompts=[f"prompt {i}" for i in range(num_prompts)],
        prompt_embeds=torch.zeros(num_prompts, 3, 4),
        pooled_prompt_embeds=torch.zeros(num_prompts, 4),
        prompt_index=first // 4,
        chosen=torch.where(wins, first, second),
        rejected=torch.where(wins, second, first),
        target=torch.ones(len(p)),
        bayes=torch.where(wins, p, 1 - p).float(),
    )


def test_the_true_utility_reaches_the_bayes_optimum_exactly(model: KnownModel, pairs: LatentPairs) -> None:
    """The same noise on both sides cancels in this model, so every level orders pairs as the utility does."""
    result = evaluate_latent_pairs(model, pairs, noise_levels=(0.0, 0.5), ensembles=((0.2, 0.5),))
    assert result.bayes is not None
    for setting in result.settings:
        assert setting.bayes_share is not None
        assert setting.expected_bayes_share is not None
        assert (setting.bayes_share.value, setting.expected_bayes_share.value) == (1.0, 1.0)
        assert setting.accuracy.value == result.bayes.accuracy.value
        assert setting.accuracy.low < setting.accuracy.value < setting.accuracy.high
    assert result.bayes.expected_accuracy.value == pytest.approx(result.bayes.accuracy.value, abs=0.08)
    assert result.bayes.expected_accuracy.value < 1


def test_a_reversed_model_is_wrong_wherever_the_optimum_is_right(pairs: LatentPairs) -> None:
    class Reversed(KnownModel):
        def score_latents(self, latents: Tensor, conditioning: Conditioning, **settings: object) -> Tensor:  # type: ignore[override]
            return -super().score_latents(latents, conditioning, **settings)

    result = evaluate_latent_pairs(Reversed(CONFIG), pairs, noise_levels=(), ensembles=())
    assert result.bayes is not None
    assert result.default.accuracy.value == pytest.approx(1 - result.bayes.accuracy.value)


def test_an_indifferent_model_ties_everywhere(pairs: LatentPairs) -> None:
    class Indifferent(KnownModel):
        def score_latents(self, latents: Tensor, conditioning: Conditioning, **settings: object) -> Tensor:  # type: ignore[override]
            return torch.zeros(len(latents))

    values = {}
    for ties in ("wrong", "half", "skip"):
        result = evaluate_latent_pairs(Indifferent(CONFIG), pairs, noise_levels=(), ensembles=(), ties=ties)
        assert result.default.num_score_ties == len(pairs)
        assert result.default.expected_accuracy is not None
        assert result.default.expected_accuracy.value == 0.5
        values[ties] = result.default.accuracy.value
    assert (values["wrong"], values["half"]) == (0.0, 0.5)
    assert math.isnan(values["skip"])


def test_each_image_is_scored_once_and_single_levels_are_shared(
    model: KnownModel, pairs: LatentPairs
) -> None:
    settings = [
        Setting(noise_levels=(0.2,)),
        Setting(noise_levels=(0.5,)),
        Setting(noise_levels=(0.2, 0.5), combine="scores"),
    ]
    _, scores = noise_sweep(model, pairs, settings)
    assert model.num_images == 2 * 200  # 200 images, each in two pairs, at two levels
    average = scores["mean(0.2, 0.5)"]
    torch.testing.assert_close(average.chosen, (scores["0.2"].chosen + scores["0.5"].chosen) / 2)


def test_tokens_and_averages_are_different_settings(model: KnownModel, pairs: LatentPairs) -> None:
    result = evaluate_latent_pairs(model, pairs, noise_levels=(), ensembles=((0.2, 0.5),))
    tokens, average = result.ensembles
    assert (tokens.setting.label, average.setting.label) == ("0.2+0.5", "mean(0.2, 0.5)")
    torch.testing.assert_close(
        result.scores["0.2+0.5"].margin, 2 * result.scores["mean(0.2, 0.5)"].margin, rtol=1e-4, atol=1e-5
    )


def test_scores_do_not_depend_on_batches_or_subsets(model: KnownModel, pairs: LatentPairs) -> None:
    setting = Setting(noise_levels=(0.3,), num_draws=2)
    whole = score_pairs(model, pairs, setting, batch_size=1000)
    assert torch.equal(score_pairs(model, pairs, setting, batch_size=7).chosen, whole.chosen)
    rows = [150, 3, 77]
    assert torch.equal(score_pairs(model, pairs.subset(rows), setting).rejected, whole.rejected[:, rows])
    assert not torch.equal(score_pairs(model, pairs, setting, seed=1).chosen, whole.chosen)
    assert not torch.equal(whole.chosen[0], whole.chosen[1])


def test_the_models_own_scale_is_tested_at_its_own_levels_only(model: KnownModel, pairs: LatentPairs) -> None:
    result = evaluate_latent_pairs(model, pairs, noise_levels=(0.4, 0.6), ensembles=())
    assert result.default.reliability.scale == 0.5
    assert result.sweep[0] is result.default
    assert result.sweep[1].reliability.scale != 0.5
    refitted = evaluate_latent_pairs(
        KnownModel(replace(CONFIG, calibrations=())), pairs, noise_levels=(), ensembles=()
    ).default.reliability
    assert refitted.scale == pytest.approx(0.6 * 0.7, rel=0.3)  # margins shrink by 1 - sigma = 0.6
    assert refitted.log_loss == pytest.approx(result.default.reliability.log_loss, abs=0.02)


def test_agreement_over_draws(model: KnownModel, pairs: LatentPairs) -> None:
    """Noise cancels between the two sides of this model, so draws always agree."""
    result = evaluate_latent_pairs(model, pairs, noise_levels=(), ensembles=(), num_draws=3)
    (drawn,) = result.draws
    assert drawn.setting.label == "0.4 x3"
    assert drawn.setting.passes == 3
    assert drawn.draw_agreement == 1.0
    assert drawn.draw_spread == pytest.approx(0.0, abs=1e-5)
    assert result.default.draw_agreement is None


def test_result_as_json_table_and_files(model: KnownModel, pairs: LatentPairs, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = evaluate_latent_pairs(
        model, pairs, noise_levels=(0.4, 0.7), ensembles=((0.2, 0.5),), on_progress=lambda *c: calls.append(c)
    )
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)
    result.save(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == result.to_dict()
    assert stored["default"]["setting"]["label"] == "0.4"
    assert stored["sweep"][1]["accuracy"]["value"] == result.sweep[1].accuracy.value
    table = (tmp_path / "out" / "results.md").read_text()
    assert table == result.to_markdown()
    assert table.count("\n| ") == 1 + 4  # header; 0.4, 0.7, tokens, average
    assert "0.4 (default)" in table
    raw = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert len(raw["prompt"]) == len(pairs)
    assert raw["0.4: chosen"] == pytest.approx(result.scores["0.4"].chosen[0].tolist())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.md",
        "scores.parquet",
    }


def test_rater_ties_are_left_out_and_counted(model: KnownModel, pairs: LatentPairs) -> None:
    target = pairs.target.clone()
    target[:20] = 0.5
    result = evaluate_latent_pairs(
        model, replace(pairs, target=target, bayes=None), noise_levels=(), ensembles=()
    )
    assert (result.num_rater_ties, result.default.num_pairs) == (20, 180)
    assert result.bayes is None
    assert result.default.bayes_share is None
    assert "Bayes-optimal" not in result.to_markdown()


def test_no_pairs_is_an_error(model: KnownModel, pairs: LatentPairs) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        evaluate_latent_pairs(model, pairs.subset([]))
