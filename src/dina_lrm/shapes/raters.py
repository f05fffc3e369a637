"""Simulated raters: they see the gold utility through Gaussian noise and vote for what looks better to them.

This is Thurstone's law of comparative judgement (case V) with a known scale, so the probability of every
vote, and with it the accuracy of the best possible predictor, is known exactly.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, norm

Utility = float | np.ndarray
"""Gold utility of one picture, or of many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RaterPanel:
    """An odd number of raters who vote independently; the majority's choice is the pair's label."""

    num_raters: int = 5
    """Votes for each pair; odd, so that there is always a majority."""
    noise_std: float = 0.12
    """Standard deviation, in units of utility, with which one rater perceives one picture."""

    def __post_init__(self) -> None:
        if self.num_raters < 1 or self.num_raters % 2 == 0:
            raise ValueError(
                f"num_raters is odd and at least 1, so that there is a majority; got {self.num_raters}"
            )
        if not self.noise_std > 0:
            raise ValueError(f"noise_std is above 0; got {self.noise_std}")

    def vote_probability(self, utility_a: Utility, utility_b: Utility) -> np.ndarray:
        """P(one rater votes for a) = Phi((u_a - u_b) / (sqrt(2) noise_std))."""
        return np.asarray(norm.cdf(np.subtract(utility_a, utility_b) / (np.sqrt(2.0) * self.noise_std)))

    def majority_probability(self, utility_a: Utility, utility_b: Utility) -> np.ndarray:
        """P(most raters vote for a); the Bayes-optimal accuracy is the mean of max(p, 1 - p) over pairs."""
        return np.asarray(
            binom.sf(self.num_raters // 2, self.num_raters, self.vote_probability(utility_a, utility_b))
        )

    def votes_for_a(self, utility_a: Utility, utility_b: Utility, rng: np.random.Generator) -> np.ndarray:
        """Number of votes for a, of `num_raters`."""
        return np.asarray(rng.binomial(self.num_raters, self.vote_probability(utility_a, utility_b)))
