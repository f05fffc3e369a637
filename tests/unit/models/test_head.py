"""The reward head by itself."""

import pytest
import torch
from torch import Tensor

from dina_lrm import InvalidInputError
from dina_lrm.models.head import RMS_EPS, HeadTokens, LogisticSquash, QueryAttention, RewardHead
from tests.tiny import randomize


def make_head(**settings: object) -> RewardHead:
    defaults = {"image_dims": [16, 16], "text_dims": [16], "embedding_dim": 12}
    head = RewardHead(**defaults | settings)
    randomize(head)
    return head.eval()


def features(batch: int = 3, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = [torch.randn(batch, 6, 16, generator=generator) for _ in range(2)]
    text = [torch.randn(batch, 5, 16, generator=generator)]
    return image, text, torch.randn(batch, 12, generator=generator)


def test_one_score_per_row_whatever_else_is_in_the_batch() -> None:
    head, (image, text, temb) = make_head(), features()
    scores = head(image, text, temb)
    assert scores.shape == (3,)
    for row in range(3):
        alone = head([x[row : row + 1] for x in image], [x[row : row + 1] for x in text], temb[row : row + 1])
        torch.testing.assert_close(alone[0], scores[row], atol=1e-6, rtol=0)


def test_tokens_have_no_order() -> None:
    head, (image, text, temb) = make_head(), features()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head([x[:, order] for x in image], text, temb), head(image, text, temb))


def test_text_is_read_and_may_be_absent() -> None:
    head, (image, text, temb) = make_head(), features()
    assert (head(image, [text[0] + 1], temb) - head(image, text, temb)).abs().min() > 1e-3
    blind = make_head(text_dims=[])
    assert blind(image, [], temb).shape == (3,)
    assert not [name for name in blind.state_dict() if "text" in name or "norm_t" in name]


def test_taps_of_different_resolution() -> None:
    """Laid end to end, each through its own slice of the mixing matrix: with the others at zero, the same."""
    head = make_head(image_dims=[8, 16], width=16)
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (torch.randn(2, *shape, generator=generator) for shape in ((12, 8), (3, 16)))
    text, temb = [torch.randn(2, 5, 16, generator=generator)], torch.randn(2, 12, generator=generator)
    mixed, _ = head.aggregate([fine, coarse], text, temb)
    assert mixed.shape == (2, 15, 16)
    adapters = head.layer_adapters_visual
    for part, tap, columns in ((mixed[:, :12], 0, slice(0, 4)), (mixed[:, 12:], 1, slice(4, 8))):
        padded = torch.zeros(2, part.shape[1], 8)
        padded[..., columns] = adapters[tap]((fine, coarse)[tap], temb)
        torch.testing.assert_close(part, head.agg_visual(padded))
    assert head([fine, coarse], text, temb).shape == (2,)


def test_masked_text_is_not_looked_at() -> None:
    head, (image, text, temb) = make_head(), features()
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True] * 4 + [False]])
    scores = head(image, text, temb, mask)
    for row, length in enumerate((3, 5, 4)):
        rows = slice(row, row + 1)
        alone = head([x[rows] for x in image], [text[0][rows, :length]], temb[rows])
        torch.testing.assert_close(alone[0], scores[row], atol=1e-6, rtol=0)
    assert (head(image, text, temb) - scores)[[0, 2]].abs().min() > 1e-3


def test_stacked_tokens_pad_and_mask_text() -> None:
    head, (image, text, temb) = make_head(), features()
    long = HeadTokens(*head.aggregate(image, text, temb))
    short = HeadTokens(*head.aggregate(image, [text[0][:, :3]], temb))
    stacked = HeadTokens.stack([long, short])
    assert stacked.text_mask is not None
    assert stacked.text_mask.sum(1).tolist() == [5, 5, 5, 3, 3, 3]
    scores = head.score_tokens(stacked.image, stacked.text, stacked.text_mask)
    expected = [head.score_tokens(part.image, part.text) for part in (long, short)]
    torch.testing.assert_close(scores, torch.cat(expected), atol=1e-6, rtol=0)
    assert HeadTokens.stack([long, long]).text_mask is None
    joined = stacked.unfold(2)  # the first three rows and the last three are two levels of three latents
    assert joined.text_mask is not None
    assert joined.text_mask.sum(1).tolist() == [8, 8, 8]


def test_a_fresh_head_ignores_the_noise_level_and_opens_every_gate_halfway() -> None:
    head, (image, text, temb) = (
        RewardHead(image_dims=[16, 16], text_dims=[16], embedding_dim=12),
        features(),
    )
    torch.testing.assert_close(head(image, text, temb), head(image, text, temb + 1))
    gate = head.attn1.gate_vis
    assert gate is not None
    torch.testing.assert_close(gate(image[0]), torch.zeros(3, 6, 1))


def test_streams_are_attended_separately() -> None:
    """Silencing every text value leaves exactly what image tokens alone give: no joint softmax."""
    attention = QueryAttention(16, 4, with_text=True, gated=True)
    randomize(attention)
    queries, image, text = (
        torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 6, 5)
    )
    with torch.no_grad():
        attention.to_v_text.weight.zero_()
        attention.to_v_text.bias.zero_()
    silent = attention(queries, image, text)
    alone = QueryAttention(16, 4, with_text=False, gated=True)
    alone.load_state_dict({k: v for k, v in attention.state_dict().items() if k in alone.state_dict()})
    torch.testing.assert_close(silent, alone(queries, image))


def test_projection_where_widths_differ_and_where_asked_for() -> None:
    assert "layer_adapters_visual.0.proj_in.weight" not in make_head().state_dict()
    for head in (make_head(width=32), make_head(project_in=True)):
        assert "layer_adapters_visual.0.proj_in.weight" in head.state_dict()
        assert head(*features()).shape == (3,)


@pytest.mark.parametrize("settings", [{"width": 12}, {"width": 10, "num_attention_heads": 5}])
def test_width_must_divide(settings: dict) -> None:
    with pytest.raises(InvalidInputError, match="divisible"):
        make_head(**settings)


def test_float32_epsilon_in_every_dtype() -> None:
    assert make_head().double().norm_ff.eps == RMS_EPS == torch.finfo(torch.float32).eps


def test_half_precision_features_are_scored_in_the_heads_own_precision() -> None:
    head, (image, text, temb) = make_head(), features()
    half = head([x.bfloat16() for x in image], [x.bfloat16() for x in text], temb.bfloat16())
    assert half.dtype == torch.float32
    rounded = head(
        [x.bfloat16().float() for x in image], [x.bfloat16().float() for x in text], temb.bfloat16().float()
    )
    torch.testing.assert_close(half, rounded)


def test_every_head_weight_gets_a_gradient() -> None:
    head = make_head().train()
    head(*features()).sum().backward()
    silent = [name for name, p in head.named_parameters() if p.grad is None]
    assert silent == []


def test_logistic_against_its_formula() -> None:
    squash = LogisticSquash()
    scores = torch.tensor([-50.0, -0.3, 0.0, 0.15, 50.0])
    by_hand = [4 / (1 + torch.exp(-s.double() / 0.150001)) - 2 for s in scores]
    torch.testing.assert_close(squash(scores).detach().double(), torch.stack(by_hand), atol=1e-6, rtol=0)
    with torch.no_grad():
        squash.eta4.fill_(-0.15)  # only its size counts
    torch.testing.assert_close(squash(scores).detach().double(), torch.stack(by_hand), atol=1e-6, rtol=0)
