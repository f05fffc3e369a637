"""Shards are written: pairs in row groups of one latent shape, prompts once each."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_path

__all__ = ["FORMAT", "PromptRow", "prompt_hash", "write_pairs", "write_prompts"]

FORMAT = "dina-lrm latent shards 1"
PROMPT_GROUP_BYTES = 16 << 20
"""Embeddings in a row group of prompts, about."""


def prompt_hash(prompt: str) -> str:
    """Key of a prompt: 128 bits of its text.

    >>> prompt_hash("a red circle")
    '0ef7583c3ce18fee716bd6a7c8328fe5'
    """
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


def _pair_schema(metadata: Mapping[str, str]) -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.float32()
    columns = [
        ("prompt", text),
        ("prompt_hash", text),
        ("target", number),
        ("votes_chosen", number),
        ("votes_rejected", number),
        ("confidence", number),
        ("source", text),
        ("file", text),
        ("row", pa.int64()),
        ("chosen", text),
        ("rejected", text),
        ("latent_shape", pa.list_(pa.int32())),
        ("latents_chosen", pa.binary()),
        ("latents_rejected", pa.binary()),
    ]
    return pa.schema(columns, metadata=dict(metadata))


def write_pairs(
    path: Path,
    groups: Sequence[Sequence[Mapping[str, Any]]],
    *,
    rejects: Sequence[Mapping[str, Any]],
    num_items: int,
    pictures: Mapping[str, str | None],
) -> None:
    """One shard: a row group for each of `groups`, whose rows have one latent shape; whole or not at all.

    Args:
        rejects: of the part of the source that the shard covers; kept in the file, so that a shard accounts
            for everything it was made from.
        num_items: comparisons and rejects that the part holds.
        pictures: digest of every file that was looked at for it, by name; None for one that was not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    metadata = {"format": FORMAT, "num_items": str(num_items), "rejects": json.dumps(list(rejects))}
    metadata["pictures"] = json.dumps(dict(pictures))
    schema = _pair_schema(metadata)
    large = ("latents_chosen", "latents_rejected")
    options: Any = {
        "compression": {name: "NONE" if name in large else "ZSTD" for name in schema.names},
        "use_dictionary": ["prompt", "prompt_hash", "source", "file"],
        "write_statistics": ["row", "target"],
        "data_page_size": 64 << 20,
    }
    with atomic_path(path) as partial, parquet.ParquetWriter(partial, schema, **options) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(list(rows), schema=schema), row_group_size=len(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """What a backbone reads of one prompt."""

    prompt_embeds: Float[Tensor, "token dim"]
    pooled_prompt_embeds: Float[Tensor, " pooled"] | None
    attention_mask: Tensor | None
    """(token,) where the backbone uses one; padding at the end is cut off."""


def write_prompts(
    path: Path, prompts: Sequence[str], rows: Sequence[PromptRow], *, dtype: torch.dtype
) -> None:
    """One file of embeddings, stored as float16 or float32.

    Raises:
        InvalidInputError: an embedding is not finite at that precision.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def content(tensor: Tensor | None, prompt: str) -> bytes | None:
        if tensor is None:
            return None
        stored = tensor.detach().cpu().to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise InvalidInputError(
                f"the embedding of prompt {prompt!r} is not finite in {str(dtype).removeprefix('torch.')}"
            )
        return stored.contiguous().numpy().tobytes()

    records = [
        {
            "prompt": prompt,
            "prompt_hash": prompt_hash(prompt),
            "embeds_shape": list(row.prompt_embeds.shape),
            "prompt_embeds": content(row.prompt_embeds, prompt),
            "pooled_prompt_embeds": content(row.pooled_prompt_embeds, prompt),
            "attention_mask": None
            if row.attention_mask is None
            else row.attention_mask.cpu().to(torch.uint8).numpy().tobytes(),
        }
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("prompt_hash", pa.string()),
            ("embeds_shape", pa.list_(pa.int32())),
            ("prompt_embeds", pa.binary()),
            ("pooled_prompt_embeds", pa.binary()),
            ("attention_mask", pa.binary()),
        ],
        metadata={"format": FORMAT, "dtype": str(dtype).removeprefix("torch.")},
    )
    largest = max(len(record["prompt_embeds"]) for record in records)
    with (
        atomic_path(path) as partial,
        parquet.ParquetWriter(
            partial, schema, compression="NONE", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        table = pa.Table.from_pylist(records, schema=schema)
        writer.write_table(table, row_group_size=max(1, PROMPT_GROUP_BYTES // max(largest, 1)))
