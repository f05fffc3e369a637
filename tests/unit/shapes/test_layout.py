"""The layout of a scene at the resolution of image tokens: by hand for a square, by areas for every shape."""

import numpy as np
import pytest
import torch

from dina_lrm.shapes.geometry import CANVAS, SHAPES, SQUARE_HALF_SIDE, coverage
from dina_lrm.shapes.layout import (
    CHANNELS,
    GRID,
    LayoutReadout,
    TextReadout,
    collect_tokens,
    layout_scale,
    scene_layout,
)
from dina_lrm.shapes.networks import build_transformer
from dina_lrm.shapes.scenes import COLOURS, PlacedObject, Scene, sample_caption, sample_scene

CELL = CANVAS // GRID


def test_a_square_that_fills_four_tokens() -> None:
    """Its centre is the corner of four tokens and half its side is one token, so each of the four is covered
    whole. A token's centre is half a token, 4 pixels or a quarter of the unit of 16, from the square's."""
    radius = CELL / SQUARE_HALF_SIDE
    item = PlacedObject(shape="square", colour="blue", x=31.5, y=23.5, radius=radius)
    layout = scene_layout(Scene(objects=(item,), background="white")).reshape(GRID, GRID, CHANNELS)
    shape, colour = SHAPES.index("square"), len(SHAPES) + list(COLOURS).index("blue")
    expected = np.zeros((GRID, GRID, CHANNELS))
    for row, down in ((2, 0.25), (3, -0.25)):
        for column, across in ((3, 0.25), (4, -0.25)):
            expected[row, column, [shape, colour]] = 1.0
            expected[row, column, -3:] = across, down, radius / 16
    np.testing.assert_allclose(layout, expected, atol=1e-6)


@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_shares_add_up_to_the_area_of_each_shape_and_colour(num_objects: int) -> None:
    rng = np.random.default_rng(num_objects)
    scene = sample_scene(rng, sample_caption(rng, num_objects=num_objects))
    layout = scene_layout(scene)
    assert layout.shape == (GRID * GRID, CHANNELS)
    for item in scene.objects:
        area = coverage(item.shape, item.x, item.y, item.radius).sum() / CELL**2
        colour = len(SHAPES) + list(COLOURS).index(item.colour)  # objects of one scene differ in colour
        assert layout[:, colour].sum() == pytest.approx(area, rel=1e-5)
    shares = layout[:, : len(SHAPES)].sum(), layout[:, len(SHAPES) : -3].sum()
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)


def test_tokens_of_the_middle_block_are_collected_with_their_gradient() -> None:
    torch.manual_seed(0)
    transformer = build_transformer()
    seen = collect_tokens(transformer)
    transformer(
        hidden_states=torch.randn(2, 16, 16, 16),
        encoder_hidden_states=torch.randn(2, 40, 128),
        pooled_projections=torch.randn(2, 64),
        timestep=torch.tensor([300.0, 700.0]),
    )
    assert seen["image"].shape == (2, GRID * GRID, 192)
    LayoutReadout(192)(seen["image"]).square().mean().backward()
    norms = [
        sum(float(p.grad.abs().sum()) for p in block.parameters() if p.grad is not None)
        for block in transformer.transformer_blocks
    ]
    assert all(norm > 0 for norm in norms[:3])
    assert all(norm == 0 for norm in norms[3:])


def test_the_text_read_out_hears_which_of_two_words_comes_first() -> None:
    """A toy of the relation: the picture is left or right by the order of two tokens; a bag of words cannot
    tell, tokens that carry their position can."""
    torch.manual_seed(0)
    words = torch.randn(2, 16)
    position = torch.tensor([[0.0], [3.0]]).expand(2, 16)
    tokens = torch.stack([words + position, words.flip(0) + position])
    layouts = torch.zeros(2, GRID, GRID, CHANNELS)
    layouts[0, :, : GRID // 2, 0] = 1.0
    layouts[1, :, GRID // 2 :, 0] = 1.0
    layouts = layouts.reshape(2, GRID * GRID, CHANNELS)
    readout = TextReadout(16)
    optimizer = torch.optim.Adam(readout.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        error = (readout(tokens) - layouts) / layout_scale(layouts).clamp(min=0.1)
        error.square().mean().backward()
        optimizer.step()
    drawn = readout(tokens)[..., 0].reshape(2, GRID, GRID).mean(dim=1)
    assert (drawn[0, : GRID // 2] > 0.8).all()
    assert (drawn[0, GRID // 2 :] < 0.2).all()
    assert (drawn[1, : GRID // 2] < 0.2).all()


def test_errors_are_measured_in_the_spread_of_each_channel() -> None:
    layouts = torch.zeros(2, 3, 2)
    layouts[0, :, 0], layouts[1, :, 0] = 1.0, 3.0
    torch.testing.assert_close(layout_scale(layouts), torch.tensor([(6 / 5) ** 0.5, 1e-3]))
