"""Inputs that a graph is checked with before it is used: drawn pictures and sample captions."""

import numpy as np
from PIL import Image, ImageDraw


def pictures(count: int = 16, side: int = 320, seed: int = 0) -> list[Image.Image]:
    """Draw pictures with the spectrum of photographs and, on most, a few shapes.

    Source: natural images have an amplitude of about 1 / frequency (Field, 1987).
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    blend = 0.64 * np.eye(3) + 0.32  # the three colours of a photograph are correlated
    drawn = []
    for number in range(count):
        noise = np.fft.fft2(rng.normal(size=(3, side, side))) / frequency ** rng.uniform(0.8, 1.6)
        field = np.fft.ifft2(noise).real
        field = (field - field.mean((1, 2), keepdims=True)) / field.std((1, 2), keepdims=True)
        colours = np.einsum("ij,jhw->hwi", blend, field) * rng.uniform(30, 70) + 127 + rng.uniform(-60, 60, 3)
        picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        _draw_shapes(picture, number % 5 * 2, rng)
        drawn.append(picture)
    return drawn


def _draw_shapes(picture: Image.Image, count: int, rng: np.random.Generator) -> None:
    canvas = ImageDraw.Draw(picture)
    for _ in range(count):
        corner = rng.integers(0, picture.width, 2)
        box = [*corner.tolist(), *(corner + rng.integers(20, 160, 2)).tolist()]
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (canvas.ellipse if rng.random() < 0.5 else canvas.rectangle)(box, fill=colour)


CAPTIONS = (  # batches of different sizes and lengths
    ("a dog runs on the beach", "two children play football in the park"),
    ("一只狗在沙滩上奔跑",),
    ("red", "a plate of pasta with tomatoes, basil and a glass of water on a wooden table by the window", "夜晚的城市"),
    ("A man in a yellow jacket climbs a snowy mountain!", "ein Hund am Strand", "3 cats", "雨中撑伞的人们走过斑马线"),
)
