"""UI, examples: what the page shows before a visitor has done anything.

Those of the starter gallery are chosen by hand; another gallery gives its own first pictures and captions.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from urllib.parse import quote

from alignment.engine import AlignmentEngine, as_webp
from alignment.gallery import Gallery, Picture
from alignment.preprocess import InputError, open_image, sanitize_text
from alignment.ui.strings import LANGUAGES, strings, text
from alignment.ui.widgets import data_url

# Of the starter gallery: pictures that are searched for, and pictures that captions are searched for.
FAVOURITES = ("cat", "coffee", "motorcycle", "airplane", "sunset", "meadow", "wall-clock", "cameraman", "lion")
DESCRIBED = ("airplane", "sunset", "meadow", "wall-clock")
NUM_CHIPS, NUM_SAMPLE = 6, 12
MAX_TRIED = 1000  # pictures of a gallery; where none of them can be shown, as after a move, there are no examples
PREVIEW_PIXELS = 720
THUMBNAIL_ROUTE = "thumbnails/{id}.webp"


class Examples:
    """Pictures and queries of a gallery that are shown first."""

    def __init__(self, engine: AlignmentEngine, gallery: Gallery | None = None) -> None:
        """Choose from `gallery`, or from the one that the engine searches at the time."""
        self.engine, self._gallery = engine, gallery
        self._choose = lru_cache(1)(self._choose_from)
        self.preview = lru_cache(NUM_SAMPLE)(self._preview)

    @property
    def pictures(self) -> list[Picture]:
        """Pictures that are shown before any query."""
        return self._choose(self._gallery or self.engine.gallery)[0]

    @property
    def described(self) -> list[Picture]:
        """Pictures to find captions for."""
        return self._choose(self._gallery or self.engine.gallery)[1]

    def _choose_from(self, gallery: Gallery) -> tuple[list[Picture], list[Picture]]:
        def shown(pictures: Iterable[Picture | None]) -> Iterator[Picture]:
            return (picture for picture in pictures if picture and self.engine.can_show(picture.id))

        others = (picture for picture in islice(gallery.pictures, MAX_TRIED) if picture.id not in FAVOURITES)
        pictures = list(islice(shown(chain(map(gallery.pictures.find, FAVOURITES), others)), NUM_SAMPLE))
        described = list(shown(map(gallery.pictures.find, DESCRIBED))) or pictures
        return pictures, described[:NUM_CHIPS]

    def name(self, picture: Picture, lang: str) -> str:
        """Return a picture's caption, else its file's name where visitors may read that, else ""."""
        return picture.caption(lang) or (sanitize_text(picture.source) if self.engine.names_files else "")

    @property
    def are_samples(self) -> bool:
        """Whether the engine searches the starter gallery: all of its pictures come with installed packages."""
        pictures = self.engine.gallery.pictures
        return bool(pictures) and all(picture.package for picture in pictures)

    def query(self, picture: Picture, lang: str) -> str:
        """Return a query that finds an example picture, else its caption, else ""."""
        return strings()[lang].get(f"example.query.{picture.id}") or picture.caption(lang)

    def queries(self, lang: str) -> list[str]:
        """List example queries."""
        known = [query for picture in self.pictures[:NUM_CHIPS] if (query := self.query(picture, lang))]
        return known or [text(lang, f"example.any.{number}") for number in range(1, 5)]

    def translated_query(self, lang: str, query: str) -> str:
        """Return an example query in another language; "" for a query that is no example."""
        place = next((known.index(query) for known in map(self.queries, LANGUAGES) if query in known), None)
        return "" if place is None else "".join(self.queries(lang)[place : place + 1])

    def image_of(self, picture: Picture) -> str:
        """Return the address of a gallery picture's thumbnail, relative to the page."""
        version = (picture.file.sha256 if picture.file else self.engine.encoder.fingerprint)[:8]
        return f"{THUMBNAIL_ROUTE.format(id=quote(picture.id, safe=''))}?{version}"

    def _preview(self, picture: Picture) -> str:
        try:
            return data_url(as_webp(open_image(picture.path, draft_size=PREVIEW_PIXELS), PREVIEW_PIXELS))
        except (InputError, OSError):  # a gallery may have been copied without its pictures; it has their thumbnails
            return self.image_of(picture)
