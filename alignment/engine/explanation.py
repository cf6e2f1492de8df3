"""Explain why a picture and a caption match, on the scale of a model's cosines.

Place in the flow: `picture + caption -> Explanation (here) -> the heat maps and coloured words of the page`.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignment.explain import UNIT, WordContribution, patch_relevance, word_contributions
from alignment.gallery import Gallery
from alignment.model import DualEncoder
from alignment.similarity import cosine_similarity

Limits = tuple[float, float]

_UNKNOWN = (0.1, 0.1)  # mean and spread of a gallery with too few items to measure them
# In spreads of unrelated cosines above their mean. Chosen on 200 Flickr8k dev pictures with the compact model, each
# with its own caption and with that of another picture (`tests/benchmarks/explain_limits.py`).
_SOME = 2.0  # 7 % of the foreign captions and 94 % of the own ones are above
_STRONG = 3.0  # 4 % and 84 %
_DARK, _BRIGHT = _SOME, 10.0  # of a place: 81 % of the places are dark for a foreign caption, 36 % for the own one
_WORD = 1.5  # 4 % of the words of own captions add more
_AXIS = (-3.0, 8.0)


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation (`spread`) of a model's cosines between unrelated pictures and captions."""

    unrelated: float
    spread: float

    @classmethod
    def of(cls, gallery: Gallery) -> Self:
        """Measure it on the gallery's cohort, or on its own items, few of which belong together."""
        if gallery.judge is not None:
            return cls(*gallery.judge.cohort.units["text_to_image"])
        cosines = cosine_similarity(gallery.images.sample(), gallery.texts.sample()).double()
        if min(cosines.shape) < 2:
            return cls(*_UNKNOWN)
        return cls(cosines.mean().item(), max(cosines.std().item(), 1e-4))

    def limits(self, low: float, high: float) -> Limits:
        """Convert two numbers of spreads above the mean to cosines in [-1, 1]."""
        return max(self.unrelated + low * self.spread, -1.0), min(self.unrelated + high * self.spread, 1.0)

    @property
    def noise_band(self) -> Limits:
        """Interval that contains nearly all cosines of unrelated pairs."""
        return self.limits(-_SOME, _SOME)

    @property
    def cosines(self) -> Limits:
        """Interval that contains nearly all cosines."""
        return self.limits(*_AXIS)

    @property
    def places(self) -> Limits:
        """Cosines of the darkest and the brightest place of a heat map."""
        return self.unrelated + _DARK * self.spread, self.unrelated + _BRIGHT * self.spread

    @property
    def words(self) -> float:
        """Contribution of a word, of either sign, that is shown in full colour."""
        return _WORD * self.spread


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a picture and a caption match, or do not.

    `places` is (rows, columns) over the picture: the cosine it would have if all of it were like this place.
    """

    cosine: float
    words: tuple[WordContribution, ...]
    places: NDArray[np.float32]
    scale: Scale

    @property
    def strength(self) -> Literal["none", "some", "strong"]:
        """How far the cosine is above those of unrelated pairs."""
        above = (self.cosine - self.scale.unrelated) / self.scale.spread
        return "strong" if above > _STRONG else "some" if above > _SOME else "none"


def explain_match(encoder: DualEncoder, scale: Scale, image: Image.Image, caption: str) -> Explanation:
    """Compute what each word and each place contributes; raises InputError on an empty or too long caption."""
    relevance = patch_relevance(encoder, image, [caption])
    words = word_contributions(encoder, relevance.image_embed, caption, background=scale.unrelated)
    return Explanation(relevance.cosines[0], tuple(words), relevance.grid[0] / UNIT, scale)
