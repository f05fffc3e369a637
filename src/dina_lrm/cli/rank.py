"""`dina-lrm rank PROMPT IMAGE ...`: images from best to worst, and how sure each place is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.listed import find_pictures, refuse_bad, score_pictures
from dina_lrm.cli.options import JsonFlag, ModelOptions, check_prompt, parse, refuse
from dina_lrm.cli.score import shown_score
from dina_lrm.errors import InvalidInputError
from dina_lrm.scaling.settings import Viewing

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Order images by how well people would like them for a prompt, best first.

    The last column is the probability that an image is preferred to the next one in the table.
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """What the images should show."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Picture files. Behind -- also those whose names begin with a dash."""
    skip_bad: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Name the pictures that cannot be read, and rank the others."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    viewing: Annotated[Viewing, tyro.conf.arg(name="")] = field(default_factory=Viewing)
    adaptive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Score the images one noise level after another and stop when the order of neighbours is decided,
    instead of at --noise-levels. The reward must have learned this: dina-lrm evaluate --learn-levels."""
    as_json: JsonFlag = False
    """Print one JSON object for each image instead of a table."""


@dataclass(frozen=True)
class Place:
    """An image in the ranking."""

    name: str
    score: float
    standard_error: float | None
    num_levels: int | None
    """Noise levels it was scored at, where that adapts."""


def main(arguments: Sequence[str]) -> int:
    options = parse(Rank, "rank", arguments)
    check_prompt("rank", options.prompt, options.images)
    if not options.prompt.strip() or not options.images:
        raise UsageError('give a prompt and images, as in: dina-lrm rank "a red circle" a.png b.png c.png')
    if options.adaptive:
        chosen = ["--noise-levels", "--num-draws", "--batch-size"]
        refuse(arguments, chosen, "is chosen by --adaptive: leave it out")
    places, levels, probabilities = rank_adaptively(options) if options.adaptive else rank_by_score(options)
    if options.as_json:
        for index, place in enumerate(places):
            print_json(
                {
                    "prompt": options.prompt,
                    "image": place.name,
                    "rank": index + 1,
                    "score": place.score,
                    "standard_error": place.standard_error,
                    "probability_preferred_to_next": probabilities[index] if probabilities[index:] else None,
                    "noise_levels": levels,
                    "num_levels": place.num_levels,
                    "seed": options.viewing.seed,
                    "model": options.model.model,
                }
            )
        return 0
    beats = [*(f"{probability:.1%}" for probability in probabilities), ""]
    rows = [
        (str(index + 1), place.name, shown_score(place.score, place.standard_error), beats[index])
        for index, place in enumerate(places)
    ]
    print_table(["rank", "image", "score", "beats next"], rows, title=options.prompt, text_columns=2)
    if options.adaptive:
        mean_levels = sum(place.num_levels or 0 for place in places) / len(places)
        log(f"decided after {mean_levels:.1f} noise levels of an image; scores are in probits")
    return 0


def rank_by_score(options: Rank) -> tuple[list[Place], list[float], list[float]]:
    """Places, noise levels, and the probability of each image against the next."""
    from dina_lrm.models.scoring import preference_probability

    viewing = options.viewing
    model, scored = score_pictures(
        options.model, options.prompt, options.images, viewing.scoring(), skip_bad=options.skip_bad
    )
    levels = list(viewing.noise_levels or model.config.noise_levels)
    places = [Place(name, result["score"], result["standard_error"], None) for name, result in scored]
    places.sort(key=lambda place: -place.score)
    leads = [a.score - b.score for a, b in pairwise(places)]
    return places, levels, [preference_probability(lead, levels, model.config) for lead in leads]


def rank_adaptively(options: Rank) -> tuple[list[Place], list[float], list[float]]:
    """As `rank_by_score`, each image scored as often as it needs."""
    from dina_lrm.data.pairs import load_image

    names, bad = find_pictures(options.images, skip_bad=options.skip_bad)
    model = options.model.load()
    found: list[tuple[str, Image]] = []
    for name in names:
        try:
            picture = load_image(Path(name))
            model.picture_size(picture.height, picture.width, name)
            found.append((name, picture))
        except InvalidInputError as error:
            bad.append(str(error))
    refuse_bad(bad, len(options.images), skip_bad=options.skip_bad)
    for reason in bad:
        log(f"skipped: {reason}")
    ranked = model.rank(
        options.prompt, [picture for _, picture in found], seed=options.viewing.seed, adaptive=True
    )
    assert model.config.adaptive is not None
    places = [Place(found[place.index][0], place.score, None, place.num_levels) for place in ranked]
    probabilities = [NormalDist().cdf(a.score - b.score) for a, b in pairwise(places)]
    return places, list(model.config.adaptive.noise_levels), probabilities
