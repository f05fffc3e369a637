"""Four updates of ReFL on the bundled generator, watched by the judge; a real run takes minutes, not seconds.

python examples/align_a_generator.py
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from dina_lrm.build.alignment import run_alignment
from dina_lrm.recipes.alignment import alignment_recipe

recipe = alignment_recipe("refl", "shapes")
folder = Path(tempfile.mkdtemp()) / "aligned"
config = replace(
    recipe,
    output=str(folder),
    num_steps=4,
    cpu=True,
    monitor=replace(recipe.monitor, every=2, num_prompts=16),
)
policy, result = run_alignment(config, log=print)
for evaluation in result.evaluations:
    proxy = sum(evaluation.proxy) / len(evaluation.proxy)
    print(f"update {evaluation.step}: reward {proxy:.2f}, judge {evaluation.mean_gold:.3f}")
print(f"LoRA for pipeline.load_lora_weights: {folder}; curves and pictures: {folder / 'report.html'}")
