"""`dina-lrm score`: a few images on the command line, or a file of rows of any length."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dina_lrm.cli.console import UsageError, print_json, print_table
from dina_lrm.cli.file_mode import FileOptions, refuse_file_flags, run_file
from dina_lrm.cli.listed import score_pictures
from dina_lrm.cli.options import JsonFlag, ModelOptions, check_prompt, parse, refuse
from dina_lrm.scaling.settings import SCORE, Scoring


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score images against a prompt, or every row of a file.

    A score has no unit: compare scores of one prompt, from one model, at the same noise levels.
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """What the images should show. Not with --input."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Picture files. Behind -- also those whose names begin with a dash."""
    skip_bad: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Name the pictures that cannot be read, and score the others."""
    file: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = field(default_factory=Scoring)
    as_json: JsonFlag = False
    """Print one JSON object a line: one for each image, or one summary for --input."""


def main(arguments: Sequence[str]) -> int:
    options = parse(Score, "score", arguments)
    if options.scoring.target_error is None:
        refuse(arguments, ["--max-draws"], "goes with --target-error")
    else:
        refuse(arguments, ["--num-draws"], "and --target-error exclude each other: give one of them")
    if options.file.input is not None:
        if options.prompt or options.images:
            raise UsageError("--input brings its own prompts and images; leave out the others")
        refuse(arguments, ["--skip-bad"], "is for images on the command line; rows of --input become rejects")
        return run_file(options.file, options.model, options.scoring, SCORE, as_json=options.as_json)
    refuse_file_flags(arguments)
    check_prompt("score", options.prompt, options.images)
    if not options.prompt.strip() or not options.images:
        raise UsageError(
            'give a prompt and images, as in: dina-lrm score "a red circle" a.png b.png; or --input FILE'
        )
    return score_images(options)


def score_images(options: Score) -> int:
    """Scores of the images in the order given, with their ranks."""
    model, scored = score_pictures(
        options.model, options.prompt, options.images, options.scoring, skip_bad=options.skip_bad
    )
    if options.as_json:
        levels = options.scoring.noise_levels or tuple(model.config.noise_levels)
        for name, result in scored:
            print_json(
                {
                    "prompt": options.prompt,
                    "image": name,
                    "score": result["score"],
                    "standard_error": result["standard_error"],
                    "noise_levels": list(levels),
                    "seed": options.scoring.seed,
                    "model": options.model.model,
                }
            )
        return 0
    order = sorted(range(len(scored)), key=lambda index: -scored[index][1]["score"])
    ranks = {index: str(rank) for rank, index in enumerate(order, start=1)}
    rows = [
        (name, shown_score(result["score"], result["standard_error"]), ranks[index])
        for index, (name, result) in enumerate(scored)
    ]
    print_table(["image", "score", "rank"], rows, title=options.prompt)
    return 0


def shown_score(score: float, error: float | None) -> str:
    return f"{score:+.3f}" + ("" if error is None else f" ± {error:.3f}")
