"""Top floor, the worked examples: what the page shows before a visitor has done anything.

For the starter gallery they are chosen by hand; any other gallery gets them from its own pictures and captions.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from urllib.parse import quote

from alignment.engine import AlignmentEngine, as_webp
from alignment.gallery import Picture
from alignment.preprocess import InputError, open_image
from alignment.ui.strings import strings, text
from alignment.ui.widgets import data_url

# In the starter gallery: pictures that are found by a caption, and pictures that captions are found for.
FAVOURITES = ("cat", "coffee", "motorcycle", "lion", "cheetah-running", "cameraman")
DESCRIBED = ("rocket", "coffee", "cat", "cheetah-cub", "eiffel-tower", "horse")
NUM_CHIPS, NUM_COMPARED, NUM_SAMPLE = 6, 4, 12
PREVIEW_PIXELS = 720
THUMBNAIL_ROUTE = "thumbnails/{id}.webp"


class Examples:
    """Pictures and queries of a gallery that are worth showing first."""

    def __init__(self, engine: AlignmentEngine) -> None:
        self.engine = engine
        by_id = {picture.id: picture for picture in engine.gallery.pictures}
        shown = (by_id[id] for id in dict.fromkeys((*FAVOURITES, *by_id)) if id in by_id and engine.can_show(id))
        self.pictures = list(islice(shown, NUM_SAMPLE))  # of a large gallery no more files are looked for
        described = [by_id[id] for id in DESCRIBED if id in by_id and engine.can_show(id)]
        self.described = (described or self.pictures)[:NUM_CHIPS]
        self.preview = lru_cache(NUM_SAMPLE)(self._preview)

    @property
    def are_samples(self) -> bool:
        """Whether the gallery is the starter gallery: nothing but pictures that installed packages bring along."""
        pictures = self.engine.gallery.pictures
        return bool(pictures) and all(picture.package for picture in pictures)

    def query(self, picture: Picture, lang: str) -> str:
        """Describe an example picture in the words of somebody who searches for it; "" if nobody knows how."""
        return strings()[lang].get(f"example.query.{picture.id}") or picture.caption(lang)

    def queries(self, lang: str) -> list[str]:
        """List queries that find something."""
        known = [query for picture in self.pictures[:NUM_CHIPS] if (query := self.query(picture, lang))]
        return known or [text(lang, f"example.any.{number}") for number in range(1, 5)]

    def compared(self, lang: str) -> list[str]:
        """List captions for the matrix, one for each of the pictures compared."""
        return self.queries(lang)[:NUM_COMPARED]

    def image_of(self, picture: Picture) -> str:
        """Address of a gallery picture's thumbnail, relative to the page."""
        version = self.engine.gallery.stamp.fingerprint[:8]
        return f"{THUMBNAIL_ROUTE.format(id=quote(picture.id, safe=''))}?{version}"

    def _preview(self, picture: Picture) -> str:
        try:
            return data_url(as_webp(open_image(picture.path, near=PREVIEW_PIXELS), PREVIEW_PIXELS))
        except (InputError, OSError):  # of the user's own pictures only the thumbnail need be here
            return self.image_of(picture)
