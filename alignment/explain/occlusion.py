"""Places of a match, found by covering parts of the picture: works for every family.

Place in the flow: `picture -> covered pictures -> encoder -> cosines lost (here)`. Covering happens before any
preprocessing, so it means the same to every family, whatever it crops and whatever its tokens are.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from alignment.model import DualEncoder
from alignment.similarity import cosine_similarity

UNIT = 1 / 9
"""Share of the picture whose loss relevance is quoted for, whatever the method and the size of its windows."""

MAX_SIDE = 512
"""Pixels: larger pictures are shrunk first, since no encoder here sees more and dozens of copies are made."""

_BLUR = 1 / 8  # radius as a share of the longer side: no object stays recognisable


def occlusion(encoder: DualEncoder, image: Image.Image, text_embeds: Tensor, resolution: int) -> Tensor:
    """Cover windows of two sizes that overlap by half; a place is as relevant as what covering it loses.

    Windows have side 2 / (resolution + 1) and about twice that. The loss of each is scaled to `UNIT` of the picture,
    and a place gets the mean over the windows it lies in.

    Returns:
        (num_captions, side, side) with side 2 * (resolution + 1), cosine.

    Source: Zeiler and Fergus, 2014, with blurred windows as in Fong and Vedaldi, 2017.
    """
    image = shrunk(image)
    instead, masks = blurred(image), windows(resolution)
    embeds = encoder.encode_images([image, *(masked(image, instead, mask) for mask in masks)])
    cosines = cosine_similarity(embeds, text_embeds)
    cover = torch.from_numpy(masks).float()
    losses = (cosines[:1] - cosines[1:]) * (UNIT / cover.mean((1, 2)))[:, None]
    return torch.einsum("wc,wij->cij", losses, cover) / cover.sum(0)


def windows(resolution: int) -> NDArray[np.bool_]:
    """Lay square windows over a grid of 2 * (resolution + 1) cells a side, True where they cover.

    Returns:
        (num_windows, side, side); every cell is covered by one of each size at least.
    """
    side = 2 * (resolution + 1)
    places = (np.arange(side) + 0.5) / side
    masks = []
    for count in (resolution, (resolution + 1) // 2):
        starts = np.arange(count) / (count + 1)
        inside = (places >= starts[:, None]) & (places < starts[:, None] + 2 / (count + 1))
        masks += [np.outer(down, across) for down in inside for across in inside]
    return np.stack(masks)


def shrunk(image: Image.Image) -> Image.Image:
    """Copy a picture, no side longer than `MAX_SIDE`."""
    copy = image.copy()
    copy.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return copy


def blurred(image: Image.Image) -> Image.Image:
    """Blur a picture until only its colours are left."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) * _BLUR))


def masked(image: Image.Image, instead: Image.Image, cells: NDArray[np.bool_]) -> Image.Image:
    """Replace the cells that are True, (rows, columns) over the whole picture, by another picture of the same size."""
    mask = Image.fromarray(cells.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(instead, image, mask)
