"""A visitor's own pictures: a gallery in memory that the page holds for them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image
from torch import Tensor

from alignment.gallery import THUMBNAIL_PIXELS, Gallery
from alignment.preprocess import InputError

MAX_PHOTOS = 500  # of one visitor; their embeddings and thumbnails stay in memory


@dataclass(frozen=True)
class Photos:
    """A visitor's own pictures: a gallery in memory. Never changed, only replaced.

    Attributes:
        gallery: the pictures (`source` is the name of the uploaded file) and their embeddings.
        thumbnails: picture id -> WebP.
        second_embeds: (num_pictures, embed_dim) of a second model; None without one.
    """

    gallery: Gallery
    thumbnails: Mapping[str, bytes]
    second_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.gallery.pictures)

    def check_room(self, id: str, new: Collection[str], limit: int) -> None:
        """Raise InputError when a picture is here or in `new` already, or when these reach the limit."""
        if id in self.thumbnails or id in new:
            raise InputError("This picture is there already.", "photo.duplicate")
        if len(self) + len(new) >= limit:
            raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=limit)


class Thumbnails(Mapping[str, bytes]):
    """Thumbnails that are made when they are looked up."""

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
    """A file that was left out, and why."""

    name: str
    error: InputError


def as_webp(image: Image.Image, side: int = THUMBNAIL_PIXELS) -> bytes:
    """Scale a picture down to fit a square of `side` pixels, as WebP."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
