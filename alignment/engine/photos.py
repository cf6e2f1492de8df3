"""A visitor's own pictures: a gallery in memory that the page holds for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image
from torch import Tensor

from alignment.gallery import THUMBNAIL_PIXELS, Gallery
from alignment.preprocess import InputError

MAX_PHOTOS = 500
"""Photos a visitor may bring; their embeddings and thumbnails stay in memory."""


@dataclass(frozen=True)
class Photos:
    """A visitor's own pictures: a gallery in memory. Never changed, only replaced.

    Attributes:
        gallery: the pictures (`source` is the name the file came with) and their embeddings.
        thumbnails: picture id -> WebP.
        second_embeds: (num_pictures, embed_dim) of a second model; None where it was not asked.
    """

    gallery: Gallery
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)
    second_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.gallery.pictures)


class Thumbnails(Mapping[str, bytes]):
    """Thumbnails that are made when somebody looks at them."""

    def __init__(self, ids: Sequence[str], make: Callable[[str], bytes]) -> None:
        self._ids, self._make = dict.fromkeys(ids), make

    def __getitem__(self, id: str) -> bytes:
        if id not in self._ids:
            raise KeyError(id)
        return self._make(id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


@dataclass(frozen=True)
class Skipped:
    """A file that was not taken, and why."""

    name: str
    error: InputError


def as_webp(image: Image.Image, side: int = THUMBNAIL_PIXELS) -> bytes:
    """Scale a picture down to fit a square of `side` pixels, as WebP."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
