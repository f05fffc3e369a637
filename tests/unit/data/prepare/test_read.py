"""Prepared folders as training reads them."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dina_lrm.build.pairs import prepare_source
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.shards.prompts import stack_prompts
from dina_lrm.data.shards.read import LatentShards
from dina_lrm.data.shards.write import PromptRow
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import rows_of
from tests.unit.data.prepare.files import save


def test_datasets_reads_the_folder(
    prepared: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    _, output, _ = prepared
    pairs = datasets.load_dataset(str(output), "pairs", split="train", streaming=True)
    rows = list(pairs)
    assert len(rows) == 11
    assert np.frombuffer(rows[0]["latents_chosen"], np.float16).reshape(rows[0]["latent_shape"]).ndim == 3
    assert len(list(datasets.load_dataset(str(output), "prompts", split="train", streaming=True))) == 3


def test_batches_of_shards_have_one_shape_and_become_float32(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    shards = LatentShards.open(output)
    assert len(shards) == 11
    assert len(shards.shapes) == 1
    for step in range(6):
        batch = shards.batch(shards.order(step, batch_size=4, seed=0)).to("cpu")
        assert batch.latents_chosen.shape == (4, *shards.shapes[0])
        assert batch.latents_chosen.dtype == batch.prompt_embeds.dtype == torch.float32


def test_a_small_cache_reads_the_same(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    large, small = LatentShards.open(output), LatentShards.open(output, cache_bytes=1)
    for indices in ([0, 7, 10], [3, 1]):
        assert torch.equal(large.batch(indices).latents_chosen, small.batch(indices).latents_chosen)
    assert len(small._read.tables) == 1


def test_pictures_of_one_draw_are_shared(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    shards = LatentShards.open(output)
    draws = torch.zeros(11, dtype=torch.int64)
    shared = shards.batch(range(11), draws=draws)
    assert len(shared.distinct) < 22
    both = torch.cat([shared.latents_chosen, shared.latents_rejected])
    assert torch.equal(both[shared.distinct][shared.position], both)


def test_subset_and_fingerprint(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    shards = LatentShards.open(output)
    part = shards.subset([4, 2])
    assert torch.equal(part.batch([1]).latents_chosen, shards.batch([2]).latents_chosen)
    assert part.fingerprint() != shards.fingerprint() == LatentShards.open(output).fingerprint()


def test_prompts_of_different_length_need_a_mask() -> None:
    def row(length: int, mask: bool) -> PromptRow:
        own = torch.ones(length, dtype=torch.int64) if mask else None
        return PromptRow(prompt_embeds=torch.ones(length, 3), pooled_prompt_embeds=None, attention_mask=own)

    embeds, _, mask = stack_prompts([row(2, True), row(4, True)])
    assert embeds.shape == (2, 4, 3)
    assert mask is not None
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    with pytest.raises(InvalidInputError, match="need an attention mask"):
        stack_prompts([row(2, False), row(4, False)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "is missing or damaged"),
        ("remove", "lacks 1 of its files"),
        ("manifest", r"manifest\.json is damaged"),
        ("other", "holds 'something', not"),
        ("nothing", "holds no latent shards"),
        ("split", "was split .* evaluate on .*/test"),
    ],
)
def test_damage_is_told(damage: str, message: str, prepared: tuple[Path, Path, Any], tmp_path: Path) -> None:
    import shutil

    output = Path(shutil.copytree(prepared[1], tmp_path / "copy"))
    file = output / "pairs/part-00000.parquet"
    match damage:
        case "truncate":
            file.write_bytes(file.read_bytes()[:-100])
        case "remove":
            file.unlink()
        case "manifest":
            (output / "manifest.json").write_text("{")
        case "other":
            (output / "manifest.json").write_text('{"format": "something"}')
        case _:
            output.rename(tmp_path / ("test" if damage == "split" else "copy"))
            output = tmp_path
    with pytest.raises(InvalidInputError, match=message):
        LatentShards.open(output)


def test_embeddings_that_overflow_float16_are_an_error(tmp_path: Path) -> None:
    from dina_lrm.data.shards.write import write_prompts

    row = PromptRow(prompt_embeds=torch.full((2, 3), 1e6), pooled_prompt_embeds=None, attention_mask=None)
    with pytest.raises(InvalidInputError, match="'a prompt' is not finite in float16"):
        write_prompts(tmp_path / "p.parquet", ["a prompt"], [row], dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_latent_pairs_and_shards_are_one_kind_of_set() -> None:
    names = ("order", "parts", "batch", "subset", "fingerprint", "examples", "num_prompts")
    assert all(hasattr(kind, name) for kind in (LatentPairs, LatentShards) for name in names)


@pytest.mark.long
def test_a_set_on_the_hub_is_streamed(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: `datasets` streams a local folder of the same layout."""
    import pyarrow
    import pyarrow.parquet as parquet

    from dina_lrm.build import pairs as build
    from dina_lrm.data.sources.hub import read_hub

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cells = [{"bytes": save(tmp_path / f"{n}.png", seed=n).read_bytes(), "path": f"{n}.png"} for n in (0, 1)]
    row = {"prompt": "a red circle", "left_image": cells[0], "right_image": cells[1]}
    row |= {"left_model": "l", "right_model": "r"}
    rows = [row | {"vote_type": vote} for vote in ("leftvote", "rightvote", "tievote")]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "test_v1-00000-of-00001.parquet")
    monkeypatch.setattr(build, "read_hub", partial(read_hub, dataset=str(tmp_path / "data")))
    counts = prepare_source("genai-bench", None, tmp_path / "latents", pipeline=str(tiny_pipeline))
    assert (counts.num_pairs, counts.rejects) == (2, {"tie": 1})
    first, second = rows_of(tmp_path / "latents/pairs/part-00000.parquet")
    assert first["latents_chosen"] == second["latents_rejected"]
    with pytest.raises(InvalidInputError, match="hpdv3 is not published as a table"):
        prepare_source("hpdv3", None, tmp_path / "other", pipeline=str(tiny_pipeline))
