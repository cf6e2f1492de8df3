"""Score pictures against captions under one model or two.

Place in the flow: `photos + captions -> Alignment (here) -> the matrix of the page`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Self

from torch import Tensor

from alignment.confidence import Cohort, cohort_items
from alignment.engine.explanation import Scale
from alignment.model import DualEncoder
from alignment.similarity import cosine_similarity, logits_per_image

NAME_ENDS = ":：,，\t"  # between a picture's file name and its caption at the beginning of a line
# Of Flickr8k's dev captions nine in ten lie 1.9 to 6.3 spreads above the unrelated, half of them above 4.4, and nine
# in ten unrelated ones between 2.1 below and 2.3 above (200 pictures, compact model).
COLOUR_LIMITS = (-2, 6)  # of the first and last colour, for `Scale.limits`: by the model alone, to compare two tables
_NUM_PICTURES, _NUM_CAPTIONS = 64, 256  # of the cohort that measures a second model's scale


@dataclass(frozen=True)
class Alignment:
    """Scores of pictures against captions: cosines and logits, (num_images, num_texts).

    `logit_bias` is None for models trained with a softmax.
    """

    similarity: Tensor
    logits_per_image: Tensor
    logit_scale: float = 1.0
    logit_bias: float | None = None

    @classmethod
    def of(cls, image_embeds: Tensor, text_embeds: Tensor, encoder: DualEncoder) -> Self:
        """Score embeddings of a model."""
        similarity, scale, bias = cosine_similarity(image_embeds, text_embeds), encoder.logit_scale, encoder.logit_bias
        return cls(similarity, logits_per_image(similarity, scale, bias), scale, bias)


@dataclass(frozen=True)
class SecondModel:
    """A model to compare with, such as a fine-tuned one, and the scale of its cosines."""

    encoder: DualEncoder
    scale: Scale

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Load it and measure its scale; raises what `DualEncoder.load` raises."""
        encoder = DualEncoder.load(name_or_path, revision=revision)
        paths, captions = cohort_items()
        cohort = Cohort(encoder.encode_images(paths[:_NUM_PICTURES]), encoder.encode_texts(captions[:_NUM_CAPTIONS]))
        return cls(encoder, Scale(*cohort.units["text_to_image"]))


def named_captions(lines: Sequence[str], names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Split pictures' file names from the beginnings of caption lines.

        cat.jpg: a cat asleep      the picture cat.jpg, "a cat asleep"
        cat, stretching            cat.jpg as well, if every line begins with a name; else a caption like any other

    A file name that occurs twice names no picture. Returns for each line the picture's place in `names`, or None, and
    the caption without the name.
    """
    full, short = _unique(names), _unique([PurePath(name).stem for name in names])
    found = [_named(line, short | full) for line in lines]
    return found if all(place is not None for place, _ in found) else [_named(line, full) for line in lines]


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Map each name, in lower case, to its place; names that occur twice are left out."""
    lower = [name.lower() for name in names]
    return {name: place for place, name in enumerate(lower) if name and lower.count(name) == 1}


def _is_visible(text: str) -> bool:
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def _named(line: str, places: dict[str, int]) -> tuple[int | None, str]:
    start = line.lstrip()
    for name in sorted(places, key=len, reverse=True):  # longest first: a name may contain a comma
        rest = start[len(name) :].lstrip(" ")
        if start.lower().startswith(name) and rest[:1] and rest[0] in NAME_ENDS and _is_visible(rest[1:]):
            return places[name], rest[1:].strip()
    return None, line
