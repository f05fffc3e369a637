"""The method in pure functions: noise, likelihood, ensembling, flow steps. Tensors in, tensors out.

Nothing here knows a model, a file or a config, and nothing of this package is imported from outside `core`.
"""

from dina_lrm.core.ensemble import average_levels, concatenate_levels, mean_and_standard_error, unfold_levels
from dina_lrm.core.flow import clean_and_noise, ddim_step, euler_step, sigma_grid
from dina_lrm.core.likelihood import (
    bradley_terry_log_likelihood,
    constant_thurstone_log_likelihood,
    fidelity_loss,
    log_normal_cdf,
    negative_log_likelihood,
    pairwise_loss,
    preference_log_likelihood,
    thurstone_log_likelihood,
    votes_to_target,
    win_probability,
)
from dina_lrm.core.noise import (
    MatchedLevel,
    NoiseSchedule,
    sample_noise_levels,
    seeded_generator,
    seeded_noise,
    torch_seed,
)

__all__ = [
    "MatchedLevel",
    "NoiseSchedule",
    "average_levels",
    "bradley_terry_log_likelihood",
    "clean_and_noise",
    "concatenate_levels",
    "constant_thurstone_log_likelihood",
    "ddim_step",
    "euler_step",
    "fidelity_loss",
    "log_normal_cdf",
    "mean_and_standard_error",
    "negative_log_likelihood",
    "pairwise_loss",
    "preference_log_likelihood",
    "sample_noise_levels",
    "seeded_generator",
    "seeded_noise",
    "sigma_grid",
    "thurstone_log_likelihood",
    "torch_seed",
    "unfold_levels",
    "votes_to_target",
    "win_probability",
]
