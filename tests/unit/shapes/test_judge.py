"""The gold judge: reads clean scenes back, lowers its score for each wrong fact and its cleanness for any
damage."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dina_lrm.shapes.judge import judge, read_picture
from dina_lrm.shapes.render import CORRUPTIONS, render
from dina_lrm.shapes.scenes import (
    COLOURS,
    SHAPES,
    CaptionSpec,
    ObjectSpec,
    change_attribute,
    parse_caption,
    sample_caption,
    sample_scene,
)


def test_reads_clean_scenes_back_in_99_of_100():
    rng = np.random.default_rng(10)
    exact = 0
    for _ in range(300):
        spec = sample_caption(rng)
        scene = sample_scene(rng, spec)
        verdict = judge(render(scene), spec)
        read = sorted((item.shape, item.colour, item.placed().size) for item in verdict.reading.objects)
        drawn = sorted((item.shape, item.colour, item.size) for item in scene.objects)
        exact += read == drawn and verdict.full_match and verdict.reading.background == scene.background
    assert exact >= 297


def test_positions_and_radii_are_read_to_a_fraction_of_a_pixel():
    rng = np.random.default_rng(11)
    for _ in range(50):
        scene = sample_scene(rng, sample_caption(rng, num_objects=1))
        (read,), (drawn,) = read_picture(render(scene)).objects, scene.objects
        assert abs(read.x - drawn.x) < 0.3
        assert abs(read.y - drawn.y) < 0.6
        assert abs(read.radius - drawn.radius) < 0.8


def test_every_wrong_attribute_lowers_the_score():
    rng = np.random.default_rng(12)
    for _ in range(150):
        spec = sample_caption(rng)
        right = judge(render(sample_scene(rng, spec)), spec)
        wrong = judge(render(sample_scene(rng, change_attribute(rng, spec))), spec)
        assert right.full_match
        assert right.alignment == 1.0
        assert not wrong.full_match
        assert wrong.alignment < 1.0
        assert wrong.utility < right.utility


def test_more_wrong_facts_score_lower():
    spec = parse_caption("a small red circle above a big blue square on a gray background")
    shown = [spec]
    shown.append(replace(spec, background="white"))
    shown.append(replace(shown[-1], relation="below"))
    wrong_object = ObjectSpec(shape="cross", colour="green", size="big")
    shown.append(replace(shown[-1], objects=(wrong_object, spec.objects[1])))
    alignments = [
        judge(render(sample_scene(np.random.default_rng(13), item)), spec).alignment for item in shown
    ]
    assert alignments == sorted(alignments, reverse=True)
    assert len(set(alignments)) == len(alignments)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_damage_lowers_cleanness_monotonically(name):
    rng = np.random.default_rng(14)
    for number in range(25):
        image = render(sample_scene(rng, sample_caption(rng)))
        values = [
            read_picture(CORRUPTIONS[name](image, strength, np.random.default_rng(number))).cleanness
            for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        ]
        assert all(after < before for before, after in itertools.pairwise(values)), (name, number, values)


def test_an_empty_picture_matches_nothing_but_its_background():
    verdict = judge(Image.new("RGB", (64, 64), (128, 128, 128)), "a red circle on a gray background")
    assert verdict.facts == {
        "object 1 colour": False,
        "object 1 shape": False,
        "background": True,
        "count": False,
    }
    assert 0.0 < verdict.alignment < 0.5


def test_pure_noise_is_neither_aligned_nor_clean():
    noise = np.random.default_rng(15).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    verdict = judge(noise, "a red circle above a blue square on a gray background")
    assert not verdict.full_match
    assert verdict.cleanness < 0.3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", list(COLOURS))
def test_every_shape_in_every_colour_is_recognised(shape, colour):
    spec = CaptionSpec(objects=(ObjectSpec(shape=shape, colour=colour, size="small"),), background="gray")
    assert judge(render(sample_scene(np.random.default_rng(16), spec)), spec.caption).full_match


def test_another_size_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"64x64 .*\(32, 48, 3\)"):
        read_picture(Image.new("RGB", (48, 32)))
