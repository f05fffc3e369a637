"""Preference pairs as latents: what a reward is trained and measured on.

Each image is encoded once, however many pairs it is in, and each prompt once, however many images. A
`LatentPairs` holds one latent size and fits in memory; it is one safetensors file on disk. The order of
batches is a pure function of (seed, step), so resuming a run is arithmetic and no loader has a state.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dina_lrm.core.tensors import Latents
from dina_lrm.data.order import batch_indices, distinct_images, drawn_prompts
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_path

__all__ = ["LatentPairs", "PairBatch"]

_FORMAT = "dina-lrm latent pairs 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Some pairs, gathered: row i of every tensor belongs to pair i."""

    latents_chosen: Latents
    latents_rejected: Latents
    prompt_embeds: Float[Tensor, "batch token dim"]
    pooled_prompt_embeds: Float[Tensor, "batch pooled"] | None
    attention_mask: Tensor | None
    target: Float[Tensor, " batch"]
    distinct: Int64[Tensor, " distinct"]
    """Rows of [latents_chosen; latents_rejected] that have to be scored: an image once per noise draw."""
    position: Int64[Tensor, " sides"]
    """For each of the 2 x batch sides, where in `distinct` its image stands."""

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same on a device, in float32; converted there, so that stored precision is what travels."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.to(device, non_blocking=True)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        return PairBatch(**tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentPairs:
    """Pairs that point into a table of latents and a table of prompts.

    `target` is the share of votes for `chosen`, below 0.5 when a majority preferred the other side.
    `bayes`, known only for simulated raters, is the probability under their distribution that `chosen` is
    preferred.
    """

    latents: Float[Tensor, "image channel *frame height width"]
    """Already shifted and scaled; float16 or float32. A video has a frame axis before height."""
    prompts: list[str]
    prompt_embeds: Float[Tensor, "prompt token dim"]
    prompt_index: Int64[Tensor, " pair"]
    """Row of `prompts` of each pair."""
    chosen: Int64[Tensor, " pair"]
    """Row of `latents` of each pair's preferred image."""
    rejected: Int64[Tensor, " pair"]
    """Row of `latents` of each pair's other image."""
    target: Float[Tensor, " pair"]
    pooled_prompt_embeds: Float[Tensor, "prompt pooled"] | None = None
    attention_mask: Tensor | None = None
    """(prompt, token) where the backbone uses one."""
    bayes: Float[Tensor, " pair"] | None = None
    latent_space: str | None = None
    """VAE class and normalisation the latents come from; None: not known. Many families have 16 channels."""

    def __post_init__(self) -> None:
        num_images, num_prompts = len(self.latents), len(self.prompts)
        if self.latents.ndim not in (4, 5):
            raise InvalidInputError(
                f"latents have shape {tuple(self.latents.shape)}: need (image, channel, height, width), "
                "or a frame axis before height"
            )
        for name in ("prompt_embeds", "pooled_prompt_embeds", "attention_mask"):
            table = getattr(self, name)
            if table is not None and len(table) != num_prompts:
                raise InvalidInputError(f"{name} has {len(table)} rows for {num_prompts} prompts")
        for name, limit in (("prompt_index", num_prompts), ("chosen", num_images), ("rejected", num_images)):
            rows = getattr(self, name)
            if len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < limit):
                raise InvalidInputError(f"{name} points to row {int(rows.max())} of a table of {limit}")
        for name in ("prompt_index", "rejected", "target", "bayes"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.chosen):
                raise InvalidInputError(f"{name} has {len(column)} entries for {len(self.chosen)} pairs")
        for name in ("target", "bayes"):
            column = getattr(self, name)
            if column is not None and not bool(((column >= 0) & (column <= 1)).all()):  # NaN fails too
                raise InvalidInputError(f"{name} must lie in [0, 1] for every pair")
        if not bool(torch.isfinite(self.latents).all()):
            bad = (~torch.isfinite(self.latents).flatten(1).all(1)).nonzero().flatten().tolist()
            raise InvalidInputError(f"latents are not finite in {len(bad)} images, first in row {bad[0]}")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def num_prompts(self) -> int:
        """Prompts that at least one pair uses: the number of clusters in a bootstrap."""
        return len(self.prompt_index.unique())

    def batch(
        self,
        indices: Tensor | Sequence[int],
        *,
        draws: Int64[Tensor, " batch"] | None = None,
    ) -> PairBatch:
        """Gather the pairs of these indices, in this order, as float32.

        Args:
            draws: which noise draw each pair uses. Pairs of one prompt and one draw share what is computed
                for an image that is in several of them. None: every pair has a draw of its own.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        distinct, position = distinct_images(self.chosen[rows], self.rejected[rows], draws)

        def gather(table: Tensor | None, index: Tensor) -> Any:
            if table is None:
                return None
            picked = table.index_select(0, index)
            return picked.float() if picked.is_floating_point() else picked

        prompt = self.prompt_index[rows]
        mask, embeds = self.attention_mask, self.prompt_embeds
        if mask is not None:  # as long as the longest prompt of the batch
            length = int(mask[prompt].any(dim=0).nonzero().max()) + 1
            mask, embeds = mask[:, :length], embeds[:, :length]
        return PairBatch(
            latents_chosen=gather(self.latents, self.chosen[rows]),
            latents_rejected=gather(self.latents, self.rejected[rows]),
            prompt_embeds=gather(embeds, prompt),
            pooled_prompt_embeds=gather(self.pooled_prompt_embeds, prompt),
            attention_mask=gather(mask, prompt),
            target=gather(self.target, rows),
            distinct=distinct,
            position=position,
        )

    def order(
        self, step: int, *, batch_size: int, seed: int, by_prompt: bool = False
    ) -> Int64[Tensor, " batch"]:
        """Indices of the pairs of a step: see `batch_indices`."""
        groups = self.prompt_index if by_prompt else None
        return batch_indices(len(self), batch_size, seed=seed, step=step, groups=groups)

    def parts(self, indices: Tensor, size: int) -> Sequence[Tensor]:
        """The same pairs in parts of at most `size`, each of one latent shape: here all are."""
        return indices.split(size)

    @property
    def examples(self) -> Int64[Tensor, " shape"]:
        """One pair of each latent shape."""
        return torch.arange(min(1, len(self)))

    def subset(self, indices: Tensor | Sequence[int]) -> "LatentPairs":
        """The pairs of these indices; the tables of latents and prompts are shared, not copied."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            prompt_index=self.prompt_index[rows],
            chosen=self.chosen[rows],
            rejected=self.rejected[rows],
            target=self.target[rows],
            bayes=None if self.bayes is None else self.bayes[rows],
        )

    def split_by_prompt(self, fraction: float, *, seed: int = 0) -> tuple["LatentPairs", "LatentPairs"]:
        """Two parts that share no prompt; the second holds about `fraction` of the prompts."""
        held_out = drawn_prompts(self.prompt_index, fraction, seed)
        return self.subset((~held_out).nonzero().flatten()), self.subset(held_out.nonzero().flatten())

    def fingerprint(self) -> str:
        """Changes when the pairs, their order, their targets or the latents' values change."""
        digest = hashlib.sha256(json.dumps([self.prompts, list(self.latents.shape)]).encode())
        for column in (self.prompt_index, self.chosen, self.rejected, self.target, self.latents):
            digest.update(column.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def picture(self) -> Int64[Tensor, " image"]:
        """Number of the picture in each row of `latents`; rows of equal content are one picture."""
        rows = self.latents.cpu().contiguous().numpy()
        known: dict[bytes, int] = {}
        digests = (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
        return torch.tensor([known.setdefault(digest, len(known)) for digest in digests], dtype=torch.int64)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        tensors = {
            field.name: value.cpu().contiguous()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        metadata = {"format": _FORMAT, "prompts": json.dumps(self.prompts)}
        if self.latent_space is not None:
            metadata["latent_space"] = self.latent_space
        with atomic_path(Path(path)) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "LatentPairs":
        """Read a file that `save` wrote; anything else is an error that says why."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no latent pairs at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise InvalidInputError(f"{path} is not a readable safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise InvalidInputError(f"{path} holds {metadata.get('format')!r}, not {_FORMAT!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(tensors) - known)
        missing = sorted(
            {"latents", "prompt_embeds", "prompt_index", "chosen", "rejected", "target"} - set(tensors)
        )
        if unknown or missing:
            raise InvalidInputError(f"{path}: missing tensors {missing}, unknown tensors {unknown}")
        space = metadata.get("latent_space")
        return cls(prompts=json.loads(metadata["prompts"]), latent_space=space, **tensors)

    @classmethod
    def concatenate(cls, parts: Sequence["LatentPairs"]) -> "LatentPairs":
        """All pairs of several sets, in order; a prompt that two sets share stays two.

        Raises:
            InvalidInputError: there are no sets, their latents or prompt embeddings differ in shape, their
                latents come from different VAEs, or only some of them have a pooled embedding, a mask, or a
                known distribution of the raters.
        """
        if not parts:
            raise InvalidInputError("there are no pairs to join")
        parts = _equal_tokens(parts)
        tables: dict[str, Tensor | None] = {}
        for name in ("latents", "prompt_embeds", "pooled_prompt_embeds", "attention_mask", "target", "bayes"):
            values = [getattr(part, name) for part in parts]
            shapes = {None if value is None else tuple(value.shape[1:]) for value in values}
            if len(shapes) > 1:
                raise InvalidInputError(f"sets of pairs differ in {name}: shapes {sorted(map(str, shapes))}")
            tables[name] = None if values[0] is None else torch.cat(values)
        spaces = {part.latent_space for part in parts}
        if len(spaces) > 1:
            raise InvalidInputError(f"sets of pairs come from different VAEs: {sorted(map(str, spaces))}")
        rows: dict[str, list[Tensor]] = {"prompt_index": [], "chosen": [], "rejected": []}
        num_images = num_prompts = 0
        for part in parts:
            rows["prompt_index"].append(part.prompt_index + num_prompts)
            rows["chosen"].append(part.chosen + num_images)
            rows["rejected"].append(part.rejected + num_images)
            num_images, num_prompts = num_images + len(part.latents), num_prompts + len(part.prompts)
        columns: dict[str, Any] = tables | {name: torch.cat(column) for name, column in rows.items()}
        prompts = [prompt for part in parts for prompt in part.prompts]
        return cls(prompts=prompts, latent_space=spaces.pop(), **columns)


def _equal_tokens(parts: Sequence[LatentPairs]) -> Sequence[LatentPairs]:
    """Prompts of different length, padded and masked, where a mask says that padding is not looked at."""
    length = max(part.prompt_embeds.shape[1] for part in parts)
    if all(part.attention_mask is None for part in parts):
        return parts
    padded = []
    for part in parts:
        mask = part.attention_mask
        if mask is None:
            mask = torch.ones(part.prompt_embeds.shape[:2], dtype=torch.long)
        more = length - mask.shape[1]
        embeds = torch.nn.functional.pad(part.prompt_embeds, (0, 0, 0, more))
        mask = torch.nn.functional.pad(mask, (0, more))
        padded.append(replace(part, prompt_embeds=embeds, attention_mask=mask))
    return padded


# --- order -------------------------------------------------------------------------------------------------


# --- encoding ----------------------------------------------------------------------------------------------
