"""The deletion test: does a match fade as the places go that are said to matter?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

from alignment.explain.patches import blurred, masked, shrunk
from alignment.model import DualEncoder
from alignment.preprocess import ImageSource, open_image
from alignment.similarity import cosine_similarity

Fill = Literal["blur", "mean"]

FRACTIONS = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class DeletionCurves:
    """Cosines as more and more of a picture is taken out, in three orders.

    Attributes:
        whole: the cosine of the picture with nothing taken out.
        fractions: shares of the picture taken out.
        most: cosines at these, the most relevant places first.
        random: places at random; the mean over several orders.
        least: the least relevant first.
    """

    whole: float
    fractions: tuple[float, ...]
    most: tuple[float, ...]
    random: tuple[float, ...]
    least: tuple[float, ...]

    def area(self, cosines: Sequence[float]) -> float:
        """Mean height of one of the curves from nothing taken out to its last fraction, by trapezoids."""
        x, y = np.array([0.0, *self.fractions]), np.array([self.whole, *cosines])
        return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)) / x[-1])


def deletion_curves(
    encoder: DualEncoder,
    image: ImageSource,
    caption: str,
    relevance: NDArray[np.floating],
    fractions: Sequence[float] = FRACTIONS,
    *,
    fill: Fill = "blur",
    random_orders: int = 1,
    seed: int = 0,
) -> DeletionCurves:
    """Take out what matters most, least, and anything, and follow the cosine.

    Args:
        encoder: of any family.
        image: anything `open_image` takes.
        caption: what the relevance is for.
        relevance: (rows, columns) over the whole picture.
        fractions: rising, in (0, 1].
        fill: what stands in the place of what is taken out.
        random_orders: orders at random to average over.
        seed: of these.

    Source: deletion metric of RISE (Petsiuk, Das and Saenko, 2018).
    """
    picture = shrunk(open_image(image))
    rng = np.random.default_rng(seed)
    best_first = np.argsort(-relevance.ravel(), kind="stable")
    orders = [best_first, best_first[::-1], *(rng.permutation(relevance.size) for _ in range(random_orders))]
    holes = [_first(order, fraction, relevance.shape) for order in orders for fraction in fractions]
    instead = filling(picture, fill)
    embeds = encoder.encode_images([picture, *(masked(picture, instead, hole) for hole in holes)])
    cosines = cosine_similarity(embeds, encoder.encode_texts([caption]))[:, 0].double().numpy()
    most, least, *others = cosines[1:].reshape(len(orders), len(fractions))
    random = np.mean(others, axis=0)
    return DeletionCurves(
        float(cosines[0]), tuple(fractions), tuple(most.tolist()), tuple(random.tolist()), tuple(least.tolist())
    )


def filling(image: Image.Image, fill: Fill) -> Image.Image:
    """Make what is put in the place of what is taken out: the picture out of all focus, or its mean colour."""
    if fill == "blur":
        return blurred(image)
    return Image.new("RGB", image.size, tuple(round(channel) for channel in ImageStat.Stat(image).mean))


def _first(order: NDArray[np.integer], fraction: float, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Mark the first share of an order of cells."""
    marked = np.zeros(order.size, dtype=bool)
    marked[order[: round(fraction * order.size)]] = True
    return marked.reshape(shape)
