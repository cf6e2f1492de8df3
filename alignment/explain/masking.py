"""Take parts out of a picture: what occlusion and the deletion test have in common.

Place in the flow: `picture + places -> masked pictures (here) -> encoder`. It happens in the picture, before any
preprocessing, so it means the same to every family, whatever it crops and whatever its tokens are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageStat

Fill = Literal["blur", "mean"]

MAX_SIDE = 512
"""Pixels: larger pictures are shrunk first, since no encoder here sees more and dozens of copies are made."""

_BLUR = 1 / 8  # of the longer side; nothing that has a name is left to see


def shrunk(image: Image.Image) -> Image.Image:
    """Copy a picture, no side longer than `MAX_SIDE`."""
    copy = image.copy()
    copy.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return copy


def filling(image: Image.Image, fill: Fill) -> Image.Image:
    """Make what is put in the place of what is taken out: the picture out of all focus, or its mean colour."""
    if fill == "mean":
        colour = tuple(round(channel) for channel in ImageStat.Stat(image).mean)
        return Image.new("RGB", image.size, colour)
    if fill == "blur":
        return image.filter(ImageFilter.GaussianBlur(max(image.size) * _BLUR))
    raise ValueError(f"There is no filling {fill!r}: choose 'blur' or 'mean'.")


def masked(image: Image.Image, instead: Image.Image, cells: NDArray[np.bool_]) -> Image.Image:
    """Replace the cells that are True, (rows, columns) over the whole picture, by another picture of the same size."""
    mask = Image.fromarray(cells.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(instead, image, mask)
