"""Floor 0: how large a picture this process opens, and the options by which a command opens larger ones.

Place in the flow: `command line -> limits (here) -> preprocess.images`, which checks each picture against them. The
limits hold for what visitors send too; a service leaves them as they are.
"""

import argparse

MAX_IMAGE_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 50  # CLIP's resize of the short side to 224 would blow a 1 x 50,000,000 strip up to terabytes

LIMITS = {"pixels": MAX_IMAGE_PIXELS, "aspect": MAX_ASPECT_RATIO}
"""The limits of this process."""


def add_size_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--max-megapixels` and `--max-aspect-ratio`; None where they are not given."""
    options = {
        "--max-megapixels": "leave out larger pictures; each takes some 10 MB of memory a megapixel "
        f"(default: {MAX_IMAGE_PIXELS // 10**6})",
        "--max-aspect-ratio": "leave out pictures of which one side is so many times the other "
        f"(default: {MAX_ASPECT_RATIO})",
    }
    for name, text in options.items():
        parser.add_argument(name, type=_above_zero, metavar="N", help=text)


def use_size_options(max_megapixels: int | None = None, max_aspect_ratio: int | None = None) -> None:
    """Let this process open pictures as large as the options say, as a command does for its owner's files."""
    LIMITS["pixels"] = max_megapixels * 10**6 if max_megapixels else MAX_IMAGE_PIXELS
    LIMITS["aspect"] = max_aspect_ratio or MAX_ASPECT_RATIO


def _above_zero(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)
