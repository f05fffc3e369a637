"""Pairs of latents: gathering, files, the order of batches, encoding."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.core.seeds import mix_seeds
from dina_lrm.data.encode import encode_pairs
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.order import batch_indices
from dina_lrm.data.pairs import PreferencePair, Reject
from dina_lrm.data.shards.read import set_aside
from dina_lrm.errors import InvalidInputError


def make_pairs(num_pairs: int = 7, *, dtype: torch.dtype = torch.float16) -> LatentPairs:
    generator = torch.Generator().manual_seed(0)
    num_prompts = 3
    return LatentPairs(
        latents=torch.randn(2 * num_pairs, 4, 2, 2, generator=generator).to(dtype),
        prompts=[f"prompt {i}" for i in range(num_prompts)],
        prompt_embeds=torch.randn(num_prompts, 5, 6, generator=generator),
        pooled_prompt_embeds=torch.randn(num_prompts, 6, generator=generator),
        prompt_index=torch.arange(num_pairs) % num_prompts,
        chosen=torch.arange(num_pairs),
        rejected=torch.arange(num_pairs) + num_pairs,
        target=torch.rand(num_pairs, generator=generator),
        bayes=torch.rand(num_pairs, generator=generator),
    )


def test_batch_gathers_rows_in_order_as_float32() -> None:
    pairs = make_pairs()
    batch = pairs.batch([4, 0])
    assert batch.latents_chosen.dtype == torch.float32
    assert torch.equal(batch.latents_chosen[0], pairs.latents[4].float())
    assert torch.equal(batch.latents_rejected[1], pairs.latents[7].float())
    assert torch.equal(batch.prompt_embeds[0], pairs.prompt_embeds[1])
    assert torch.equal(batch.target, pairs.target[[4, 0]])
    assert len(batch) == 2


def test_subset_keeps_the_tables() -> None:
    pairs = make_pairs()
    part = pairs.subset([5, 2])
    assert part.latents is pairs.latents
    assert torch.equal(part.batch([0]).latents_chosen, pairs.batch([5]).latents_chosen)
    assert part.bayes is not None
    assert part.num_prompts == 1  # pairs 5 and 2 have prompt 2


def test_joined_sets_hold_the_pairs_of_each_in_order() -> None:
    first, second = make_pairs(7), make_pairs(3)
    joined = LatentPairs.concatenate([first, second])
    assert len(joined) == 10
    assert joined.num_prompts == first.num_prompts + second.num_prompts
    whole = joined.batch(range(10))
    for part, rows in ((first, slice(0, 7)), (second, slice(7, 10))):
        alone = part.batch(range(len(part)))
        for name in ("latents_chosen", "latents_rejected", "prompt_embeds", "target"):
            assert torch.equal(getattr(whole, name)[rows], getattr(alone, name)), name


def masked(pairs: LatentPairs, lengths: list[int]) -> LatentPairs:
    mask = (torch.arange(pairs.prompt_embeds.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return replace(pairs, attention_mask=mask)


def test_a_batch_is_as_long_as_its_longest_prompt() -> None:
    pairs = masked(make_pairs(), [2, 5, 3])
    batch = pairs.batch([0, 2])  # prompts 0 and 2
    assert batch.prompt_embeds.shape[1] == 3
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert pairs.batch([1]).prompt_embeds.shape[1] == 5


def test_joined_sets_of_masked_prompts_are_padded() -> None:
    short, plain = masked(make_pairs(), [2, 3, 3]), make_pairs(3)
    short = replace(
        short, prompt_embeds=short.prompt_embeds[:, :3], attention_mask=short.attention_mask[:, :3]
    )
    joined = LatentPairs.concatenate([short, plain])
    assert joined.prompt_embeds.shape == (6, 5, 6)
    assert joined.attention_mask is not None
    assert joined.attention_mask.sum(1).tolist() == [2, 3, 3, 5, 5, 5]
    for name in ("prompt_embeds", "attention_mask"):
        assert torch.equal(getattr(joined.batch([0]), name), getattr(short.batch([0]), name))


def test_the_latent_space_is_kept_and_must_agree(tmp_path: Path) -> None:
    pairs = replace(make_pairs(), latent_space="AutoencoderKL scaling_factor=1.5")
    pairs.save(tmp_path / "pairs.safetensors")
    assert LatentPairs.load(tmp_path / "pairs.safetensors").latent_space == pairs.latent_space
    assert LatentPairs.concatenate([pairs, pairs]).latent_space == pairs.latent_space
    with pytest.raises(InvalidInputError, match="come from different VAEs"):
        LatentPairs.concatenate([pairs, make_pairs()])


def test_sets_that_do_not_fit_together_are_refused() -> None:
    pairs = make_pairs()
    with pytest.raises(InvalidInputError, match="no pairs to join"):
        LatentPairs.concatenate([])
    with pytest.raises(InvalidInputError, match="differ in latents"):
        LatentPairs.concatenate([pairs, replace(pairs, latents=pairs.latents[..., :1])])
    with pytest.raises(InvalidInputError, match="differ in bayes"):
        LatentPairs.concatenate([pairs, replace(pairs, bayes=None)])


def test_split_by_prompt_shares_none() -> None:
    train, held_out = make_pairs(30).split_by_prompt(1 / 3)
    assert len(train) + len(held_out) == 30
    assert set(train.prompt_index.tolist()).isdisjoint(held_out.prompt_index.tolist())
    assert held_out.num_prompts == 1


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    pairs = make_pairs()
    pairs.save(tmp_path / "deep" / "pairs.safetensors")
    loaded = LatentPairs.load(tmp_path / "deep" / "pairs.safetensors")
    assert loaded.prompts == pairs.prompts
    for name in (
        "latents",
        "prompt_embeds",
        "pooled_prompt_embeds",
        "prompt_index",
        "chosen",
        "target",
        "bayes",
    ):
        assert torch.equal(getattr(loaded, name), getattr(pairs, name))
    assert loaded.attention_mask is None
    assert loaded.fingerprint() == pairs.fingerprint()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pairs.safetensors"]


def test_fingerprint_sees_every_column() -> None:
    pairs = make_pairs()
    changed = [
        replace(pairs, target=pairs.target.flip(0)),
        replace(pairs, latents=pairs.latents + 1),
        pairs.subset([1, 0, 2, 3, 4, 5, 6]),
        replace(pairs, prompts=["x", "y", "z"]),
    ]
    assert len({pairs.fingerprint(), *(other.fingerprint() for other in changed)}) == 5


def test_load_errors_name_the_file_and_the_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        LatentPairs.load(tmp_path / "gone.safetensors")
    path = tmp_path / "pairs.safetensors"
    make_pairs().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInputError, match="not a readable safetensors file"):
        LatentPairs.load(path)
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(InvalidInputError, match="None, not 'dina-lrm latent pairs 1'"):
        LatentPairs.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.full((7,), 1.5)}, "target must lie"),
        ({"target": torch.full((7,), float("nan"))}, "target must lie"),
        ({"target": torch.ones(6)}, "6 entries for 7 pairs"),
        ({"chosen": torch.full((7,), 14)}, "row 14 of a table of 14"),
        ({"prompt_index": torch.full((7,), 3)}, "row 3 of a table of 3"),
        ({"prompts": ["one"]}, "rows for 1 prompts"),
        ({"latents": torch.zeros(14, 4)}, "need \\(image, channel, height, width\\)"),
    ],
)
def test_inconsistent_pairs_are_refused(
    change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without its checks
    with pytest.raises(InvalidInputError, match=message):
        replace(make_pairs(), **change)


def test_nan_latents_are_refused_by_row() -> None:
    pairs = make_pairs()
    latents = pairs.latents.clone()
    latents[3, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="1 images, first in row 3"):
        replace(pairs, latents=latents)


# --- order


@pytest.mark.parametrize(("num_pairs", "batch_size"), [(10, 5), (10, 3), (3, 7), (1, 4), (8, 8)])
def test_every_epoch_holds_every_pair_once_whatever_the_batch_size(num_pairs: int, batch_size: int) -> None:
    num_epochs = 3
    steps = -(-num_pairs * num_epochs // batch_size)
    stream = torch.cat([batch_indices(num_pairs, batch_size, seed=1, step=step) for step in range(steps)])
    assert all(
        len(batch_indices(num_pairs, batch_size, seed=1, step=step)) == batch_size for step in range(steps)
    )
    for epoch in range(num_epochs):
        part = stream[epoch * num_pairs : (epoch + 1) * num_pairs]
        assert sorted(part.tolist()) == list(range(num_pairs))


def test_order_is_a_function_of_seed_and_step_only() -> None:
    later = batch_indices(100, 8, seed=5, step=40)
    for step in (3, 90, 0):
        batch_indices(100, 8, seed=5, step=step)
    assert torch.equal(later, batch_indices(100, 8, seed=5, step=40))
    assert not torch.equal(later, batch_indices(100, 8, seed=6, step=40))


def test_epochs_have_different_orders() -> None:
    first, second = (batch_indices(50, 50, seed=0, step=step) for step in (0, 1))
    assert not torch.equal(first, second)


def test_batch_size_does_not_change_the_stream() -> None:
    """Workers or devices that each take a slice of a larger batch see the same pairs."""
    whole = batch_indices(11, 8, seed=2, step=1)
    halves = torch.cat([batch_indices(11, 4, seed=2, step=step) for step in (2, 3)])
    assert torch.equal(whole, halves)


def test_groups_stay_together_and_are_shuffled() -> None:
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 3])
    epochs = [groups[batch_indices(9, 9, seed=0, step=step, groups=groups)].tolist() for step in range(4)]
    for order in epochs:
        runs = [group for i, group in enumerate(order) if i == 0 or order[i - 1] != group]
        assert sorted(runs) == [0, 1, 2, 3]
    assert len({tuple(order) for order in epochs}) > 1


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="no pairs"):
        batch_indices(0, 4, seed=0, step=0)


# --- images that are in several pairs


def test_pairs_of_one_draw_share_their_images_and_others_do_not() -> None:
    pairs = replace(
        make_pairs(6),
        prompt_index=torch.tensor([0, 0, 0, 1, 1, 1]),
        chosen=torch.tensor([0, 0, 1, 0, 4, 4]),
        rejected=torch.tensor([1, 2, 2, 5, 5, 6]),
    )
    alone = pairs.batch(range(6))
    assert sorted(alone.distinct.tolist()) == list(range(12))
    shared = pairs.batch(range(6), draws=pairs.prompt_index)
    assert len(shared.distinct) == 3 + 4  # image 0 is in both prompts, and counts for each
    sides = torch.cat([shared.latents_chosen, shared.latents_rejected])
    assert torch.equal(sides[shared.distinct][shared.position], sides)
    assert torch.equal(
        pairs.prompt_index.repeat(2)[shared.distinct][shared.position], pairs.prompt_index.repeat(2)
    )


def test_mixed_seeds_do_not_collide() -> None:
    assert len({mix_seeds(a, b) for a in range(30) for b in range(30)}) == 900
    assert 0 <= mix_seeds(3, 4, 5) < 2**63


# --- encoding


class FakeModel:
    """Latent = mean colour of the image; counts what it was asked for."""

    def __init__(self) -> None:
        self.num_images = 0

    def encode_images(
        self, images: list[Image.Image], *, sample: bool = False, seed: object = None
    ) -> torch.Tensor:
        self.num_images += len(images)
        means = (
            torch.tensor(np.stack([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images]))
            / 255
        )
        means[means[:, 2] > 0.99] = float("nan")  # blue images break this encoder
        return means[:, :, None, None].expand(-1, -1, 2, 2)

    def encode_prompts(self, prompts: list[str]) -> SimpleNamespace:
        embeds = torch.arange(len(prompts), dtype=torch.float32)[:, None, None].expand(-1, 2, 3)
        return SimpleNamespace(prompt_embeds=embeds, pooled_prompt_embeds=embeds[:, 0], attention_mask=None)


def image(color: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_every_image_and_prompt_is_encoded_once() -> None:
    red, green, black = image("red"), image("lime"), image("black")
    pairs = [
        PreferencePair(prompt="p", chosen=red, rejected=green, votes_chosen=1, votes_rejected=3),
        PreferencePair(prompt="q", chosen=green, rejected=black),
        PreferencePair(prompt="p", chosen=red, rejected=black),
    ]
    model = FakeModel()
    encoded = encode_pairs(model, pairs, bayes=[0.1, 0.2, 0.3], batch_size=2)
    assert model.num_images == 3
    assert encoded.prompts == ["p", "q"]
    assert encoded.latents.dtype == torch.float16
    assert encoded.target.tolist() == [0.25, 1.0, 1.0]
    assert encoded.bayes is not None
    batch = encoded.batch([0])
    assert batch.latents_chosen[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert batch.latents_rejected[0, :, 0, 0].tolist() == [0.0, 1.0, 0.0]


def test_bad_images_are_rejects_or_an_error() -> None:
    good, broken = image("red"), b"no picture"
    pairs = [
        PreferencePair(prompt="p", chosen=good, rejected=broken),
        PreferencePair(prompt="q", chosen=image("blue"), rejected=good),  # NaN latent
        PreferencePair(prompt="r", chosen=good, rejected=image("black")),
    ]
    rejects: list[Reject] = []
    encoded = encode_pairs(FakeModel(), pairs, rejects=rejects)
    assert len(encoded) == 1
    assert encoded.prompts == ["r"]
    assert [(reject.row, reject.reason.split(":")[0]) for reject in rejects] == [
        (0, "unreadable image"),
        (1, "latent is not finite"),
    ]
    with pytest.raises(InvalidInputError, match="2 of 3 pairs cannot be encoded"):
        encode_pairs(FakeModel(), pairs)
    with pytest.raises(InvalidInputError, match="none of 1 pairs"):
        encode_pairs(FakeModel(), pairs[:1], rejects=rejects)


def test_one_size_is_needed_unless_resized() -> None:
    pairs = [PreferencePair(prompt="p", chosen=image("red"), rejected=image("lime", (16, 8)))]
    with pytest.raises(InvalidInputError, match="2 sizes"):
        encode_pairs(FakeModel(), pairs)
    assert encode_pairs(FakeModel(), pairs, size=(8, 8)).latents.shape[0] == 2


def test_fingerprint_sees_latents_that_changed_places() -> None:
    pairs = make_pairs()
    assert replace(pairs, latents=pairs.latents.flip(0)).fingerprint() != pairs.fingerprint()


def test_pairs_set_aside_share_no_prompt_and_no_picture() -> None:
    """Pictures 0 and 4 are the same in two rows; prompts 0 and 1 differ in case alone."""
    latents = torch.arange(12.0).reshape(12, 1, 1, 1)
    latents[4] = latents[0]
    pairs = LatentPairs(
        latents=latents,
        prompts=["A cat", "a cat.", "dog", "cow", "hen", "owl"],
        prompt_embeds=torch.zeros(6, 2, 3),
        prompt_index=torch.arange(6),
        chosen=torch.arange(0, 12, 2),
        rejected=torch.arange(1, 12, 2),
        target=torch.ones(6),
    )
    seen: set[tuple[int, ...]] = set()
    for seed in range(20):
        kept, aside = set_aside(pairs, 1 / 2, seed=seed)
        assert len(aside) == 3
        group = {0, 1, 2} & set(aside.prompt_index.tolist())
        assert group in (set(), {0, 1, 2})
        assert sorted([*kept.prompt_index.tolist(), *aside.prompt_index.tolist()]) == list(range(6))
        seen.add(tuple(aside.prompt_index.tolist()))
    assert len(seen) > 1
    assert len(set_aside(pairs, 1 / 2, max_pairs=1)[1]) == 1
