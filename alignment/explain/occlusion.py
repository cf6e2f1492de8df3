"""Where a match is in the picture, by covering parts of it: works for every family.

Place in the flow: `picture -> covered pictures -> encoder -> cosines lost (here)`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alignment.explain.masking import Fill, filling, masked, shrunk
from alignment.model import DualEncoder
from alignment.similarity import cosine_similarity

UNIT = 1 / 9
"""Share of the picture whose loss relevance is quoted for, whatever the method and the size of its windows."""


def occlusion(encoder: DualEncoder, image: Image.Image, text_embeds: Tensor, resolution: int, fill: Fill) -> Tensor:
    """Cover windows of two sizes that overlap by half; a place is as relevant as what covering it loses.

    Windows of side 2 / (resolution + 1) and of about twice that. The loss of each is scaled to `UNIT` of the picture,
    and a place gets the mean over the windows it lies in.

    Args:
        encoder: seen from outside only; it runs `resolution` ** 2, a quarter as many and one more pictures.
        image: opened.
        text_embeds: (num_captions, embed_dim).
        resolution: smaller windows along a side.
        fill: what covers.

    Returns:
        (num_captions, side, side) with side 2 * (resolution + 1), cosine.

    Source: Zeiler and Fergus, 2014, with blurred windows as in Fong and Vedaldi, 2017.
    """
    image = shrunk(image)
    instead, masks = filling(image, fill), windows(resolution)
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
