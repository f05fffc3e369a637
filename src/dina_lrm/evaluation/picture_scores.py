"""Scores of pictures as they come, each picture of a prompt once: memory holds a batch of pictures, and the
scores of all.

A part file keeps what was scored, so that a run that was stopped goes on where it was. It has one line a
batch, and a batch is made of the same pictures again, so the scores are those of a run that was never
stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dina_lrm.core.noise import torch_seed
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.data.pairs import ImageSource, load_image
from dina_lrm.errors import InvalidInputError
from dina_lrm.evaluation.cost import MeasuredCost, counted_flops, peak_memory_bytes, reset_peak_memory
from dina_lrm.evaluation.noise_sweep import Setting
from dina_lrm.models.reward_model import RewardModel

__all__ = ["PartFile", "PictureScores", "ScoreFunction", "ScoredBatch", "reward_scores"]

ScoreFunction = Callable[[list[str], list[Image.Image]], Mapping[str, Tensor]]
"""Scores of pictures for prompts, pair by pair: (batch,) or (draw, batch) by the name of what was computed.
The first is what the benchmark's figure is of; a model with one way of scoring gives one."""


def reward_scores(model: RewardModel, settings: Sequence[Setting], *, seed: int = 0) -> ScoreFunction:
    """Scores of a reward in several ways, by the label of each.

    Args:
        settings: the first is the benchmark's; averages of scores reuse single levels that are there too.
        seed: of the noise, the same for all pictures.
    """

    def draws(setting: Setting, prompts: list[str], images: list[Image.Image]) -> Tensor:
        return torch.stack(
            [
                model.score(
                    prompts,
                    images,
                    list(setting.noise_levels),
                    seed=seed if draw == 0 else torch_seed(mix_seeds(seed, Stream.MORE_DRAWS, draw)),
                    ensemble=setting.combine,
                ).scores
                for draw in range(setting.num_draws)
            ]
        )

    def score(prompts: list[str], images: list[Image.Image]) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for setting in settings:
            parts = [f"{level:g}" for level in setting.noise_levels]
            if (
                setting.combine == "scores"
                and setting.num_draws == 1
                and all(part in found for part in parts)
            ):
                found[setting.label] = torch.stack([found[part] for part in parts]).mean(dim=0)
            elif setting.label not in found:
                found[setting.label] = draws(setting, prompts, images)
        return found

    return score


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """Pictures that were scored together."""

    pictures: list[str]
    """Keys: digests of prompt and picture."""
    unreadable: dict[str, str]
    """Reasons, by key; these have no scores."""
    scores: dict[str, list[list[float]]]
    """(draw, picture) of the readable ones, by the name of what was computed."""
    seconds: float
    """Seconds of scoring, decoding aside."""
    flops: int | None
    """Floating-point operations to score one picture."""
    peak_memory_bytes: int


@dataclass(frozen=True)
class PartFile:
    """JSON lines of scored batches, appended as they come; the first line says what they were scored with."""

    path: Path
    settings: Mapping[str, Any]
    """Plain JSON types: everything that scores depend on. Batch size is not among them."""

    def read(self) -> Iterator[ScoredBatch]:
        """Batches in order; a last line that was not written whole is cut off.

        Raises:
            InvalidInputError: the file was written with other settings.
        """
        if not self.path.is_file():
            return
        whole = 0
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    record = None
                if record is None:
                    break
                if whole == 0:
                    self._check(record)
                else:
                    yield ScoredBatch(**record)
                whole += len(line)
        with self.path.open("rb+") as file:
            file.truncate(whole)

    def append(self, batch: ScoredBatch) -> None:
        """What is in the file survives the end of the process from here on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() == 0:
                file.write(json.dumps(dict(self.settings)).encode() + b"\n")
            file.write(json.dumps(asdict(batch), allow_nan=False).encode() + b"\n")

    def _check(self, found: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(dict(self.settings)))
        different = [name for name in sorted(ours.keys() | found.keys()) if ours.get(name) != found.get(name)]
        if different:
            raise InvalidInputError(
                f"{self.path} is left from an unfinished run with another {', '.join(different)}: "
                "repeat that run's options, or delete the file"
            )


class PictureScores:
    """Gather pictures into batches and score them, each picture of a prompt once.

    Args:
        score: `reward_scores` of a reward, or any other model.
        batch_size: pictures per call; no effect on the result.
        part: where scores are kept as they come; what it holds already is not scored again.

    Raises:
        InvalidInputError: `part` was written with other settings.
    """

    unreadable: dict[int, str]
    """Why a picture has no scores, by its number."""
    num_resumed: int
    """Pictures that `part` held; theirs are the first numbers."""

    def __init__(self, score: ScoreFunction, *, batch_size: int = 16, part: PartFile | None = None) -> None:
        self.unreadable = {}
        self._score, self._batch_size, self._part = score, batch_size, part
        self._numbers: dict[bytes, int] = {}
        self._waiting: dict[str, tuple[str, ImageSource]] = {}
        self._blocks: list[tuple[list[int], dict[str, NDArray[np.float64]]]] = []
        self._warm = False
        self._seconds, self._num_scored, self._peak_memory_bytes = 0.0, 0, 0
        self._flops: int | None = None
        for batch in () if part is None else part.read():
            self._keep(batch)
        self.num_resumed = len(self._numbers)
        reset_peak_memory()

    def add(self, prompt: str, name: str, image: ImageSource) -> int:
        """The picture's number, from 0; one that was not met before is scored with the next batch.

        Args:
            name: as `image_name` gives it, which tells a prompt's pictures apart.
        """
        digest = hashlib.blake2b(f"{prompt}\0{name}".encode(), digest_size=16).digest()
        if digest not in self._numbers:
            self._numbers[digest] = len(self._numbers)
            self._waiting[digest.hex()] = prompt, image
        number = self._numbers[digest]
        if len(self._waiting) == self._batch_size:
            self.flush()
        return number

    def flush(self) -> None:
        """Score what waits."""
        if not self._waiting:
            return
        unreadable: dict[str, str] = {}
        prompts: list[str] = []
        pictures: list[Image.Image] = []
        for key, (prompt, image) in self._waiting.items():
            try:
                pictures.append(load_image(image))
                prompts.append(prompt)
            except InvalidInputError as error:
                unreadable[key] = str(error)
        scores: dict[str, list[list[float]]] = {}
        seconds, flops = 0.0, None
        if pictures:
            if not self._warm:  # also loads what is loaded at first use, so that it is not timed below
                flops, self._warm = counted_flops(lambda: self._score(prompts[:1], pictures[:1])), True
            before = time.perf_counter()
            found = self._score(prompts, pictures)
            seconds = time.perf_counter() - before
            for label, values in found.items():
                rows = values.to(torch.float64).cpu().reshape(-1, len(pictures))
                if not rows.isfinite().all():
                    raise InvalidInputError(
                        f"a score of {label} is not finite, of prompt {prompts[0]!r} or beside"
                    )
                scores[label] = rows.tolist()
        batch = ScoredBatch(
            pictures=list(self._waiting),
            unreadable=unreadable,
            scores=scores,
            seconds=seconds,
            flops=flops,
            peak_memory_bytes=peak_memory_bytes(),
        )
        self._waiting.clear()
        if self._part is not None:
            self._part.append(batch)
        self._keep(batch)

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """(draw, picture) by the name of what was computed; NaN where a picture is unreadable."""
        self.flush()
        found: dict[str, NDArray[np.float64]] = {}
        for numbers, scores in self._blocks:
            for label, values in scores.items():
                if label not in found:
                    found[label] = np.full((len(values), len(self._numbers)), np.nan)
                found[label][:, numbers] = values
        return found

    def cost(self) -> MeasuredCost:
        """Cost of all batches, those of earlier runs included."""
        return MeasuredCost(
            flops=self._flops,
            seconds=self._seconds / max(self._num_scored, 1),
            peak_memory_bytes=self._peak_memory_bytes,
            batch_size=self._batch_size,
        )

    def _keep(self, batch: ScoredBatch) -> None:
        keys = [bytes.fromhex(key) for key in batch.pictures]
        numbers = {key.hex(): self._numbers.setdefault(key, len(self._numbers)) for key in keys}
        self.unreadable |= {numbers[key]: reason for key, reason in batch.unreadable.items()}
        readable = [number for key, number in numbers.items() if key not in batch.unreadable]
        scores = {label: np.array(values, dtype=np.float64) for label, values in batch.scores.items()}
        self._blocks.append((readable, scores))
        self._seconds += batch.seconds
        self._num_scored += len(readable)
        self._flops = batch.flops if self._flops is None else self._flops
        self._peak_memory_bytes = max(self._peak_memory_bytes, batch.peak_memory_bytes)
