"""P(a preferred to b) of every pair, worked out in the background and kept in the file of votes."""

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dina_lrm.data.pairs import load_image
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.models.scoring import preference_probability
from dina_lrm.serving.labelling.items import Items
from dina_lrm.serving.labelling.store import VoteStore

__all__ = ["Estimates", "model_digest"]

log = logging.getLogger("dina_lrm.serving.labelling")

PAIRS_AT_ONCE = 16
"""Scored, then kept: what is lost at most when the process is killed."""


class Estimates:
    """A thread that asks a reward about all pairs, in random order, so that any part of them is a sample.

    Args:
        load: gives the reward; called in the thread, so that pairs can be labelled meanwhile.
        on_failure: called, in the thread, with what kept the reward from giving its first probability. What
            stops it later is logged, and told by `status`.
        on_progress: called, in the thread, with the number of pairs done, and how many were known before.
    """

    def __init__(
        self,
        items: Items,
        store: VoteStore,
        load: Callable[[], RewardModel],
        *,
        seed: int = 0,
        on_failure: Callable[[Exception], None],
        on_progress: Callable[[int, int], None] = lambda done, found: None,
    ) -> None:
        self.items, self.store, self.load, self.seed = items, store, load, seed
        self.on_failure, self.on_progress = on_failure, on_progress
        self.probability: NDArray[np.float64] = np.full(len(items.pairs), np.nan)
        """(pair,), NaN where it is not known yet."""
        self.unscored: dict[int, str] = {}
        """Pairs that the reward cannot read, and why; they can be labelled all the same."""
        self.status = "is loading"
        self._scores: dict[tuple[str, int], float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reward estimates")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, and wait until it has."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._estimate(self.load())
        except Exception as error:
            self.status = f"stopped: {error}"
            if np.isnan(self.probability).all():
                self.on_failure(error)
            else:
                log.exception("the reward stopped; pairs it does not know come last")

    def _estimate(self, model: RewardModel) -> None:
        model.requires_grad_(False)
        digest = model_digest(model)
        for pair, probability in self.store.probabilities(digest).items():
            self.probability[pair] = probability
        missing = np.flatnonzero(np.isnan(self.probability))
        missing = np.random.default_rng(self.seed).permutation(missing).tolist()
        total = len(self.items.pairs)
        for start in range(0, len(missing), PAIRS_AT_ONCE):
            if self._stopping.is_set():
                return
            self.status = f"has looked at {total - len(missing) + start} of {total} pairs"
            found = self._probabilities(model, missing[start : start + PAIRS_AT_ONCE])
            self.store.add_probabilities(digest, found)
            for pair, probability in found.items():
                self.probability[pair] = probability
            done = min(start + PAIRS_AT_ONCE, len(missing))
            self.on_progress(total - len(missing) + done, total - len(missing))
        self.status = f"has looked at all {total} pairs"
        if self.unscored:
            self.status += f", and could not read {len(self.unscored)}"

    def _probabilities(self, model: RewardModel, pairs: Sequence[int]) -> dict[int, float]:
        try:
            return self._scored(model, pairs)
        except InvalidInputError as error:  # one bad picture: find out whose
            if len(pairs) == 1:
                self.unscored[pairs[0]] = str(error)
                log.warning("pair %d has no probability: %s", pairs[0], error)
                return {}
            return {key: p for pair in pairs for key, p in self._probabilities(model, [pair]).items()}

    def _scored(self, model: RewardModel, pairs: Sequence[int]) -> dict[int, float]:
        chosen = [self.items.pairs[pair] for pair in pairs]
        wanted = [(pair.prompt, side) for pair in chosen for side in (pair.a, pair.b)]
        new = [key for key in dict.fromkeys(wanted) if key not in self._scores]
        if new:
            pictures: list[Any] = [load_image(self.items.pictures[number]) for _, number in new]
            scores = model.score([prompt for prompt, _ in new], pictures, seed=0).scores.tolist()
            self._scores.update(zip(new, scores, strict=True))
        levels = model.config.noise_levels
        return {
            index: preference_probability(
                self._scores[pair.prompt, pair.a] - self._scores[pair.prompt, pair.b], levels, model.config
            )
            for index, pair in zip(pairs, chosen, strict=True)
        }


def model_digest(model: RewardModel) -> str:
    """Tells one reward from another by its settings and learned weights, wherever it lies."""
    checkpoint = model.checkpoint()
    digest = hashlib.blake2b(repr((checkpoint.config, checkpoint.fingerprint)).encode(), digest_size=16)
    for part in (checkpoint.head, checkpoint.logistic, checkpoint.adapter, checkpoint.backbone):
        for name, value in sorted((part or {}).items()):
            digest.update(name.encode())
            digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()
