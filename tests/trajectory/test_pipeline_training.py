"""The bundled pipeline's recipe, a few steps long: it resumes exactly and diffusers loads the result."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dina_lrm.errors import InvalidInputError
from dina_lrm.shapes.fit import PipelineTrainConfig, StageConfig, step_generator
from dina_lrm.shapes.networks import MAX_TOKENS
from dina_lrm.shapes.pipeline import generate, load_pipeline
from dina_lrm.shapes.train import main, token_ids


def tiny_run(output: Path, **settings: object) -> PipelineTrainConfig:
    short = StageConfig(steps=2, batch_size=4, learning_rate=1e-3, warmup_steps=1)
    config = PipelineTrainConfig(
        output=output,
        vae=short,
        clip=short,
        text=short,
        generator=short,
        pool_size=24,
        checkpoint_every=1,
        keep_steps=(1,),
    )
    return replace(config, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PipelineTrainConfig:
    config = tiny_run(tmp_path_factory.mktemp("run"))
    main(config)
    return config


def test_the_result_is_a_pipeline_that_samples(run: PipelineTrainConfig) -> None:
    pipeline = load_pipeline(run.output / "pipeline")
    captions = [
        "a red circle on a gray background",
        "a blue cross above a green square on a white background",
    ]
    together = generate(pipeline, captions, [3, 4], num_inference_steps=2, guidance_scale=3.0)
    alone = generate(pipeline, captions[1:], [4], num_inference_steps=2, guidance_scale=3.0)
    assert together[0].size == (64, 64)
    assert np.abs(np.asarray(together[1], dtype=int) - np.asarray(alone[0], dtype=int)).max() <= 1


def test_stages_log_their_losses_and_keep_an_early_checkpoint(run: PipelineTrainConfig) -> None:
    rows = [json.loads(line) for line in (run.output / "generator" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert rows[-1]["loss"] > 0
    assert (run.output / "generator" / "step_1" / "transformer" / "config.json").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(run: PipelineTrainConfig, tmp_path: Path) -> None:
    for part in ("vae", "clip", "text"):
        (tmp_path / part).symlink_to(run.output / part)
    whole = StageConfig(steps=2, batch_size=4, learning_rate=1e-3, warmup_steps=1, decay_fraction=0.5)
    stopped = replace(whole, steps=1, decay_fraction=0.0)
    for stage in (stopped, whole):  # the second starts from the checkpoint that the first left at step 1
        main(tiny_run(tmp_path, stages=("generator",), generator=stage, keep_steps=()))
    other = tmp_path / "uninterrupted"
    other.mkdir()
    for part in ("vae", "clip", "text"):
        (other / part).symlink_to(run.output / part)
    main(tiny_run(other, stages=("generator",), generator=whole, keep_steps=()))
    states = [torch.load(path / "generator" / "state.pt", weights_only=True) for path in (tmp_path, other)]
    assert states[0]["step"] == states[1]["step"] == 2
    for name, module in states[0]["modules"].items():
        for key, value in module.items():
            assert torch.equal(value, states[1]["modules"][name][key]), (name, key)


def test_a_finished_run_is_not_trained_again(run: PipelineTrainConfig) -> None:
    state = run.output / "vae" / "state.pt"
    before = state.stat().st_mtime_ns
    main(replace(run, stages=("vae",)))
    assert state.stat().st_mtime_ns == before


def test_a_new_run_starts_from_an_assembled_pipeline(run: PipelineTrainConfig, tmp_path: Path) -> None:
    source = run.output / "pipeline"
    still = StageConfig(steps=1, batch_size=4, learning_rate=0.0, warmup_steps=1)
    main(tiny_run(tmp_path, stages=("generator", "assemble"), generator=still, initial=source))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        (weights,) = (source / part).glob("*.safetensors")
        before, after = load_file(weights), load_file(tmp_path / "pipeline" / part / weights.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), part


def test_the_denoiser_starts_with_the_text_encoder_of_the_text_stage(
    run: PipelineTrainConfig, tmp_path: Path
) -> None:
    """Whether the stages run in one call or in two, each starting from an assembled pipeline."""
    source = run.output / "pipeline"
    main(tiny_run(tmp_path, stages=("text",), initial=source))
    main(tiny_run(tmp_path, stages=("generator", "assemble"), initial=source))
    state = torch.load(tmp_path / "text" / "state.pt", weights_only=True)
    assert set(state["modules"]) == {"text_encoder_3", "readout"}
    weights = [load_file(f / "text_encoder_3" / "model.safetensors") for f in (source, tmp_path / "pipeline")]
    learned = load_file(tmp_path / "text" / "text_encoder_3" / "model.safetensors")
    assert all(torch.equal(weights[1][key], learned[key]) for key in learned)
    assert any(not torch.equal(weights[0][key], learned[key]) for key in learned)


def test_a_run_that_keeps_the_vae_does_not_train_one(run: PipelineTrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="vae and clip are kept"):
        main(tiny_run(tmp_path, stages=("vae",), initial=run.output / "pipeline"))
    with pytest.raises(InvalidInputError, match="has no folder vae/"):
        main(tiny_run(tmp_path, stages=("generator",), initial=tmp_path / "nothing"))


def test_the_layout_is_learned_beside_the_flow(run: PipelineTrainConfig) -> None:
    state = torch.load(run.output / "generator" / "state.pt", weights_only=True)
    assert {"transformer", "readout"} == set(state["modules"])
    rows = [json.loads(line) for line in (run.output / "generator" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == pytest.approx(
        rows[-1]["flow"] + run.layout_weight * rows[-1]["layout"], abs=1e-4
    )


def test_draws_depend_on_seed_stage_and_step_alone() -> None:
    draw = torch.randn(3, generator=step_generator(0, "vae", 5))
    assert torch.equal(draw, torch.randn(3, generator=step_generator(0, "vae", 5)))
    for other in ((1, "vae", 5), (0, "clip", 5), (0, "vae", 6)):
        assert not torch.equal(draw, torch.randn(3, generator=step_generator(*other)))


def test_every_caption_of_the_grammar_fits_the_encoders() -> None:
    ids = token_ids(["a small red circle to the right of a small blue square on a black background", ""])
    assert ids.shape == (2, MAX_TOKENS)
    assert (ids[0] != 0).sum() == 18
    assert ids[1, :2].tolist() == [2, 3]
