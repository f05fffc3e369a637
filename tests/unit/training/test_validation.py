"""What validation pairs decide at the end of a run, and where they decide nothing."""

import torch

from dina_lrm.core.calibration import fit_scale
from dina_lrm.training.result import calibrated
from dina_lrm.training.validation import ValidationMargins


def margins(**by_levels: list[float]) -> ValidationMargins:
    found = {(float(name.replace("_", ".")[1:]),): torch.tensor(values) for name, values in by_levels.items()}
    count = len(next(iter(found.values())))
    return ValidationMargins(
        by_levels=found, target=torch.ones(count), prompt=torch.arange(count, dtype=torch.int64)
    )


def test_the_best_level_and_its_scale() -> None:
    right, wrong = [1.0] * 30, [-0.5] * 10
    levels, fits, missing = calibrated(margins(s0_2=right[5:] + wrong + [-1.0] * 5, s0_6=right + wrong))
    assert levels == (0.6,)
    assert [one.noise_levels for one in fits] == [(0.6,), (0.2,)]  # the best one first
    assert fits[0].scale == fit_scale(torch.tensor(right + wrong), torch.ones(40))
    assert fits[1].scale > fits[0].scale
    assert missing is None


def test_a_candidate_that_is_always_wrong_has_no_scale() -> None:
    right, wrong = [1.0] * 30, [-0.5] * 10
    _, fits, _ = calibrated(margins(s0_2=[-1.0] * 40, s0_6=right + wrong))
    assert [one.noise_levels for one in fits] == [(0.6,)]


def test_a_coin_chooses_nothing() -> None:
    levels, fits, missing = calibrated(margins(s0_2=[1.0] * 22 + [-1.0] * 18, s0_6=[-1.0] * 40))
    assert (levels, fits) == (None, ())
    assert "22 of 40 validation pairs right, which a coin may get too" in str(missing)


def test_pairs_that_are_all_right_choose_a_level_and_no_scale() -> None:
    """The likelihood of their votes wants scale 0: the fit would end at its bound."""
    levels, fits, missing = calibrated(margins(s0_2=[1.0] * 40))
    assert (levels, fits) == ((0.2,), ())
    assert "do not determine a scale" in str(missing)
