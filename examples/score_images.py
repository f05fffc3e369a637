"""Score pictures against a prompt: at one noise level, as an ensemble, and with a standard error."""

import numpy as np

import dina_lrm
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene

rng = np.random.default_rng(0)
spec = sample_caption(rng, num_objects=2)
right = render(sample_scene(rng, spec))
wrong = render(sample_scene(rng, change_attribute(rng, spec)))

model = dina_lrm.RewardModel.from_pretrained("bundled")
single = model.score([spec.caption] * 2, [right, wrong], noise_levels=0.4, seed=0)
ensemble = model.score([spec.caption] * 2, [right, wrong], noise_levels=[0.2, 0.5, 0.7], seed=0)
averaged = model.score([spec.caption] * 2, [right, wrong], noise_levels=0.4, num_draws=8, seed=0)

print(spec.caption)
assert averaged.standard_errors is not None
for row, name in enumerate(("as described", "one thing changed")):
    print(
        f"  {name:<18} {single.scores[row]:+.3f}   ensemble {ensemble.scores[row]:+.3f}   "
        f"8 draws {averaged.scores[row]:+.3f} ± {averaged.standard_errors[row]:.3f}"
    )
print(f"  P(first preferred) = {model.compare(spec.caption, right, wrong):.2f}")
