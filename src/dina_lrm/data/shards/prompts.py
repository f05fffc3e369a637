"""Embeddings of prompts, read when they are asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dina_lrm.data.shards.columns import CACHE_BYTES, RowGroups, open_file, tensor_of
from dina_lrm.data.shards.write import PromptRow, prompt_hash
from dina_lrm.errors import InvalidInputError

__all__ = ["PromptTable", "stack_prompts"]


class PromptTable:
    """Embeddings of prompts by their text, read from files when they are asked for."""

    def __init__(self, files: Sequence[Path], cache_bytes: int = CACHE_BYTES) -> None:
        names = ["prompt_embeds", "embeds_shape", "pooled_prompt_embeds", "attention_mask"]
        self.read = RowGroups(names, cache_bytes)
        self.places: dict[str, tuple[Path, int, int]] = {}
        self.dtypes: dict[Path, np.dtype] = {}
        for file in files:
            opened = open_file(file)
            self.dtypes[file] = np.dtype(opened.schema_arrow.metadata[b"dtype"].decode())
            for group in range(opened.num_row_groups):
                hashes = opened.read_row_group(group, columns=["prompt_hash"]).column(0).to_pylist()
                self.places |= {one: (file, group, row) for row, one in enumerate(hashes)}

    def __call__(self, prompts: Sequence[str]) -> list[PromptRow]:
        return [self._row(prompt) for prompt in prompts]

    def _row(self, prompt: str) -> PromptRow:
        place = self.places.get(prompt_hash(prompt))
        if place is None:
            raise InvalidInputError(f"no embedding of prompt {prompt!r} among {len(self.places)}")
        file, group, row = place
        table = self.read(file, group)
        cells = {name: table.column(name)[row] for name in table.column_names}

        def tensor(name: str, shape: Sequence[int]) -> Tensor | None:
            cell = cells[name]
            return tensor_of(cell.as_buffer(), self.dtypes[file], shape) if cell.is_valid else None

        embeds = tensor("prompt_embeds", cells["embeds_shape"].as_py())
        assert embeds is not None
        mask = cells["attention_mask"]
        return PromptRow(
            prompt_embeds=embeds,
            pooled_prompt_embeds=tensor("pooled_prompt_embeds", (-1,)),
            attention_mask=torch.from_numpy(np.frombuffer(mask.as_buffer(), np.uint8).astype(np.int64))
            if mask.is_valid
            else None,
        )


def stack_prompts(rows: Sequence[PromptRow]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Embeddings, pooled embeddings and mask of a batch, as long as its longest prompt.

    Raises:
        InvalidInputError: prompts of different length, and no mask that says what padding is.
    """
    length = max(len(row.prompt_embeds) for row in rows)
    masked = [row.attention_mask for row in rows if row.attention_mask is not None]
    if len(masked) not in (0, len(rows)) or (
        not masked and any(len(row.prompt_embeds) != length for row in rows)
    ):
        raise InvalidInputError("prompts of different length need an attention mask each")

    def padded(tensor: Tensor) -> Tensor:
        more = length - len(tensor)
        return torch.nn.functional.pad(tensor, (0, 0, 0, more) if tensor.ndim == 2 else (0, more))

    pooled = [row.pooled_prompt_embeds for row in rows]
    return (
        torch.stack([padded(row.prompt_embeds) for row in rows]),
        None if pooled[0] is None else torch.stack([one for one in pooled if one is not None]),
        torch.stack([padded(mask) for mask in masked]) if masked else None,
    )
