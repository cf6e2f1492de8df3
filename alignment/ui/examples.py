"""Top floor, the worked examples: what the page shows before a visitor has done anything.

For the starter gallery they are chosen by hand; any other gallery gets them from its own pictures and captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from urllib.parse import quote

from alignment.engine import AlignmentEngine, as_webp
from alignment.gallery import Gallery, Picture
from alignment.preprocess import InputError, legible, open_image
from alignment.ui.strings import strings, text
from alignment.ui.widgets import data_url

# In the starter gallery: pictures that are found by a caption, and pictures that captions are found for.
FAVOURITES = ("cat", "coffee", "motorcycle", "lion", "cheetah-running", "cameraman")
DESCRIBED = ("motorcycle", "horse", "cat", "grass")
NUM_CHIPS, NUM_COMPARED, NUM_SAMPLE = 6, 4, 12
PREVIEW_PIXELS = 720
THUMBNAIL_ROUTE = "thumbnails/{id}.webp"


class Examples:
    """Pictures and queries of a gallery that are worth showing first."""

    def __init__(self, engine: AlignmentEngine, gallery: Gallery | None = None) -> None:
        """Choose them.

        Args:
            engine: shows the pictures.
            gallery: where to choose; from whichever gallery the engine searches if left out.
        """
        self.engine, self._gallery = engine, gallery
        self._chosen: tuple[Gallery, list[Picture], list[Picture]] | None = None
        self.preview = lru_cache(NUM_SAMPLE)(self._preview)

    @property
    def gallery(self) -> Gallery:
        """The gallery that they are chosen from."""
        return self._gallery or self.engine.gallery

    @property
    def pictures(self) -> list[Picture]:
        """Pictures that are shown before anything is asked."""
        return self._choose()[1]

    @property
    def described(self) -> list[Picture]:
        """Pictures to find captions for."""
        return self._choose()[2]

    def _choose(self) -> tuple[Gallery, list[Picture], list[Picture]]:
        gallery, chosen = self.gallery, self._chosen
        if chosen is None or chosen[0] is not gallery:

            def shown(pictures: Iterable[Picture | None]) -> Iterator[Picture]:
                return (picture for picture in pictures if picture and self.engine.can_show(picture.id))

            first = map(gallery.picture, FAVOURITES)
            others = (picture for picture in gallery.pictures if picture.id not in FAVOURITES)
            pictures = list(islice(shown(chain(first, others)), NUM_SAMPLE))  # lazily: there may be a million others
            described = list(shown(map(gallery.picture, DESCRIBED))) or pictures
            chosen = self._chosen = gallery, pictures, described[:NUM_CHIPS]
        return chosen

    def name(self, picture: Picture, lang: str) -> str:
        """Say what a picture is called: by its caption, else by its file where visitors may read that; "" if not."""
        return picture.caption(lang) or (legible(picture.source) if self.engine.names_files else "")

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
        version = (picture.file.sha256 if picture.file else self.engine.encoder.fingerprint)[:8]
        return f"{THUMBNAIL_ROUTE.format(id=quote(picture.id, safe=''))}?{version}"

    def _preview(self, picture: Picture) -> str:
        try:
            return data_url(as_webp(open_image(picture.path, near=PREVIEW_PIXELS), PREVIEW_PIXELS))
        except (InputError, OSError):  # of the user's own pictures only the thumbnail need be here
            return self.image_of(picture)
