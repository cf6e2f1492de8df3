"""Why a picture and a caption match: words and places, and the scale that every result of a model shares.

Place in the flow: `picture + caption -> explain -> explained on one scale (here) -> page`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignment.explain import UNIT, WordContribution, patch_relevance, word_contributions
from alignment.gallery import Gallery
from alignment.model import DualEncoder
from alignment.similarity import cosine_similarity

Limits = tuple[float, float]

_UNKNOWN = (0.1, 0.1)  # mean and spread where there is nothing unrelated to measure

# In spreads of unrelated cosines beyond their mean. Chosen on 200 Flickr8k dev pictures with the compact model, each
# with a caption of its own and one of another picture (`tests/benchmarks/explain_limits.py`).
_ACCIDENT = 2.0  # 7 % of the foreign captions and 94 % of the own ones are beyond
_STRONG = 3.0  # 4 % and 84 %
_DARK, _BRIGHT = _ACCIDENT, 10.0  # of a place: 81 % of the places are dark for a foreign caption, 36 % for the own one
_WORD = 1.5  # 4 % of the words of own captions add more
_AXIS = (-3.0, 8.0)


@dataclass(frozen=True)
class Scale:
    """What a cosine is worth for a model; the same for all of its results.

    Attributes:
        unrelated: mean of the cosines between pictures and captions that have nothing to do with each other.
        spread: their standard deviation.
    """

    unrelated: float
    spread: float

    @classmethod
    def of(cls, gallery: Gallery) -> Scale:
        """Measure it on the gallery's cohort, or on its own items, hardly any two of which belong together."""
        if gallery.judge is not None:
            return cls(*gallery.judge.cohort.units["text_to_image"])
        cosines = cosine_similarity(gallery.images.sample(), gallery.texts.sample()).double()
        if min(cosines.shape) < 2:
            return cls(*_UNKNOWN)
        return cls(cosines.mean().item(), max(cosines.std().item(), 1e-4))

    @property
    def accidents(self) -> Limits:
        """Between these lie nearly all cosines of unrelated pairs."""
        return self._limits(-_ACCIDENT, _ACCIDENT)

    @property
    def cosines(self) -> Limits:
        """Between these lie nearly all cosines there are; never beyond 1."""
        low, high = self._limits(*_AXIS)
        return max(low, -1.0), min(high, 1.0)

    @property
    def places(self) -> Limits:
        """What a place brings that stays dark, no more than an accident, and one that is as bright as can be."""
        return self._limits(_DARK, _BRIGHT)

    @property
    def words(self) -> float:
        """What a word adds, or takes away, that gets the full colour."""
        return _WORD * self.spread

    def _limits(self, low: float, high: float) -> Limits:
        return self.unrelated + low * self.spread, self.unrelated + high * self.spread


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a picture and a caption match, or do not.

    Attributes:
        cosine: of the two.
        words: of the caption; the first of their contributions is the picture's.
        places: (rows, columns) over the whole picture: the cosine it would have if all of it were like this place.
        scale: to read all of it by.
    """

    cosine: float
    words: tuple[WordContribution, ...]
    places: NDArray[np.float32]
    scale: Scale

    @property
    def strength(self) -> Literal["none", "some", "strong"]:
        """How the cosine stands out from those of unrelated pairs."""
        above = (self.cosine - self.scale.unrelated) / self.scale.spread
        return "strong" if above > _STRONG else "some" if above > _ACCIDENT else "none"


def explain_match(encoder: DualEncoder, scale: Scale, image: Image.Image, caption: str) -> Explanation:
    """Find what each word and each place adds to a match.

    Raises:
        InputError: when the caption is empty or too long.
    """
    relevance = patch_relevance(encoder, image, [caption])
    words = word_contributions(encoder, relevance.image_embed, caption, background=scale.unrelated)
    return Explanation(relevance.cosines[0], tuple(words), relevance.grid[0] / UNIT, scale)
