"""Which places of a picture a match comes from.

Place in the flow: `picture + captions -> gradient, or else occlusion -> relevance (here) -> heatmap.patch_overlay`.
Occlusion covers parts of the picture before any preprocessing, so it means the same to every family, whatever it crops
and whatever its tokens are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from alignment.explain.gradient import UNIT, gradient
from alignment.model import DualEncoder
from alignment.preprocess import ImageSource, open_image
from alignment.similarity import cosine_similarity

Method = Literal["gradient", "occlusion"]

RESOLUTION = 5  # smaller windows along a side: 25 of these and 9 larger ones, and a result of 12 x 12
MAX_SIDE = 512  # pixels; larger pictures are shrunk first: no encoder here sees more, and dozens of copies are made
_BLUR = 1 / 8  # radius as a share of the longer side: no object stays recognisable


@dataclass(frozen=True, eq=False)
class PatchRelevance:
    """What each place of a picture adds to its match with each caption.

    `grid` is (num_captions, rows, columns) over the whole picture, first row at the top: the cosine that a ninth of the
    picture would bring if all of it were like this place; negative where the caption fits better without it. The scale
    is the same for every caption, picture and method of a model.
    """

    grid: NDArray[np.float32]
    cosines: tuple[float, ...]  # (num_captions,) of the picture as it is
    method: Method
    image_embed: Tensor  # (embed_dim,) of the picture as it is


def patch_relevance(
    encoder: DualEncoder,
    image: ImageSource,
    captions: Sequence[str],
    *,
    resolution: int = RESOLUTION,
    method: Method | None = None,
) -> PatchRelevance:
    """Find where in the picture its match with each caption lies; several captions cost little more than one.

    The method "gradient" costs one pass, "occlusion", some 1.25 * resolution ** 2 passes, works for every tower; None
    takes it only for a tower that has no places to watch. `resolution`, the number of smaller windows along a side, is
    at least 2. Raises InputError when the picture cannot be opened or a caption is empty or too long.
    """
    if resolution < 2:
        raise ValueError(f"The resolution must be at least 2, it is {resolution}.")
    picture = open_image(image)
    texts = encoder.encode_texts(captions)
    found = None if method == "occlusion" else gradient(encoder, picture, texts, resolution)
    if found is None and method == "gradient":
        raise ValueError("This vision tower has no places to watch; use 'occlusion'.")
    used: Method = "occlusion" if found is None else "gradient"
    grid = occlusion(encoder, picture, texts, resolution) if found is None else found
    embeds = encoder.encode_images([picture])
    cosines = tuple(cosine_similarity(embeds, texts)[0].tolist())
    return PatchRelevance(grid.numpy().astype(np.float32), cosines, used, embeds[0])


def occlusion(encoder: DualEncoder, image: Image.Image, text_embeds: Tensor, resolution: int) -> Tensor:
    """Cover windows of two sizes that overlap by half; a place is as relevant as what covering it loses.

    Windows have side 2 / (resolution + 1) and about twice that. The loss of each is scaled to `UNIT` of the picture,
    and a place gets the mean over the windows it lies in: (num_captions, side, side), side 2 * (resolution + 1).

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
    """Lay square windows over a grid, True where they cover: (num_windows, side, side), side 2 * (resolution + 1)."""
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
