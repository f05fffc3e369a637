"""Pictures that are drawn by arithmetic: landscapes at four times of day, and fruit on a table.

They are for trying the package on something that looks like photographs, without a download: fractal noise
for clouds, ridges and wood, mirrored rows for water, shaded spheres for fruit. Each picture is
(height, width, 3) in [0, 1] and follows from its generator.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Picture = NDArray[np.float64]
Colour = tuple[float, float, float]

TIMES: dict[str, tuple[Colour, Colour, Colour, float]] = {
    "dawn": ((0.36, 0.46, 0.72), (0.99, 0.80, 0.68), (0.86, 0.74, 0.78), 0.10),
    "noon": ((0.16, 0.42, 0.84), (0.74, 0.87, 0.98), (1.00, 1.00, 0.96), 0.80),
    "sunset": ((0.27, 0.20, 0.46), (1.00, 0.52, 0.22), (0.80, 0.52, 0.42), 0.06),
    "night": ((0.01, 0.02, 0.09), (0.10, 0.14, 0.30), (0.26, 0.31, 0.48), 0.72),
}
"""Colour of the sky at the top and at the horizon, of the light, and how high sun or moon stands."""

PLACES: dict[str, tuple[Colour, Colour, float, int, bool]] = {
    "a lake between mountains": ((0.34, 0.38, 0.40), (0.20, 0.30, 0.20), 0.34, 3, True),
    "snowy peaks above a valley": ((0.55, 0.58, 0.64), (0.28, 0.38, 0.24), 0.42, 3, False),
    "green hills with fields": ((0.30, 0.46, 0.26), (0.44, 0.62, 0.22), 0.12, 4, False),
    "sand dunes in a desert": ((0.80, 0.62, 0.40), (0.92, 0.74, 0.46), 0.13, 4, False),
    "an island in a calm sea": ((0.30, 0.40, 0.30), (0.24, 0.42, 0.24), 0.16, 1, True),
    "a fir forest below mountains": ((0.42, 0.46, 0.54), (0.07, 0.20, 0.13), 0.30, 3, False),
    "red cliffs beside a river": ((0.66, 0.34, 0.22), (0.58, 0.30, 0.18), 0.26, 2, True),
    "a wide plain under clouds": ((0.46, 0.48, 0.32), (0.62, 0.60, 0.32), 0.04, 3, False),
    "a rocky coast": ((0.36, 0.34, 0.34), (0.30, 0.27, 0.25), 0.20, 2, True),
    "blue mountains in the mist": ((0.38, 0.46, 0.62), (0.24, 0.32, 0.46), 0.26, 5, False),
    "a moor with a pond": ((0.40, 0.34, 0.34), (0.46, 0.36, 0.24), 0.08, 2, True),
    "tea terraces on a slope": ((0.28, 0.44, 0.24), (0.30, 0.56, 0.20), 0.22, 5, False),
}
"""Colour of the far and of the near ridges, their height, how many there are, and whether there is water."""

FRUIT: dict[str, Colour] = {
    "oranges": (0.95, 0.52, 0.10),
    "limes": (0.45, 0.68, 0.18),
    "plums": (0.36, 0.14, 0.34),
    "red apples": (0.78, 0.13, 0.12),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def fractal(rng: np.random.Generator, height: int, width: int, cells: float, octaves: int = 5) -> Picture:
    """Noise of many sizes, (height, width), in [0, 1]; the coarsest has `cells` cells along the width."""
    total = np.zeros((height, width))
    for octave in range(octaves):
        shape = (max(2, round(cells * height / width)) + 1, max(2, round(cells)) + 1)
        grid = Image.fromarray(rng.random(shape, dtype=np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) * 0.55**octave
        cells *= 2
    return (total - total.min()) / max(float(np.ptp(total)), 1e-9)


def landscape(place: str, time: str, rng: np.random.Generator, width: int, height: int) -> Picture:
    """A place of `PLACES` at one of the `TIMES`."""
    _, _, relief, count, water = PLACES[place]
    far, near = (np.asarray(colour) for colour in PLACES[place][:2])
    top, low, light, altitude = (np.asarray(value) for value in TIMES[time])
    horizon = rng.uniform(0.52, 0.62)
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    picture = _sky(rng, rows, columns, top, low, light, float(altitude), horizon, night=time == "night")
    for index in range(count):
        depth = (index + 1) / count  # 0 is far away
        smooth = place.startswith(("sand", "green", "a wide"))
        line = fractal(rng, 2, width, rng.uniform(2, 4) + 2 * (1 - depth), 3 if smooth else 7)[0]
        if place.startswith("a fir") and index:
            line = (
                line
                + 0.25 * np.abs(np.sin(np.arange(width) * (0.9 - 0.25 * index))) * rng.random(width) ** 0.3
            )
        if place.startswith("an island"):
            line = line * np.clip(1.2 - (3.2 * (columns[0] - rng.uniform(0.4, 0.6))) ** 2, 0, 1)
        reach = relief * (1.15 - 0.6 * depth) if not water else relief
        foot = horizon if water else horizon + (1 - horizon) * (depth - 1 / count) * 0.8
        ridge = foot + 0.01 - reach * line
        ground = fractal(rng, height, width, 9, 6)
        colour = (1 - depth) * (0.45 * far + 0.55 * low / light.clip(0.3)) + depth * near
        if place.startswith(("a lake", "red cliffs", "a rocky", "an island")):
            colour = far if index == 0 else colour
        slope = (
            np.gradient(np.convolve(np.pad(line, 4, mode="edge"), np.ones(9) / 9, mode="valid")) * width / 8
        )
        facing = 0.9 - 0.3 * slope.clip(-1, 1) * np.exp(-8 * (rows - ridge).clip(0))
        shade = colour * ((0.68 + 0.5 * ground) * facing)[..., None]
        if place.startswith("snowy") and index == 0:
            snow = np.clip((0.55 * relief - (rows - (foot - reach))) * 18 + 2.5 * (ground - 0.5), 0, 1)
            shade = shade + snow[..., None] * (np.array([0.95, 0.97, 1.0]) - shade)
        if place.startswith(("tea", "green")) and depth > 0.4:
            bands = np.sin((rows - ridge) * (160 if place.startswith("tea") else 60) + 6 * ground) > 0.3
            shade = shade * np.where(bands, 0.82, 1.05)[..., None]
        cover = np.clip((rows - ridge) * height, 0, 1)[..., None]
        picture = picture + cover * (shade.clip(0, 1) * light - picture)
    if water:
        picture = _mirror(rng, picture, rows, horizon, low, light)
    return picture.clip(0, 1)


def _sky(
    rng: np.random.Generator,
    rows: Picture,
    columns: Picture,
    top: Picture,
    low: Picture,
    light: Picture,
    altitude: float,
    horizon: float,
    *,
    night: bool,
) -> Picture:
    height, width = rows.shape
    sky = top + np.clip(rows / horizon, 0, 1)[..., None] ** 1.4 * (low - top)
    sun = np.array([horizon * (1 - altitude), rng.uniform(0.25, 0.75)])
    distance = np.hypot((rows - sun[0]) * height / width, columns - sun[1])
    glow = np.array([0.75, 0.80, 0.95]) if night else np.array([1.0, 0.86, 0.60])
    sky = (
        sky
        + (0.25 if night else 0.5) * np.exp(-((distance / (0.08 if night else 0.22)) ** 2))[..., None] * glow
    )
    if night:
        stars = (rng.random((height, width)) > 0.9985) * rng.random((height, width))
        sky = sky + np.maximum(stars, 0.6 * np.roll(stars, 1, axis=1))[..., None]
    clouds = fractal(rng, height, width, 3, 6)
    cover = np.clip((clouds - rng.uniform(0.5, 0.6)) * 4, 0, 1)[..., None] * (0.25 if night else 0.75)
    sky = sky + cover * (0.35 * low + 0.65 * light - sky)
    disc = np.clip((0.035 - distance) * width * 0.7, 0, 1)[..., None] * (1 - 0.7 * cover)
    return sky + disc * (0.4 + 0.6 * glow - sky)


def _mirror(
    rng: np.random.Generator, picture: Picture, rows: Picture, horizon: float, low: Picture, light: Picture
) -> Picture:
    """What lies above the horizon, turned over, rippled more towards the front."""
    height, width = rows.shape
    edge = int(horizon * height)
    depth = np.arange(height - edge)[:, None] / max(1, height - edge)
    ripple = (fractal(rng, height - edge, width, 5, 6) - 0.5) * (0.5 + 5 * depth) * height / 90
    source = np.clip(edge - 1 - np.arange(height - edge)[:, None] + np.rint(ripple), 0, edge - 1).astype(int)
    columns = np.broadcast_to(np.arange(width), source.shape)
    water = picture[source, columns] * 0.72 + 0.10 * light * np.array([0.4, 0.7, 0.9])
    return np.concatenate([picture[:edge], water + 0.05 * ripple[..., None] * low], axis=0)


def still_life(fruit: str, count: int, rng: np.random.Generator, width: int, height: int) -> Picture:
    """Fruit side by side on a wooden table, lit from the upper left."""
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    wall = np.array(rng.uniform(0.35, 0.75, 3)) * (0.95 - 0.35 * columns / width)[..., None]
    edge = height * rng.uniform(0.46, 0.54)
    grain = fractal(rng, height, width, 3, 3) * 0.6 + 0.4 * np.sin(
        rows / height * 60 + 9 * fractal(rng, height, width, 2, 3)
    )
    table = np.array([0.50, 0.33, 0.20]) * (0.85 + 0.30 * grain)[..., None]
    picture = wall + np.clip(rows - edge, 0, 1)[..., None] * (table - wall)
    radius = min(width / (2.3 * count + 0.6), height * 0.2)
    for index in rng.permutation(count):
        size = radius * rng.uniform(0.9, 1.08)
        x = width * (index + 1) / (count + 1) * 0.86 + 0.07 * width + rng.normal(0, 0.05) * radius
        y = edge + height * rng.uniform(0.08, 0.20)
        shadow = np.hypot(
            (columns - x - 0.7 * size) / (1.35 * size), (rows - y - 0.85 * size) / (0.34 * size)
        )
        picture = picture * (1 - 0.6 * np.clip(1.25 - shadow, 0, 1))[..., None]
        u, v = (columns - x) / size, (rows - y) / size
        inside = u * u + v * v
        normal = np.sqrt(np.clip(1 - inside, 0, 1))
        lit = np.clip(-0.5 * u - 0.6 * v + 0.62 * normal, 0, 1)
        skin = np.asarray(FRUIT[fruit]) * (0.9 + 0.2 * fractal(rng, height, width, 30, 2))[..., None]
        ball = skin * (0.22 + 0.85 * lit)[..., None] + 0.55 * (lit**26)[..., None]
        cover = np.clip((1 - np.sqrt(inside)) * size, 0, 1)[..., None]
        picture = picture + cover * (ball - picture)
    return picture.clip(0, 1)


# --- what people mind --------------------------------------------------------------------------------------


def _filtered(picture: Picture, radius: float) -> Picture:
    image = Image.fromarray(np.rint(picture * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image) / 255


def _blocks(picture: Picture, strength: float) -> Picture:
    """As after JPEG at a low quality: every 8 x 8 block keeps few levels."""
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=int(13 - 8 * strength)
    )
    return np.asarray(Image.open(buffer)) / 255


def _tilted(picture: Picture, strength: float) -> Picture:
    height, width = picture.shape[:2]
    image = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
    turned = image.resize((int(width * 1.4), int(height * 1.4))).rotate(
        5 + 9 * strength, Image.Resampling.BICUBIC
    )
    left, upper = (turned.width - width) // 2, (turned.height - height) // 2
    return np.asarray(turned.crop((left, upper, left + width, upper + height))) / 255


FAULTS: dict[str, tuple[float, Callable[[Picture, float, np.random.Generator], Picture]]] = {
    "blur": (1.6, lambda p, s, rng: _filtered(p, (0.006 + 0.014 * s) * max(p.shape))),
    "JPEG blocks": (1.3, lambda p, s, rng: _blocks(p, s)),
    "too bright": (1.5, lambda p, s, rng: (p * (1.7 + 1.2 * s) + 0.12).clip(0, 1)),
    "too dark": (1.5, lambda p, s, rng: p ** (1.8 + s) * 0.75),
    "noise": (1.4, lambda p, s, rng: (p + rng.normal(0, 0.08 + 0.14 * s, p.shape)).clip(0, 1)),
    "tilted": (1.2, lambda p, s, rng: _tilted(p, s)),
}
"""How much raters mind a fault of full strength, and the picture that has it at a strength in [0, 1]."""
