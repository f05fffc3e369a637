"""`dina-lrm demo pictures`: drawn pictures with votes on them, to try the road from votes to a reward on.

They stand for a folder of somebody's own: many sizes and file formats, some pictures worse than others in
ways that people mind, votes of simulated raters who mind them by a known rule, and a few rows that cannot be
used.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from dina_lrm.cli.console import UsageError, log, print_json, print_table
from dina_lrm.cli.demo_scenes import FAULTS, FRUIT, NUMBERS, PLACES, TIMES, Picture, landscape, still_life
from dina_lrm.cli.options import JsonFlag

SIZES = (
    *((192, 128), (128, 192), (160, 160), (240, 160), (160, 240), (256, 144), (144, 256), (200, 150)),
    *((150, 200), (224, 128), (128, 224), (180, 180), (176, 144), (144, 176), (250, 141), (141, 250)),
    *((210, 140), (140, 210), (128, 128), (233, 175)),
)
"""Width and height of a prompt's pictures, in turn."""
FORMS = (".jpg", ".png", ".webp", ".bmp", ".tiff", "rotated.jpg", "alpha.png", "grey.jpg", "16-bit.png")
"""How they are stored, in turn: also upright only by EXIF, with transparency, grey, and 16-bit grey."""
RATERS = 7
SPREAD = 0.8
"""Standard deviation of what a rater feels about one picture, beside what is wrong with it."""
WRONG_PROMPT = 1.8
"""How much raters mind a picture that shows something else than the prompt says."""


@dataclass(frozen=True, kw_only=True)
class DemoPictures:
    """Draw pictures, let simulated raters vote on them, and write both as your own data might lie there.

    FOLDER/votes.csv has the columns prompt, chosen, rejected, votes_chosen and votes_rejected.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Receives votes.csv and the pictures; it must not hold a set already."""
    prompts: int = 60
    """Prompts, at most 60."""
    pictures: int = 2
    """Pictures of a prompt, from 2 to 8; every other prompt has one more. Raters see each two of them."""
    seed: int = 0
    """Seed of the drawings, of what is wrong with them, and of the raters."""
    as_json: JsonFlag = False
    """Print one JSON object instead of a table."""


@dataclass
class PictureSet:
    """What was made."""

    prompts: int
    pictures: int = 0
    sizes: int = 0
    rows: int = 0
    votes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    """Rows that cannot be used, each with what is wrong."""


@dataclass(frozen=True)
class Drawn:
    file: str
    utility: float
    """0 for a picture with nothing wrong, below for others."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(DemoPictures, prog="dina-lrm demo pictures", args=arguments)
    if not 4 <= options.prompts <= len(all_prompts()):
        raise UsageError(f"--prompts is in [4, {len(all_prompts())}]; got {options.prompts}")
    if options.seed < 0:
        raise UsageError(f"--seed is at least 0; got {options.seed}")
    votes = options.output / "votes.csv"
    if votes.exists():
        raise UsageError(f"{votes} is there already; choose another --output")
    if not 2 <= options.pictures <= 8:
        raise UsageError(f"--pictures is in [2, 8]; got {options.pictures}")
    made = make_pictures(
        options.output, num_prompts=options.prompts, num_pictures=options.pictures, seed=options.seed
    )
    if options.as_json:
        print_json({"output": str(options.output), **asdict(made)})
        return 0
    rows = [
        ["prompts", f"{made.prompts}"],
        ["pictures", f"{made.pictures} of {made.sizes} sizes"],
        ["  stored as", ", ".join(f"{count} {form}" for form, count in made.formats.items())],
        ["  with something wrong", ", ".join(f"{count} {fault}" for fault, count in made.faults.items())],
        ["rows of votes", f"{made.rows}, {made.votes} votes"],
        ["  that cannot be used", f"{len(made.bad_rows)}"],
    ]
    print_table(["", "made"], rows, text_columns=2)
    for bad in made.bad_rows:
        log(f"  {bad}")
    log(f"next: dina-lrm inspect jsonl --root {votes}")
    return 0


def all_prompts() -> list[str]:
    """Every place at every time of day, and fruit on a table."""
    scenes = [f"{place} at {time}" for time in TIMES for place in PLACES]
    fruit = [f"{number} {fruit} on a wooden table" for number in NUMBERS.values() for fruit in FRUIT]
    return scenes + fruit


def make_pictures(output: Path, *, num_prompts: int = 60, num_pictures: int = 2, seed: int = 0) -> PictureSet:
    """Draw the pictures of a set, vote on them, and write both."""
    rng = np.random.default_rng([seed, 11])
    chosen = rng.permutation(all_prompts())[:num_prompts].tolist()
    made = PictureSet(prompts=len(chosen))
    sizes, formats, faults = set[tuple[int, int]](), Counter[str](), Counter[str]()
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    for index, prompt in enumerate(chosen):
        drawn: list[Drawn] = []
        for number in range(num_pictures + index % 2):
            # The pictures of one prompt are of one size, but for every sixth: people do not always crop.
            size = SIZES[(index + (number if index % 6 == 5 else 0)) % len(SIZES)]
            form = FORMS[index % len(FORMS)]
            picture, fault, utility = draw(prompt, rng, size, faulty=number > 0 or rng.random() < 0.3)
            file = f"pictures/{index:02}-{'abcdefghi'[number]}{'' if form[0] == '.' else '-'}{form}"
            store(picture, output / file, form)
            drawn.append(Drawn(file, utility))
            made.pictures += 1
            sizes.add(size)
            formats[form.lstrip(".")] += 1
            if fault is not None:
                faults[fault] += 1
        for a in range(len(drawn)):
            for b in range(a + 1, len(drawn)):
                rows.append([prompt, *vote(drawn[a], drawn[b], rng)])
    made.sizes, made.formats, made.faults = len(sizes), dict(formats), dict(faults)
    add_bad_rows(rows, made, output)
    made.rows = len(rows)
    made.votes = sum(int(str(count)) for row in rows for count in row[3:])
    with (output / "votes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected", "votes_chosen", "votes_rejected"])
        writer.writerows(rows)
    return made


def draw(
    prompt: str, rng: np.random.Generator, size: tuple[int, int], *, faulty: bool
) -> tuple[Picture, str | None, float]:
    """A picture for a prompt, what is wrong with it, and how good it is."""
    shown, fault, utility = prompt, None, 0.0
    if faulty and rng.random() < 0.2:
        fault, utility, shown = "not what the prompt says", -WRONG_PROMPT, another(prompt, rng)
    subject, _, time = shown.rpartition(" at ")
    if time in TIMES:
        picture = landscape(subject, time, rng, *size)
    else:
        number, fruit = shown.removesuffix(" on a wooden table").split(" ", 1)
        count = next(count for count, name in NUMBERS.items() if name == number)
        picture = still_life(fruit, count, rng, *size)
    if faulty and fault is None:
        fault = str(rng.choice(list(FAULTS)))
        weight, spoil = FAULTS[fault]
        strength = rng.uniform()
        picture, utility = spoil(picture, strength, rng), -weight * (0.35 + 0.65 * strength)
    return picture, fault, utility


def another(prompt: str, rng: np.random.Generator) -> str:
    """The prompt with another time of day, or another number of fruit."""
    words = TIMES if " at " in prompt else NUMBERS.values()
    said = next(word for word in words if word in prompt.split())
    return prompt.replace(said, str(rng.choice([word for word in words if word != said])))


def vote(a: Drawn, b: Drawn, rng: np.random.Generator) -> tuple[str, str, int, int]:
    """chosen, rejected and their votes: each rater adds what they feel to what is wrong with a picture."""
    felt = rng.normal([a.utility, b.utility], SPREAD, size=(RATERS, 2))
    for_a = int((felt[:, 0] > felt[:, 1]).sum())
    if 2 * for_a > RATERS:
        return a.file, b.file, for_a, RATERS - for_a
    return b.file, a.file, RATERS - for_a, for_a


def store(picture: Picture, file: Path, form: str) -> None:
    """Write a picture in one of the `FORMS`."""
    image = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
    if form == "rotated.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter to the right
        image.transpose(Image.Transpose.ROTATE_90).save(file, quality=92, exif=exif)
    elif form == "alpha.png":
        image.putalpha(255)
        image.save(file)
    elif form == "grey.jpg":
        image.convert("L").save(file, quality=92)
    elif form == "16-bit.png":
        grey = picture @ np.array([0.299, 0.587, 0.114])
        Image.fromarray(np.rint(grey * 65535).astype(np.uint16)).save(file)
    else:
        image.save(file, quality=92)


def add_bad_rows(rows: list[list[object]], made: PictureSet, output: Path) -> None:
    """Four rows as real sets have them, each in the middle of the others."""
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), (90, 120, 160)).save(buffer, "JPEG")
    cut = "pictures/cut-off.jpg"
    (output / cut).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    (prompt, a, b, *_), other = rows[0], rows[len(rows) // 3]
    for place, row, problem in (
        (5, [prompt, a, "pictures/not-there.png", 6, 1], "the file pictures/not-there.png is missing"),
        (17, [other[0], other[1], cut, 7, 0], f"the file {cut} is cut off"),
        (29, [prompt, a, b, 3, 3], "as many votes for one as for the other: a tie"),
        (41, ["", other[1], other[2], 5, 2], "the prompt is empty"),
    ):
        place = min(place, len(rows))
        rows.insert(place, list(row))
        made.bad_rows.append(f"votes.csv, line {place + 2}: {problem}")
