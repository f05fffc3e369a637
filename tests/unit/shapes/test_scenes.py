"""The caption grammar is unambiguous, layouts satisfy captions, and the renderer draws what it is told."""

import numpy as np
import pytest

from dina_lrm.shapes.geometry import SUPERSAMPLING, coverage
from dina_lrm.shapes.render import render, render_array
from dina_lrm.shapes.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    SHAPES,
    CaptionSpec,
    ObjectSpec,
    PlacedObject,
    Scene,
    change_attribute,
    parse_caption,
    relation_holds,
    sample_caption,
    sample_scene,
    vocabulary,
)


def test_every_caption_parses_back_to_what_it_says():
    rng = np.random.default_rng(0)
    for _ in range(500):
        spec = sample_caption(rng)
        assert parse_caption(spec.caption) == spec


def test_vocabulary_is_small_and_covers_every_caption():
    rng = np.random.default_rng(1)
    words = set(vocabulary())
    assert len(words) < 100
    for _ in range(200):
        assert set(sample_caption(rng).caption.split()) <= words


@pytest.mark.parametrize(
    "caption",
    ["", "a red circle", "a mauve circle on a gray background", "two red circles on a gray background",
     "a red circle above a blue square above a green cross on a gray background"],
)  # fmt: skip
def test_other_text_is_an_error_that_shows_an_example(caption):
    with pytest.raises(ValueError, match="such as 'a small red circle"):
        parse_caption(caption)


def test_case_spaces_and_a_full_stop_do_not_matter():
    spec = parse_caption("  A red  circle, a blue square and a green cross on a White background. ")
    assert [item.colour for item in spec.objects] == ["red", "blue", "green"]
    assert spec.background == "white"


def test_layouts_satisfy_their_caption_and_do_not_overlap():
    rng = np.random.default_rng(2)
    for _ in range(200):
        spec = sample_caption(rng)
        scene = sample_scene(rng, spec)
        assert scene.background == spec.background
        for wanted, item in zip(spec.objects, scene.objects, strict=True):
            assert (item.shape, item.colour) == (wanted.shape, wanted.colour)
            assert wanted.size in (None, item.size)
        if spec.relation is not None:
            first, second = scene.objects
            assert relation_holds(spec.relation, (first.x, first.y), (second.x, second.y), 10.0)
        assert (
            np.sum(
                [coverage(item.shape, item.x, item.y, item.radius) for item in scene.objects], axis=0
            ).max()
            <= 1.0
        )


def test_a_changed_specification_is_always_another_one():
    rng = np.random.default_rng(3)
    for _ in range(300):
        spec = sample_caption(rng)
        assert change_attribute(rng, spec) != spec


@pytest.mark.parametrize(
    ("shape", "area", "perimeter"),
    [
        ("circle", np.pi, 2 * np.pi),
        ("square", 1.8**2, 4 * 1.8),
        ("triangle", 2.3, 2.3 + 2 * np.hypot(1.15, 2.0)),
        ("cross", 8 * 0.36 - 4 * 0.36**2, 8.0),
    ],
)
def test_coverage_adds_up_to_the_shapes_area(shape, area, perimeter):
    """Every edge is placed to half a sub-pixel, so the area is right to the perimeter times that."""
    radius = 12.0
    error = coverage(shape, 31.3, 30.8, radius).sum() - area * radius**2
    assert abs(error) <= perimeter * radius / (2 * SUPERSAMPLING)


def test_inside_is_the_palette_colour_and_edges_lie_between():
    scene = Scene(
        objects=(PlacedObject(shape="circle", colour="blue", x=32.0, y=20.0, radius=10.0),),
        background="white",
    )
    pixels = render_array(scene)
    assert tuple(pixels[20, 32]) == COLOURS["blue"]
    assert tuple(pixels[60, 2]) == BACKGROUNDS["white"]
    low, high = (
        np.minimum(COLOURS["blue"], BACKGROUNDS["white"]),
        np.maximum(COLOURS["blue"], BACKGROUNDS["white"]),
    )
    assert np.all((pixels >= low) & (pixels <= high))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4  # anti-aliased


def test_rendering_is_deterministic_in_the_seed():
    spec = CaptionSpec(objects=(ObjectSpec(shape="cross", colour="cyan"),), background="black")
    first, second = (np.asarray(render(sample_scene(np.random.default_rng(4), spec))) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (CANVAS, CANVAS, 3)


def test_an_unknown_shape_is_an_error():
    assert "hexagon" not in SHAPES
    with pytest.raises(ValueError, match="hexagon"):
        coverage("hexagon", 30.0, 30.0, 8.0)
