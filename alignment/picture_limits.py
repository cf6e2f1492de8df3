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

OPTIONS = ("max_megapixels", "max_aspect_ratio")


def lift_limits(pixels: int = MAX_IMAGE_PIXELS, aspect_ratio: int = MAX_ASPECT_RATIO) -> None:
    """Let this process open larger pictures, as a command does for its owner's files; a service leaves it alone."""
    LIMITS.update(pixels=pixels, aspect=aspect_ratio)


def add_size_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--max-megapixels` and `--max-aspect-ratio`."""
    parser.add_argument(
        "--max-megapixels",
        type=_above_zero,
        default=MAX_IMAGE_PIXELS // 10**6,
        metavar="N",
        help="leave out larger pictures; each takes some 10 MB of memory a megapixel (default: %(default)s)",
    )
    parser.add_argument(
        "--max-aspect-ratio",
        type=_above_zero,
        default=MAX_ASPECT_RATIO,
        metavar="N",
        help="leave out pictures of which one side is so many times the other (default: %(default)s)",
    )


def use_size_options(arguments: argparse.Namespace) -> None:
    """Let this process open pictures as large as the options say."""
    lift_limits(arguments.max_megapixels * 10**6, arguments.max_aspect_ratio)


def _above_zero(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)
