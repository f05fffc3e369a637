"""`dina-lrm compare PROMPT A B`: which of two images people would prefer, as a probability; or a file of
pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.file_mode import FileOptions, refuse_file_flags, run_file
from dina_lrm.cli.listed import find_pictures
from dina_lrm.cli.options import JsonFlag, ModelOptions, check_prompt, parse, refuse
from dina_lrm.scaling.settings import COMPARE, Viewing


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Probability that image A is preferred to image B for a prompt, or for every row of a file.

    The rows of --input have the columns prompt, image_a and image_b.
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """What the images should show. Not with --input."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="A B")] = ()
    """The two picture files."""
    file: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    viewing: Annotated[Viewing, tyro.conf.arg(name="")] = field(default_factory=Viewing)
    adaptive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Score the images one noise level after another and stop when it is decided which leads, instead of at
    --noise-levels. The reward must have learned this: dina-lrm evaluate --learn-levels."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    options = parse(Compare, "compare", arguments)
    if options.adaptive:
        refuse(arguments, ["--noise-levels", "--num-draws"], "is chosen by --adaptive: leave it out")
    if options.file.input is not None:
        if options.prompt or options.images:
            raise UsageError("--input brings its own prompts and images; leave out the others")
        refuse(arguments, ["--adaptive"], "is for two images on the command line")
        scoring = options.viewing.scoring()
        return run_file(options.file, options.model, scoring, COMPARE, as_json=options.as_json)
    refuse_file_flags(arguments)
    refuse(arguments, ["--batch-size"], "goes with --input")
    check_prompt("compare", options.prompt, options.images)
    if not options.prompt.strip() or len(options.images) != 2:
        raise UsageError(
            'give a prompt and two images, as in: dina-lrm compare "a red circle" a.png b.png; '
            "or --input FILE"
        )
    return compare_images(options)


def compare_images(options: Compare) -> int:
    """The probability for one pair."""
    from dina_lrm.data.pairs import load_image

    prompt, viewing = options.prompt, options.viewing
    find_pictures(options.images, skip_bad=None)
    pictures = [load_image(Path(name)) for name in options.images]
    model = options.model.load()
    if options.adaptive:
        comparison = model.compare_adaptively(prompt, *pictures, seed=viewing.seed)
        probability, num_levels = comparison.probability, comparison.num_levels
        assert model.config.adaptive is not None
        levels = list(model.config.adaptive.noise_levels[:num_levels])
    else:
        levels, num_levels = viewing.levels(model.config.noise_levels), None
        probability = model.compare(
            prompt, *pictures, noise_levels=levels, seed=viewing.seed, num_draws=viewing.num_draws
        )
    image_a, image_b = options.images
    if options.as_json:
        print_json(
            {
                "prompt": prompt,
                "image_a": image_a,
                "image_b": image_b,
                "probability_a_preferred": float(probability),
                "noise_levels": levels if isinstance(levels, list) else [levels],
                "num_levels": num_levels,
                "num_draws": None if options.adaptive else viewing.num_draws,
                "seed": viewing.seed,
                "model": options.model.model,
            }
        )
        return 0
    rows = [(image_a, f"{probability:.1%}"), (image_b, f"{1 - probability:.1%}")]
    print_table(["image", "preferred"], rows, title=prompt)
    if num_levels is not None:
        log(f"decided after {num_levels} noise levels")
    return 0
