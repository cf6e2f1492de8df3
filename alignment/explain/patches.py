"""Which places of a picture a match comes from.

Place in the flow: `picture + captions -> gradient, or occlusion -> relevance (here) -> heatmap.patch_overlay`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignment.explain.gradient import gradient
from alignment.explain.occlusion import occlusion
from alignment.model import DualEncoder
from alignment.preprocess import ImageSource, open_image
from alignment.similarity import cosine_similarity

Method = Literal["gradient", "occlusion"]

RESOLUTION = 5
"""Smaller windows along a side: 25 of these and 9 larger ones, and a result of 12 x 12."""


@dataclass(frozen=True, eq=False)
class PatchRelevance:
    """What each place of a picture adds to its match with each caption.

    Attributes:
        grid: (num_captions, rows, columns) float32 over the whole picture, first row at the top. The cosine that a
            ninth of the picture would bring if all of it were like this place; negative where the caption fits better
            without it. The same scale for every caption, picture and method of a model.
        cosines: (num_captions,) of the picture as it is.
        method: how it was found.
        image_embed: (embed_dim,) of the picture as it is.
    """

    grid: NDArray[np.float32]
    cosines: tuple[float, ...]
    method: Method
    image_embed: Tensor


def patch_relevance(
    encoder: DualEncoder,
    image: ImageSource,
    captions: Sequence[str],
    *,
    resolution: int = RESOLUTION,
    method: Method | None = None,
) -> PatchRelevance:
    """Find where in the picture its match with each caption lies; several captions cost little more than one.

    Args:
        encoder: of any family.
        image: anything `open_image` takes.
        captions: one result each.
        resolution: smaller windows along a side, at least 2; occlusion costs some 1.25 * resolution ** 2 passes.
        method: "gradient" costs one pass, "occlusion" works for every tower; None takes occlusion only for a tower
            that has no places to watch.

    Raises:
        InputError: when the picture cannot be opened or a caption is empty or too long.
        ValueError: on a resolution below 2, or "gradient" for a tower that has no places to watch.
    """
    if resolution < 2:
        raise ValueError(f"The resolution must be at least 2, it is {resolution}.")
    picture = open_image(image)
    texts = encoder.encode_texts(captions)
    found = None if method == "occlusion" else gradient(encoder, picture, texts, resolution)
    if found is None and method == "gradient":
        raise ValueError("This vision tower has no places to watch; use 'occlusion'.")
    used: Method = "occlusion" if found is None else "gradient"
    if found is None:
        found = occlusion(encoder, picture, texts, resolution)
    embeds = encoder.encode_images([picture])
    cosines = cosine_similarity(embeds, texts)[0]
    return PatchRelevance(found.numpy().astype(np.float32), tuple(cosines.tolist()), used, embeds[0])
