"""Test sets off distribution: captions that no training sees, pictures that follow from the seed."""

import numpy as np
import pytest
from PIL import Image

from dina_lrm.build import unseen
from dina_lrm.build.unseen import DAMAGE, Unseen, load_small_pipeline, make_unseen_pairs, render_in_style
from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pairs import distinct_captions
from dina_lrm.shapes.pipeline import load_pipeline
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import caption_part, sample_scene


def test_captions_of_the_parts_are_apart() -> None:
    """Of 2,000 captions a fifth is kept for tests and a tenth for validation, and none is in two parts."""
    specs = distinct_captions(np.random.default_rng(0), 2000)
    parts = [caption_part(spec) for spec in specs]
    assert parts.count("test") == pytest.approx(400, abs=60)
    assert parts.count("validation") == pytest.approx(200, abs=45)
    drawn = {part: set(distinct_captions(np.random.default_rng(1), 300, part)) for part in ("train", "test")}
    assert not drawn["train"] & drawn["test"]
    assert {caption_part(spec) for spec in drawn["test"]} == {"test"}


@pytest.mark.parametrize("name", ["damage", "style"])
def test_a_set_follows_from_its_seed(name: Unseen) -> None:
    first, again = (make_unseen_pairs(name, num_prompts=3, seed=5) for _ in range(2))
    assert len(first.pairs) == 18
    assert [pair.prompt for pair in first.pairs] == [pair.prompt for pair in again.pairs]
    for one, other in zip(first.candidates, again.candidates, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
    captions = {candidate.caption for candidate in first.candidates}
    other_seed = make_unseen_pairs(name, num_prompts=3, seed=6)
    assert captions != {candidate.caption for candidate in other_seed.candidates}
    assert ((first.bayes > 0) & (first.bayes < 1)).all()


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damage_grows_with_its_strength_and_keeps_the_size(name: str) -> None:
    rng = np.random.default_rng(0)
    image = render(sample_scene(rng, distinct_captions(rng, 1)[0]))

    def distance(strength: float) -> float:
        damaged = DAMAGE[name](image, strength, np.random.default_rng(1))
        assert damaged.size == image.size
        assert damaged.mode == "RGB"
        return float(np.abs(np.asarray(damaged, float) - np.asarray(image, float)).mean())

    assert distance(1.0) > distance(0.3) > 0


def test_the_judge_reads_other_styles() -> None:
    """A scene that is drawn in another way still shows what its caption says: the style is not the
    content."""
    rng = np.random.default_rng(0)
    specs = distinct_captions(rng, 100, "test")
    right = [
        judge(render_in_style(sample_scene(rng, spec), unseen.draw_style(rng)), spec).full_match
        for spec in specs
    ]
    assert sum(right) >= 95


def test_a_style_is_not_that_of_training() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, distinct_captions(rng, 1)[0])
    for _ in range(20):
        styled = render_in_style(scene, unseen.draw_style(rng))
        assert isinstance(styled, Image.Image)
        difference = np.abs(np.asarray(styled, float) - np.asarray(render(scene), float)).mean()
        assert difference > 1.0


def test_pictures_of_other_generators_follow_from_the_seed() -> None:
    """Two of the smaller generator, two of the bundled one with noise at every step."""
    first, again = (make_unseen_pairs("generators", num_prompts=2, seed=5) for _ in range(2))
    assert [item.origin for item in first.candidates[:4]] == [f"generators {place}" for place in range(4)]
    for mine, other in zip(first.candidates, again.candidates, strict=True):
        assert mine.image.tobytes() == other.image.tobytes()
    assert len({item.image.tobytes() for item in first.candidates}) == 8


def test_the_smaller_generator_is_another_one() -> None:
    small, bundled = (
        sum(weight.numel() for weight in load().transformer.parameters())
        for load in (load_small_pipeline, load_pipeline)
    )
    assert small < bundled / 4
