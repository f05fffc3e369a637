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
    levels, scale, missing = calibrated(margins(s0_2=[-1.0] * 40, s0_6=right + wrong))
    assert levels == (0.6,)
    assert scale == fit_scale(torch.tensor(right + wrong), torch.ones(40))
    assert missing is None


def test_a_coin_chooses_nothing() -> None:
    levels, scale, missing = calibrated(margins(s0_2=[1.0] * 22 + [-1.0] * 18, s0_6=[-1.0] * 40))
    assert (levels, scale) == (None, None)
    assert "22 of 40 validation pairs right, which a coin may get too" in str(missing)


def test_pairs_that_are_all_right_choose_a_level_and_no_scale() -> None:
    """The likelihood of their votes wants scale 0: the fit would end at its bound."""
    levels, scale, missing = calibrated(margins(s0_2=[1.0] * 40))
    assert (levels, scale) == ((0.2,), None)
    assert "do not determine a scale" in str(missing)
