"""Make out-of-distribution probes: random texts and blank images.

Place in the flow: `probes (here) -> model -> cohort -> calibration`. A model embeds meaningless input somewhere, and
often near a real item. The probes are embedded once; a query that lands among them is recognised as meaningless.
"""

import random

import numpy as np
from PIL import Image

PER_KIND = 8
_SIDE = 224  # pixels
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SCRIPTS = {
    "Latin": range(0x61, 0x7B),
    "digits": range(0x30, 0x3A),
    "Cyrillic": range(0x430, 0x450),
    "Thai": range(0xE01, 0xE2E),
    "Hangul": range(0xAC00, 0xD7A4),
}
_HAN, _MARKS = range(0x4E00, 0x9FA6), "!?.,;:-_#*+~/|()[]{}<>@%&=^"


def random_texts(count: int = PER_KIND, seed: int = 0) -> list[str]:
    """Make `count` random texts of each kind: letters of several scripts, digits, punctuation, keyboard mashing."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        texts += [" ".join(_word(rng, script, 2, 9) for _ in range(rng.randint(1, 6))) for script in _SCRIPTS.values()]
        texts.append(_word(rng, _HAN, 3, 14))
        texts.append("".join(rng.choices(_MARKS, k=rng.randint(2, 20))))
        texts.append(" ".join(_mashed(rng) for _ in range(rng.randint(1, 4))))
    return texts


def blank_images(count: int = PER_KIND, seed: int = 0) -> list[Image.Image]:
    """Make `count` pictures of each kind: one colour, coloured noise, grey noise, a gradient."""
    rng = np.random.default_rng(seed)
    shape = (_SIDE, _SIDE, 3)
    pictures = []
    for row in range(count):
        shade = 255 * row / max(count - 1, 1)  # every other plain one is grey, from black to white
        plain = np.full(shape, shade if row % 2 else rng.uniform(0, 255, 3))
        grey = rng.uniform(40, 215) + rng.normal(0, rng.uniform(5, 60), (_SIDE, _SIDE, 1))
        pictures += [plain, rng.uniform(0, 255, shape), np.broadcast_to(grey, shape), _gradient(rng)]
    return [Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)) for pixels in pictures]


def _word(rng: random.Random, script: range, shortest: int, longest: int) -> str:
    return "".join(chr(code) for code in rng.choices(script, k=rng.randint(shortest, longest)))


def _mashed(rng: random.Random) -> str:
    """Run along a row of the keyboard, perhaps again and again."""
    keys = rng.choice(_ROWS)
    start = rng.randrange(len(keys) - 3)
    return keys[start : start + rng.randint(3, 5)] * rng.randint(1, 3)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    """Fade from one colour to another, in any direction."""
    start, end = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE] / (_SIDE - 1) - 0.5
    along = np.clip(columns * np.cos(angle) + rows * np.sin(angle) + 0.5, 0, 1)
    return start + (end - start) * along[..., None]
