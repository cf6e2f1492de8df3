"""Floor 0, how large a picture this process opens, and the options by which a command takes in larger ones.

Place in the flow: `command line -> limits (here) -> preprocess.formats`, which judges each picture by them. What
visitors send is held to the same limits; a service leaves them as they are.
"""

from __future__ import annotations

import argparse

MAX_IMAGE_PIXELS = 50_000_000
"""Of a picture, unless `lift_limits` says more."""

MAX_ASPECT_RATIO = 50
"""The same; CLIP's resize of the short side to 224 would blow a 1 x 50,000,000 strip up to terabytes."""

LIMITS = {"pixels": MAX_IMAGE_PIXELS, "aspect": MAX_ASPECT_RATIO}
"""What holds in this process."""


def lift_limits(pixels: int = MAX_IMAGE_PIXELS, aspect_ratio: int = MAX_ASPECT_RATIO) -> None:
    """Let this process open larger pictures, as a command does for its owner's files; a service leaves it alone."""
    LIMITS.update(pixels=pixels, aspect=aspect_ratio)


def add_size_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--max-megapixels` and `--max-aspect-ratio`; None where they are not given."""
    parser.add_argument(
        "--max-megapixels",
        type=_above_zero,
        metavar="N",
        help="leave out larger pictures; each takes some 10 MB of memory a megapixel "
        f"(default: {MAX_IMAGE_PIXELS // 10**6})",
    )
    parser.add_argument(
        "--max-aspect-ratio",
        type=_above_zero,
        metavar="N",
        help=f"leave out pictures of which one side is so many times the other (default: {MAX_ASPECT_RATIO})",
    )


def use_size_options(max_megapixels: int | None, max_aspect_ratio: int | None) -> None:
    """Let this process open pictures as large as the options say."""
    lift_limits((max_megapixels or MAX_IMAGE_PIXELS // 10**6) * 10**6, max_aspect_ratio or MAX_ASPECT_RATIO)


def _above_zero(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)
