"""Seeds from seeds: all that a run draws at random comes from its one seed, by streams that are apart.

    torch.Generator().manual_seed(mix_seeds(config.seed, Stream.PROMPTS, step))

So the draws of one purpose do not depend on how much was drawn for another, and a resumed run draws what it
would have drawn.
"""

import hashlib
from enum import IntEnum

import numpy as np

__all__ = ["Stream", "mix_seeds", "text_seed"]


class Stream(IntEnum):
    """What is drawn. The numbers are part of what a seed means: a new purpose gets a new one."""

    TRAINING_STEP = 0
    """Noise levels, noise and ensembles of an update of the reward."""
    VALIDATION_NOISE = 1
    DROPOUT = 2
    VALIDATION_SAMPLE = 3
    """Which pairs a validation looks at."""
    FIRST_WEIGHTS = 4
    """First weights of head and adapters, of a reward or a policy."""
    TRAINING_PAIRS = 5
    VALIDATION_PAIRS = 6
    TEST_PAIRS = 7
    CAPTIONS = 8
    """Prompts of the bundled world for an alignment run."""
    MORE_DRAWS = 9
    """Noise draws of an evaluation after the first."""

    SAMPLER_STEP = 31
    """Noise of a stochastic sampler's step."""

    PROMPTS = 41
    """Which prompts an update of the policy takes."""
    SAMPLES = 42
    """First noise of its samples."""
    EVALUATION = 43
    DIVERSITY = 44

    REFL_STOP = 51
    """At which step the reward is asked."""
    PRETRAINING = 52
    PRETRAINING_LEVEL = 53
    PRETRAINING_NOISE = 54

    DPO_LEVEL = 61
    DPO_NOISE = 62
    DPO_PAIRS = 63

    BRANCH = 71
    """Noise of the branches of one state."""
    NEXT_BRANCH = 72
    """Which branch goes on."""

    CANDIDATE = 81
    """First noise of a search's candidates."""


def text_seed(text: str) -> int:
    """A seed that follows from a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def mix_seeds(*parts: int) -> int:
    """One 63-bit seed from several, so that (0, 1) and (1, 0) give unrelated streams.

    >>> mix_seeds(0, 1) != mix_seeds(1, 0)
    True
    """
    word = np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))
