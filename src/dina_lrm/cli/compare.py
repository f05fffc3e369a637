"""`dina-lrm compare PROMPT A B`: which of two images people would prefer, as a probability."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.options import JsonFlag, ModelOptions, NoiseLevels, read_image, scoring_levels


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Probability that image A is preferred to image B for a prompt."""

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What the images should show."""
    image_a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """A file."""
    image_b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """A file."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    noise_levels: NoiseLevels = ()
    """0 is clean, 1 is pure noise; several are one ensemble; auto: the model's own."""
    seed: int = 0
    """Of the noise; both images get the same."""
    adaptive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """View the images one noise level after another and stop when it is settled which leads, instead of at
    --noise-levels. The reward must have learned this: dina-lrm evaluate --learn-views."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Compare, prog="dina-lrm compare", args=arguments)
    images = [read_image(path) for path in (options.image_a, options.image_b)]
    model = options.model.load()
    if options.adaptive:
        if options.noise_levels:
            raise UsageError("--adaptive chooses the noise levels: leave out --noise-levels")
        found = model.compare_views(options.prompt, *images, seed=options.seed)
        probability, views = found.probability, found.views
        assert model.config.adaptive is not None
        levels = list(model.config.adaptive.noise_levels[:views])
    else:
        levels, views = scoring_levels(options.noise_levels, model), None
        probability = float(model.compare(options.prompt, *images, noise_levels=levels, seed=options.seed))
    if options.as_json:
        print_json(
            {
                "prompt": options.prompt,
                "image_a": str(options.image_a),
                "image_b": str(options.image_b),
                "probability_a_preferred": probability,
                "noise_levels": levels if isinstance(levels, list) else [levels],
                "views": views,
                "seed": options.seed,
                "model": options.model.model,
            }
        )
        return 0
    rows = [
        (str(options.image_a), f"{probability:.1%}"),
        (str(options.image_b), f"{1 - probability:.1%}"),
    ]
    print_table(["image", "preferred"], rows, title=options.prompt)
    if views is not None:
        log(f"settled after {views} views of each image")
    return 0
