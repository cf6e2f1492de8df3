"""Draw sample pictures of the starter gallery: `python assets/gallery/sources/draw.py`.

It writes `alignment/sample_pictures/*.webp`, which `pictures.jsonl` names as files of a package. The pictures come from
fractal noise, shaded spheres and polygons with fixed seeds. They show everyday things of which the packages that the
app installs have no photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Pixels = NDArray[np.float64]  # (HEIGHT, WIDTH, 3), 0 to 255
Plane = NDArray[np.float64]  # (HEIGHT, WIDTH)
Colour = tuple[int, int, int]

WIDTH, HEIGHT = 720, 540
Y, X = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
SUPERSAMPLING = 2  # polygons and lines are drawn at twice the size


# ---------------------------------------------------------------- building blocks


def fractal_noise(
    seed: int, octaves: int = 7, base: int = 3, persistence: float = 0.55, stretch: tuple[float, float] = (1, 1)
) -> Plane:
    """Sum bicubic value noise over octaves; (HEIGHT, WIDTH), 0 to 1; `stretch` multiplies the cells in x and y."""
    rng = np.random.default_rng(seed)
    total, weight, amplitude = np.zeros((HEIGHT, WIDTH)), 0.0, 1.0
    for octave in range(octaves):
        cells = base * 2**octave
        rows, columns = int(cells * stretch[1] * HEIGHT / WIDTH) + 2, int(cells * stretch[0]) + 2
        small = Image.fromarray((rng.random((max(2, rows), max(2, columns))) * 255).astype(np.uint8))
        total += amplitude * np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float) / 255
        weight, amplitude = weight + amplitude, amplitude * persistence
    return total / weight


def vertical_gradient(stops: Sequence[tuple[float, Colour]]) -> Pixels:
    """Interpolate colours from the top (0) to the bottom (1)."""
    heights = np.linspace(0, 1, HEIGHT)
    places = [place for place, _ in stops]
    channels = [np.interp(heights, places, [colour[channel] for _, colour in stops]) for channel in range(3)]
    return np.repeat(np.stack(channels, -1)[:, None], WIDTH, 1)


def blend(below: Pixels, colour: Sequence[float] | Pixels, mask: Plane) -> Pixels:
    """Lay a colour over a picture; the mask is its opacity."""
    return below * (1 - mask[..., None]) + np.asarray(colour, float) * mask[..., None]


def with_clouds(sky: Pixels, seed: int, low: float, high: float, rows: tuple[int, int] = (0, HEIGHT)) -> Pixels:
    """Add white clouds between two rows; they begin at the noise `low` and are opaque at `high`."""
    opacity = np.clip((fractal_noise(seed, stretch=(1, 1.6)) - low) / (high - low), 0, 1)
    band = np.zeros(HEIGHT)
    band[slice(*rows)] = 1
    opacity *= np.convolve(np.pad(band, 40, "edge"), np.ones(81) / 81, "valid")[:, None]
    shade = 0.82 + 0.18 * np.clip(fractal_noise(seed + 1, stretch=(1, 1.6)) * 1.6 - 0.3, 0, 1)
    return blend(sky, 255 * np.repeat(shade[..., None], 3, -1), opacity)


def wooden_table(seed: int, dark: Colour, light: Colour) -> Pixels:
    """Draw planks with grain."""
    grain = 0.5 + 0.5 * np.sin(fractal_noise(seed, stretch=(0.7, 9)) * 60 + Y * 0.05)
    grain = 0.6 * grain + 0.4 * fractal_noise(seed + 1, octaves=4, stretch=(2, 40))
    planks = blend(np.broadcast_to(np.array(dark, float), (HEIGHT, WIDTH, 3)), light, grain)
    planks = planks * (0.88 + 0.12 * ((Y // 108 * 37) % 5 / 4))[..., None]
    return planks * np.where(Y % 108 < 3, 0.45, 1)[..., None]


def with_shadow(picture: Pixels, x: float, y: float, width: float, height: float, strength: float) -> Pixels:
    """Darken a soft ellipse."""
    distance = ((X - x) / width) ** 2 + ((Y - y) / height) ** 2
    return picture * (1 - strength * np.exp(-1.6 * distance))[..., None]


def with_sphere(picture: Pixels, x: float, y: float, radius: float, colour: Colour, seed: int) -> Pixels:
    """Draw a shiny sphere lit from the upper left."""
    across, down = (X - x) / radius, (Y - y) / radius
    squared = across**2 + down**2
    toward = np.sqrt(np.clip(1 - squared, 0, 1))
    light = np.clip(-0.45 * across - 0.65 * down + 0.62 * toward, 0, 1)
    light = light + 0.18 * (fractal_noise(seed, octaves=4, base=40, persistence=0.8) - 0.5) * toward
    shine = 0.7 * 255 * np.clip(2 * toward * light - 0.62, 0, 1) ** 18
    shaded = np.array(colour) * (0.22 + 0.85 * light)[..., None] + shine[..., None]
    return blend(picture, shaded, np.clip((1 - np.sqrt(squared)) * radius / 1.5, 0, 1))


def enlarged(picture: Pixels) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Open a picture for drawing at `SUPERSAMPLING` times its size."""
    image = finished(picture).resize((WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), Image.Resampling.LANCZOS)
    return image, ImageDraw.Draw(image)


def reduced(image: Image.Image) -> Pixels:
    """Undo `enlarged`."""
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), float)


def finished(picture: Pixels, film_grain: float = 0) -> Image.Image:
    """Round to a picture file's values, after adding noise with this standard deviation."""
    noisy = picture + np.random.default_rng(0).normal(0, film_grain, picture.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- the pictures


def sunset() -> Image.Image:
    """Draw the sun setting over the sea."""
    horizon, sun_x, sun_y = 330, 390, 298
    sky_and_sea: list[tuple[float, Colour]] = [
        (0, (60, 70, 120)),
        (0.3, (170, 90, 110)),
        (0.5, (250, 150, 70)),
        (0.61, (255, 220, 130)),
        (0.612, (120, 70, 60)),
        (1, (25, 25, 45)),
    ]
    picture = vertical_gradient(sky_and_sea)
    distance, sky = np.hypot(X - sun_x, Y - sun_y), horizon > Y
    picture += (0.8 * np.exp(-distance / 120) * sky)[..., None] * np.array([255, 190, 90])
    picture = blend(picture, (255, 248, 210), ((distance < 34) & sky).astype(float))
    streaks = np.clip((fractal_noise(3, stretch=(0.6, 6)) - 0.52) / 0.2, 0, 1) * (horizon - 20 > Y)
    picture = blend(picture, (140, 70, 80), 0.55 * streaks)
    waves = fractal_noise(7, octaves=5, stretch=(2, 30))
    depth = np.clip((Y - horizon) / (HEIGHT - horizon), 0, 1)
    glitter = np.clip((waves - 0.47) * 9, 0, 1) * np.exp(-(((X - sun_x) / (25 + 150 * depth)) ** 2))
    water = picture + 90 * (waves[..., None] - 0.5) + 0.95 * glitter[..., None] * np.array([255, 190, 100])
    return finished(np.where(sky[..., None], picture, water), film_grain=4)


def meadow() -> Image.Image:
    """Draw a green hill under a blue sky with clouds."""
    picture = vertical_gradient([(0, (50, 110, 210)), (0.55, (170, 210, 245)), (1, (190, 220, 245))])
    picture = with_clouds(picture, 11, 0.5, 0.7, rows=(0, 260))
    hill = 330 + 30 * np.sin(X / 170 + 1) + 14 * np.sin(X / 60)
    blades = fractal_noise(5, octaves=8, persistence=0.75, stretch=(3, 10)) - 0.5
    bushes = hill - 16 + 16 * fractal_noise(8, base=30)
    depth = np.clip((Y - hill) / (HEIGHT - hill), 0, 1)
    grass = np.stack([100 - 30 * depth + 135 * blades, 140 + 165 * blades, 40 + 50 * blades], -1)
    picture = np.where((bushes < Y)[..., None], np.array([60, 95, 55]) + 60 * blades[..., None], picture)
    return finished(np.where((hill < Y)[..., None], grass, picture), film_grain=5)


def airplane() -> Image.Image:
    """Draw a passenger plane in a clear sky."""
    picture = vertical_gradient([(0, (60, 125, 215)), (1, (160, 200, 240))])
    image, draw = enlarged(with_clouds(picture, 91, 0.62, 0.95, rows=(300, HEIGHT)))
    cos, sin = math.cos(-0.16), math.sin(-0.16)

    def polygon(points: Sequence[tuple[float, float]], colour: Colour) -> None:
        draw.polygon([(720 + 1.5 * (x * cos - y * sin), 500 + 1.5 * (x * sin + y * cos)) for x, y in points], colour)

    polygon([(40, -8), (-60, -150), (-95, -150), (-45, -8)], (150, 155, 165))  # far wing
    polygon([(-260, -18), (-330, -120), (-370, -120), (-330, -10)], (40, 70, 140))  # fin
    hull = [(300, 5), (280, -12), (230, -26), (-200, -26), (-340, -14), (-345, -6), (-200, 26), (230, 28), (285, 20)]
    polygon(hull, (238, 240, 244))
    polygon([(300, 5), (285, 20), (230, 28), (-200, 26), (-345, -6), (-200, 10), (230, 14)], (190, 195, 205))
    polygon([(60, 8), (-120, 185), (-165, 185), (-60, 10)], (165, 170, 180))  # near wing
    polygon([(-270, 0), (-345, 50), (-375, 50), (-325, -4)], (165, 170, 180))  # tail
    for x in range(-175, 201, 15):
        polygon([(x, -14), (x + 7, -14), (x + 7, -6), (x, -6)], (60, 70, 90))  # windows
    polygon([(262, -14), (284, -8), (276, -2), (258, -6)], (50, 60, 80))  # cockpit
    for x, y in ((10, 40), (-45, 95)):
        polygon([(x + 45, y), (x + 40, y + 17), (x - 20, y + 15), (x - 20, y - 3)], (120, 125, 135))  # engines
    return finished(reduced(image), film_grain=3)


def wall_clock() -> Image.Image:
    """Draw a clock with a black rim on a plaster wall."""
    plaster = 0.9 + 0.2 * (fractal_noise(101, octaves=8, base=20, persistence=0.8) - 0.5)
    light = 1.05 - 0.25 * np.hypot(X - 200, Y - 80) / 700
    image, _ = enlarged(np.array([205, 195, 175]) * (plaster * light)[..., None])
    x, y = image.width // 2, image.height // 2
    shadow = Image.new("L", image.size, 0)
    ImageDraw.Draw(shadow).ellipse((x - 360, y - 350, x + 400, y + 410), fill=150)
    image.paste((70, 60, 50), mask=shadow.filter(ImageFilter.GaussianBlur(22)))
    draw = ImageDraw.Draw(image)
    for ring in range(60):
        grey = int(18 + 60 * math.sin(ring / 60 * math.pi) ** 2)
        draw.ellipse((x - 380 + ring, y - 380 + ring, x + 380 - ring, y + 380 - ring), fill=(grey, grey, grey + 3))
    draw.ellipse((x - 318, y - 318, x + 318, y + 318), fill=(248, 246, 238))
    for minute in range(60):
        sin, cos = math.sin(minute / 30 * math.pi), -math.cos(minute / 30 * math.pi)
        inner, width = (286, 4) if minute % 5 else (268, 10)
        draw.line((x + 300 * sin, y + 300 * cos, x + inner * sin, y + inner * cos), fill=(20, 20, 20), width=width)
        if minute % 5 == 0:
            place, font = (x + 222 * sin, y + 222 * cos), ImageFont.load_default(76)
            draw.text(place, str(minute // 5 or 12), fill=(20, 20, 20), font=font, anchor="mm")
    for turn, length, width in ((10.15 / 12, 150, 20), (9 / 60, 235, 13)):
        sin, cos = math.sin(2 * turn * math.pi), -math.cos(2 * turn * math.pi)
        hand = x - 30 * sin, y - 30 * cos, x + length * sin, y + length * cos
        draw.line(hand, fill=(15, 15, 15), width=width)
    draw.ellipse((x - 20, y - 20, x + 20, y + 20), fill=(15, 15, 15))
    return finished(reduced(image), film_grain=3)


def apples() -> Image.Image:
    """Draw three red apples on a white plate."""
    picture = with_shadow(wooden_table(131, (95, 60, 35), (150, 105, 65)), 370, 320, 330, 190, 0.6)
    for size, grey in ((1, 225), (0.97, 245), (0.72, 228), (0.69, 240)):
        inside = ((X - 360) / (290 * size)) ** 2 + ((Y - 290) / (190 * size)) ** 2 < 1
        plate = np.array([grey, grey, grey - 2]) * (1 - 0.1 * Y / HEIGHT)[..., None]
        picture = np.where(inside[..., None], plate, picture)
    for x, y in ((290, 330), (430, 330), (360, 230)):
        picture = with_shadow(picture, x + 18, y + 52, 80, 28, 0.5)
    fruits: list[tuple[int, int, Colour]] = [
        (360, 225, (200, 30, 35)),
        (285, 310, (205, 35, 30)),
        (435, 312, (190, 25, 30)),
    ]
    for seed, (x, y, colour) in enumerate(fruits, 140):
        image, draw = enlarged(with_sphere(picture, x, y, 78, colour, seed))
        draw.line((2 * x, 2 * y - 132, 2 * x + 16, 2 * y - 196), fill=(70, 45, 20), width=12)
        picture = reduced(image)
    return finished(picture, film_grain=3)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "airplane": airplane,
    "apples": apples,
    "meadow": meadow,
    "sunset": sunset,
    "wall-clock": wall_clock,
}

if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[3] / "alignment" / "sample_pictures"
    folder.mkdir(exist_ok=True)
    for name, draw_picture in PICTURES.items():
        draw_picture().save(folder / f"{name}.webp", quality=88)
