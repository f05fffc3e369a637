"""One shard of a preparation: its pictures are read, put into buckets, encoded and written."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dina_lrm.data.buckets import Size, needs_padding, pair_bucket, place
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.encode import NOT_FINITE, encoded_images
from dina_lrm.data.pairs import ImageSource, Reject, StoredLatent, image_name, image_size, load_image
from dina_lrm.data.prepare.settings import PairEncoder, PrepareSettings, unwanted
from dina_lrm.data.shards.write import PromptRow, prompt_hash, write_pairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import content_digest
from dina_lrm.images import rgb_tensor

PICTURES_PER_CALL = 16
PROMPTS_PER_CALL = 16


@dataclass
class Worker:
    """What a process holds."""

    encoder: PairEncoder
    device: torch.device
    root: Path
    """Pictures are named relative to it."""


def prompt_rows(conditioning: Any) -> list[PromptRow]:
    """One row a prompt, on the CPU, without the padding at its end."""
    mask, pooled = conditioning.attention_mask, conditioning.pooled_prompt_embeds
    rows = []
    for index, embeds in enumerate(conditioning.prompt_embeds.detach().float().cpu()):
        own = None if mask is None else mask[index].cpu().long()
        length = len(embeds) if own is None else int(own.nonzero().max()) + 1
        rows.append(
            PromptRow(
                prompt_embeds=embeds[:length],
                pooled_prompt_embeds=None if pooled is None else pooled[index].detach().float().cpu(),
                attention_mask=None if own is None else own[:length],
            )
        )
    return rows


class Shard:
    """A part of the stream on its way to a file. Every item ends as a row or as a reject."""

    def __init__(
        self, items: Sequence[Comparison | Reject], settings: PrepareSettings, worker: Worker
    ) -> None:
        self.items, self.settings, self.worker = items, settings, worker
        self.rejects: dict[int, Reject] = {}
        self.sizes: dict[ImageSource, Size | str] = {}
        self.digests: dict[ImageSource, str | None] = {}

    def write(self, file: Path) -> None:
        wanted: dict[Size, list[int]] = {}
        stored: list[int] = []
        for index, item in enumerate(self.items):
            if isinstance(item, Reject):
                self.rejects[index] = item
                continue
            asked = {"ties": self.settings.ties, "min_confidence": self.settings.min_confidence}
            if (fault := unwanted(item, **asked)) is not None:
                self._reject(index, fault)
            elif isinstance(item.pair.chosen, StoredLatent):
                stored.append(index)
            else:
                bucket = self._bucket(item)
                if isinstance(bucket, str):
                    self._reject(index, bucket)
                else:
                    wanted.setdefault(bucket, []).append(index)
        by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for bucket in sorted(wanted):
            for row in self._encoded(bucket, wanted[bucket]):
                by_shape.setdefault(tuple(row["latent_shape"]), []).append(row)
        for row in self._stored(stored):
            by_shape.setdefault(tuple(row["latent_shape"]), []).append(row)
        size = self.settings.pairs_per_row_group
        groups = [
            by_shape[shape][start : start + size]
            for shape in sorted(by_shape)
            for start in range(0, len(by_shape[shape]), size)
        ]
        rejects = [asdict(self.rejects[index]) for index in sorted(self.rejects)]
        pictures = {self._name(one): digest for one, digest in self.digests.items() if isinstance(one, Path)}
        write_pairs(file, groups, rejects=rejects, num_items=len(self.items), pictures=pictures)

    def _reject(self, index: int, reason: str) -> None:
        self.rejects[index] = self._comparison(index).reject(reason)

    def _bucket(self, item: Comparison) -> Size | str:
        """Size of both sides, or what is wrong."""
        pair = item.pair
        sizes = [self._size(side) for side in (pair.chosen, pair.rejected)]
        for size in sizes:
            if isinstance(size, str):
                return size
        if self.digests[pair.chosen] == self.digests[pair.rejected]:  # both have a size, so both were read
            return f"same picture: on both sides, {self._name(pair.chosen)}"
        first, second = (size for size in sizes if not isinstance(size, str))
        bucket = pair_bucket(first, second)
        if self.settings.mixed_sizes == "reject" and any(needs_padding(s, bucket) for s in (first, second)):
            return f"aspect ratios differ: {first[1]}x{first[0]} and {second[1]}x{second[0]}"
        return bucket

    def _size(self, image: ImageSource) -> Size | str:
        if image not in self.sizes:
            # Before it is decoded: if it is replaced meanwhile, the next run finds another digest.
            match image:
                case Path():
                    self.digests[image] = content_digest(image)
                case bytes():
                    self.digests[image] = hashlib.sha256(image).hexdigest()
            try:
                height, width = image_size(image)
                self.sizes[image] = self.worker.encoder.picture_size(height, width)
            except InvalidInputError as error:
                self.sizes[image] = self._reason(image, error)
        return self.sizes[image]

    def _encoded(self, bucket: Size, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows of the pairs of one bucket; every picture is encoded once."""
        sides: dict[ImageSource, None] = {}
        for index in indices:
            pair = self._comparison(index).pair
            sides |= dict.fromkeys((pair.chosen, pair.rejected))
        images = list(sides)

        def load(image: ImageSource) -> Tensor:
            own = self._size(image)
            assert not isinstance(own, str)
            return place(rgb_tensor(load_image(image)), bucket, own)

        def encode(pictures: list[Tensor], _: list[int]) -> Sequence[Tensor]:
            return self.worker.encoder.encode_images(pictures, self.worker.device)

        latents: dict[ImageSource, np.ndarray | str] = {}
        results = encoded_images(images, load, encode, batch_size=PICTURES_PER_CALL)
        for image, latent in zip(images, results, strict=True):
            if isinstance(latent, InvalidInputError):
                latents[image] = self._reason(image, latent)
            else:
                latents[image] = latent.numpy()
        for index in indices:
            pair = self._comparison(index).pair
            yield from self._row(index, latents[pair.chosen], latents[pair.rejected])

    def _stored(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows of pairs that come as latents."""
        for index in indices:
            pair, sides = self._comparison(index).pair, []
            for side in (pair.chosen, pair.rejected):
                assert isinstance(side, StoredLatent)
                try:
                    half = side.array().astype(np.float16)
                    sides.append(half if np.isfinite(half).all() else "latent is not finite: in float16")
                except InvalidInputError as error:
                    sides.append(str(error))
            shapes = {side.shape for side in sides if not isinstance(side, str)}
            if len(shapes) > 1:
                sides[0] = f"latents differ in shape: {sorted(shapes)}"
            yield from self._row(index, *sides)

    def _row(
        self, index: int, chosen: np.ndarray | str, rejected: np.ndarray | str
    ) -> Iterator[dict[str, Any]]:
        for side in (chosen, rejected):
            if isinstance(side, str):
                self._reject(index, side)
                return
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        item = self._comparison(index)
        pair = item.pair
        yield {
            "prompt": pair.prompt,
            "prompt_hash": prompt_hash(pair.prompt),
            "target": pair.target,
            "votes_chosen": pair.votes_chosen,
            "votes_rejected": pair.votes_rejected,
            "confidence": item.confidence,
            "source": pair.source,
            "file": item.file,
            "row": item.row,
            "chosen": self._name(pair.chosen),
            "rejected": self._name(pair.rejected),
            "latent_shape": list(chosen.shape),
            "latents_chosen": np.ascontiguousarray(chosen).tobytes(),
            "latents_rejected": np.ascontiguousarray(rejected).tobytes(),
        }

    def _reason(self, image: ImageSource, error: InvalidInputError) -> str:
        """With the picture's name from the root; what it is too small for is said under one heading."""
        if str(error) == NOT_FINITE:
            return f"{error}: {self._name(image)}"
        text = str(error).replace(str(image), self._name(image)) if isinstance(image, Path) else str(error)
        known = text.startswith(("missing file", "no file", "unreadable image", "no picture"))
        return text if known else f"size: {self._name(image)}: {text}"

    def _name(self, image: ImageSource) -> str:
        if isinstance(image, Path):
            root = self.worker.root
            return image_name(image.relative_to(root) if image.is_relative_to(root) else image)
        if isinstance(image, StoredLatent):
            return image.name
        assert isinstance(image, bytes)
        return f"sha256:{hashlib.sha256(image).hexdigest()[:32]}"

    def _comparison(self, index: int) -> Comparison:
        item = self.items[index]
        assert isinstance(item, Comparison)
        return item
