"""The engine: one encoder and one gallery, and everything that the page asks of them.

Place in the flow: `upload -> preprocess -> model -> similarity -> matches`, called here. The engine keeps nothing about
a visitor: their photos are a value that the page holds and passes in.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from alignment.engine.batching import IMAGES_AT_ONCE, MORE_IMAGES, TEXTS_AT_ONCE, DynamicBatcher
from alignment.engine.explanation import Explanation, Scale, explain_match
from alignment.engine.matrix import Alignment, SecondModel
from alignment.engine.queries import Query, Term, check_count, search
from alignment.gallery import THUMBNAIL_PIXELS, Caption, Gallery, Picture, SearchResult
from alignment.gallery.records import FileFingerprint
from alignment.model import DualEncoder, chunk_size
from alignment.prefetch import prefetch_map
from alignment.preprocess import ImageSource, InputError, clean_caption, open_image

MAX_PHOTOS = 500  # of one visitor; their embeddings and thumbnails stay in memory

_PREPARED_AT_ONCE = 8  # pictures of one visitor between two turns of others
_CACHED_THUMBNAILS = 1024  # of pictures without one in the gallery; some 15 KB each


@dataclass(frozen=True)
class Photos:
    """A visitor's own pictures: a gallery in memory. Never changed, only replaced."""

    gallery: Gallery  # `source` of a picture is the name of the uploaded file
    thumbnails: Mapping[str, bytes]  # picture id -> WebP
    second_embeds: Tensor | None = None  # (num_pictures, embed_dim) of a second model; None without one

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


class AlignmentEngine:
    """One encoder and one gallery, searched in both directions; safe to call from several threads.

    `gallery` is searched, see `show`; `starter` is that of the worked examples; `second` is a model to compare with;
    `names_files` tells whether visitors may read the names of the gallery's files.
    """

    def __init__(
        self, encoder: DualEncoder, gallery: Gallery, second: SecondModel | None = None, *,
        starter: Gallery | None = None, names_files: bool = False,
    ) -> None:  # fmt: skip
        self.encoder, self.gallery, self.second = encoder, gallery, second
        self.starter, self.names_files = starter or gallery, names_files
        images_at_once = IMAGES_AT_ONCE.get(encoder.device.type, MORE_IMAGES)
        self._encode_images = DynamicBatcher[Mapping[str, Tensor]](
            lambda images: torch.stack(list(self.encoder.encode_prepared(images))), images_at_once
        )
        self._encode_texts = DynamicBatcher[str](lambda texts: self.encoder.encode_texts(texts), TEXTS_AT_ONCE)
        # Explanations slow each other down, and a thread that has computed one keeps some 25 MB.
        self._explaining = ThreadPoolExecutor(1, "explaining")
        self._made_thumbnail = lru_cache(_CACHED_THUMBNAILS)(_make_thumbnail)
        self._scale_of = lru_cache(1)(Scale.of)

    def show(self, gallery: Gallery) -> None:
        """Search another gallery of this model from now on; searches under way finish in the old one."""
        if gallery.metadata.fingerprint != self.encoder.fingerprint:
            raise ValueError(f"The gallery was made by {gallery.metadata.model}, and {self.encoder.name} is in use.")
        self.gallery = gallery

    @property
    def scale(self) -> Scale:
        """How to judge the cosines of this gallery's model."""
        return self._scale_of(self.gallery)

    @property
    def draft_size(self) -> int | None:
        """The `draft_size` of `open_image` for pictures that are embedded by all models and shown small."""
        encoders = [self.encoder, self.second.encoder] if self.second else [self.encoder]
        sizes = [encoder.preprocessor.draft_size for encoder in encoders]
        return None if None in sizes else max(size or 0 for size in sizes)

    def embed_image(self, image: ImageSource) -> Tensor:
        """Embed one picture; (embed_dim,). Raises InputError when it cannot be opened."""
        return self.embed_images([image])[0]

    def embed_caption(self, caption: str) -> Tensor:
        """Embed one caption; (embed_dim,). Raises InputError when it is empty or too long."""
        return self.embed_captions([caption])[0]

    def embed_images(self, images: Sequence[ImageSource]) -> Tensor:
        """Embed pictures, (n, embed_dim). Raises InputError when one cannot be opened."""
        prepare = self.encoder.preprocessor.image  # outside of the batcher: other requests are encoded meanwhile
        if len(images) == 1:
            return self._encode_images([prepare(images[0])])
        embeds = [torch.empty(0, self.encoder.embed_dim)]
        with closing(prefetch_map(prepare, images)) as prepared:
            while chunk := list(islice(prepared, chunk_size(_PREPARED_AT_ONCE, 64))):
                embeds.append(self._encode_images(chunk))
        return torch.cat(embeds)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, (n, embed_dim). Raises InputError when one is empty or too long."""
        return self._encode_texts([clean_caption(caption) for caption in captions])

    def search_captions(self, image_embed: Tensor, k: int = 10, lang: str | None = None) -> SearchResult[Caption]:
        """Find the captions that fit a picture; only those in `lang`, if the gallery has any in that language."""
        return self.gallery.search_captions(image_embed, k, lang=lang if lang in self.gallery.languages else None)

    def search_images(self, query: str | Query, k: int = 12, *, photos: Photos | None = None) -> SearchResult[Picture]:
        """Find pictures in the gallery or among photos; raises InputError on an empty or too long caption."""
        gallery = self.gallery if photos is None else photos.gallery
        if isinstance(query, Query):
            return search(gallery, query, k)
        return gallery.search_images(self.embed_caption(query), k)

    def compose_query(self, terms: Sequence[Term]) -> Query:
        """Embed the captions among the terms; InputError without a plus term, on too many terms or a too long one."""
        check_count(len(terms))
        texts = [term.text for term in terms if not term.picture]
        embeds = iter(self.embed_captions(texts) if texts else ())
        return Query(tuple(term if term.picture else replace(term, embed=next(embeds)) for term in terms))

    def align(self, image_embeds: Tensor, captions: Sequence[str]) -> Alignment:
        """Score pictures, (n, embed_dim), against captions. Raises InputError when one is empty or too long."""
        return Alignment.of(image_embeds, self.embed_captions(captions), self.encoder)

    def align_both(self, photos: Photos, captions: Sequence[str]) -> tuple[Alignment, ...]:
        """Score photos against captions by this model and, if it has embedded them too, by the second."""
        first = self.align(photos.gallery.images.embeds, captions)
        if self.second is None or photos.second_embeds is None:
            return (first,)
        encoder = self.second.encoder
        return first, Alignment.of(photos.second_embeds, encoder.encode_texts(captions), encoder)

    def explain(self, image: Image.Image, caption: str) -> Explanation:
        """Compute what each word and each place contributes; raises InputError on an empty or too long caption."""
        return self._explaining.submit(explain_match, self.encoder, self.scale, image, caption).result()

    def no_photos(self, *, both: bool = False) -> Photos:
        """Start an empty collection; with `both`, the second model, if there is one, will embed it too."""
        second = torch.empty(0, self.second.encoder.embed_dim) if both and self.second else None
        return self._photos([], torch.empty(0, self.encoder.embed_dim), {}, second)

    def gallery_photos(self, ids: Sequence[str], *, both: bool = False) -> Photos:
        """Take pictures of the starter gallery as a visitor's photos."""
        images = self.starter.images
        rows = [row for id in ids if (row := images.items.position(id)) is not None]
        pictures = [images.items[row] for row in rows]
        ids = [picture.id for picture in pictures]
        opened = [self.picture_image(id) for id in ids] if both and self.second else []
        second = self._second_embeds(self.no_photos(both=both), opened)
        embeds = images[torch.tensor(rows, dtype=torch.int64)]
        return self._photos(pictures, embeds, Thumbnails(ids, self.thumbnail), second)

    def add_photos(
        self, photos: Photos, files: Sequence[tuple[str, bytes]], *, limit: int = MAX_PHOTOS
    ) -> tuple[Photos, list[Skipped]]:
        """Embed files, (name, content), up to a limit of photos in all; returns also the files that were left out."""
        new: dict[str, Picture] = {}
        images: list[Image.Image] = []
        skipped = []
        for name, data in files:
            id = hashlib.sha256(data).hexdigest()[:32]
            try:
                photos.check_room(id, new, limit)
                images.append(open_image(data, draft_size=self.draft_size))
                new[id] = Picture(id, name)
            except InputError as error:
                skipped.append(Skipped(name, error))
        if new:
            thumbnails = dict(zip(new, map(as_webp, images), strict=True))
            second = self._second_embeds(photos, images)
            photos = self.add_embedded(photos, list(new.values()), self.embed_images(images), thumbnails, second)
        return photos, skipped

    def add_embedded(
        self, photos: Photos, pictures: Sequence[Picture], embeds: Tensor, thumbnails: Mapping[str, bytes],
        second_embeds: Tensor | None = None,
    ) -> Photos:  # fmt: skip
        """Add photos with their embeddings, (num_pictures, embed_dim); `second_embeds` are those of all photos."""
        embeds, thumbnails = torch.cat([photos.gallery.images.embeds, embeds]), {**photos.thumbnails, **thumbnails}
        return self._photos([*photos.gallery.pictures, *pictures], embeds, thumbnails, second_embeds)

    def _second_embeds(self, photos: Photos, more: Sequence[Image.Image]) -> Tensor | None:
        if self.second is None or photos.second_embeds is None or not more:
            return photos.second_embeds
        return torch.cat([photos.second_embeds, self.second.encoder.encode_images(more)])

    def without(self, photos: Photos, id: str) -> Photos:
        """Remove one photo, if it is there."""
        rows = [row for row, picture in enumerate(photos.gallery.pictures) if picture.id != id]
        kept = [photos.gallery.pictures[row] for row in rows]
        thumbnails = {picture.id: photos.thumbnails[picture.id] for picture in kept}
        second = None if photos.second_embeds is None else photos.second_embeds[rows]
        return self._photos(kept, photos.gallery.images.embeds[rows], thumbnails, second)

    def _photos(
        self, pictures: Sequence[Picture], embeds: Tensor, thumbnails: Mapping[str, bytes], second: Tensor | None
    ) -> Photos:
        gallery, no_texts = self.gallery, torch.empty(0, self.encoder.embed_dim)
        own = Gallery(pictures, (), embeds, no_texts, gallery.metadata, judge=gallery.judge)
        return Photos(own, thumbnails, second)

    def picture_embed(self, id: str) -> Tensor:
        """Fetch the embedding of a picture of the gallery; KeyError when there is none."""
        gallery, picture = self._find(id)
        embed = gallery.images.embed(picture.id)
        if embed is None:  # deleted by another process
            raise KeyError(id)
        return embed

    def picture_image(self, id: str) -> Image.Image:
        """Open a picture of the gallery, or its thumbnail where the file is gone; raises what `thumbnail` raises."""
        try:
            return open_image(self._find(id)[1].path)
        except (InputError, OSError):
            return open_image(self.thumbnail(id))

    def can_show(self, id: str) -> bool:
        """Whether a picture of the gallery has a thumbnail or a file, which is not opened."""
        try:
            gallery, picture = self._find(id)
            shown = gallery.thumbnail(picture)
            return isinstance(shown, bytes) or shown.is_file()
        except (FileNotFoundError, KeyError):  # its package is not installed; another gallery is shown
            return False

    def thumbnail(self, id: str) -> bytes:
        """Fetch or make the thumbnail of a picture, WebP; KeyError without the picture, InputError without its file."""
        gallery, picture = self._find(id)
        shown = gallery.thumbnail(picture)
        return shown if isinstance(shown, bytes) else self._made_thumbnail(shown, picture.file)

    def _find(self, id: str) -> tuple[Gallery, Picture]:
        """Find a picture in the gallery or in the starter gallery; KeyError if it is in neither."""
        for gallery in (self.gallery, self.starter):
            if (picture := gallery.pictures.find(id)) is not None:
                return gallery, picture
        raise KeyError(id)


def _make_thumbnail(path: Path, file: FileFingerprint | None) -> bytes:
    """Make a thumbnail of a file; its fingerprint is part of the cache's key, so that a changed file is read again."""
    return as_webp(open_image(path, draft_size=THUMBNAIL_PIXELS))
