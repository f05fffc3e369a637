"""Damage for training pairs, and pairs that show it."""

import numpy as np
import pytest

from dina_lrm.build.unseen import DAMAGE
from dina_lrm.shapes.damage import VARIED, damage
from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pairs import distinct_captions, make_shapes_pairs
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import caption_part, parse_caption, sample_scene

SEEDS = range(24)


@pytest.mark.parametrize("name", sorted(VARIED))
def test_the_judge_likes_a_picture_less_the_more_it_is_damaged(name: str) -> None:
    utilities = {0.0: [], 0.2: [], 1.0: []}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        spec = distinct_captions(rng, 1)[0]
        image = render(sample_scene(rng, spec))
        for strength, found in utilities.items():
            damaged = image if strength == 0 else VARIED[name](image, strength, np.random.default_rng(seed))
            assert (damaged.size, damaged.mode) == (image.size, "RGB")
            found.append(judge(damaged, spec).utility)
    none, little, much = (float(np.mean(found)) for found in utilities.values())
    assert none > little > much


def test_damage_follows_from_its_generator_and_none_is_of_the_test_set() -> None:
    image = render(sample_scene(np.random.default_rng(0), distinct_captions(np.random.default_rng(0), 1)[0]))
    first, again, other = (damage(image, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2))
    assert first == again != other
    assert not set(VARIED) & set(DAMAGE)
    assert not set(VARIED.values()) & set(DAMAGE.values())


def test_pairs_of_renders_need_no_generator() -> None:
    made = make_shapes_pairs(None, num_prompts=40, seed=3, part="train", kind="renders")
    assert len(made.pairs) == 240
    assert {caption_part(parse_caption(pair.prompt)) for pair in made.pairs} == {"train"}
    by_place = np.array([item.utility for item in made.candidates]).reshape(40, 4).mean(axis=0)
    assert by_place[0] > by_place[1] > by_place[2:].max()
    again = make_shapes_pairs(None, num_prompts=40, seed=3, part="train", kind="renders")
    assert [item.utility for item in made.candidates] == [item.utility for item in again.candidates]


@pytest.mark.parametrize("kind", ["plain", "varied"])
def test_other_pairs_need_one(kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        make_shapes_pairs(None, num_prompts=2, seed=0, kind=kind)  # type: ignore[arg-type]
