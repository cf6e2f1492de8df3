"""What the page may ask.

Place in the flow: `upload -> preprocess -> model -> similarity -> matches`, strung together here. The engine keeps
nothing about a visitor: photos of their own are a value that the page holds for them and hands back.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from alignment.engine.batching import IMAGES_AT_ONCE, MORE_IMAGES, TEXTS_AT_ONCE, DynamicBatcher
from alignment.engine.explanation import Explanation, Scale, explain_match
from alignment.engine.matrix import Alignment, SecondModel
from alignment.engine.photos import MAX_PHOTOS, Photos, Skipped, Thumbnails, as_webp
from alignment.engine.queries import Query, Term, check_count, search
from alignment.gallery import THUMBNAIL_PIXELS, Caption, Gallery, Picture, SearchResult
from alignment.gallery.records import FileFingerprint
from alignment.model import DualEncoder, chunk_size
from alignment.prefetch import prefetch_map
from alignment.preprocess import ImageSource, InputError, clean_caption, open_image

Inputs = Mapping[str, Tensor]

logger = logging.getLogger(__name__)

_PREPARED_AT_ONCE = 8  # of one visitor's pictures, before others have their turn
_CACHED_THUMBNAILS = 1024  # made of pictures that have none in the gallery, some 15 KB each


class AlignmentEngine:
    """One encoder and one gallery, searched both ways; safe to call from several threads.

    Attributes:
        encoder: the model.
        gallery: what is searched; another one may take its place at any time, see `show`.
        starter: the gallery of the worked examples, which stays.
        second: a model to compare with, if there is one.
        names_files: whether visitors may read the names of the gallery's files.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        gallery: Gallery,
        second: SecondModel | None = None,
        *,
        starter: Gallery | None = None,
        names_files: bool = False,
    ) -> None:
        self.encoder = encoder
        self.gallery = gallery
        self.starter = starter or gallery
        self.second = second
        self.names_files = names_files
        at_once = IMAGES_AT_ONCE.get(encoder.device.type, MORE_IMAGES)
        self._encode_images = DynamicBatcher[Inputs](self._encode_prepared, at_once)
        self._encode_texts = DynamicBatcher[str](lambda texts: self.encoder.encode_texts(texts), TEXTS_AT_ONCE)
        # Two explanations at once only get in each other's way, and every thread that ever explained keeps some 25 MB.
        self._explaining = ThreadPoolExecutor(1, "explaining")
        self._made_thumbnail = lru_cache(_CACHED_THUMBNAILS)(_make_thumbnail)
        self._scale_of = lru_cache(1)(Scale.of)

    def show(self, gallery: Gallery) -> None:
        """Search another gallery of this model from now on; searches under way end in the old one."""
        if gallery.metadata.fingerprint != self.encoder.fingerprint:
            raise ValueError(f"The gallery was made by {gallery.metadata.model}, and {self.encoder.name} is in use.")
        self.gallery = gallery

    def warm_texts(self) -> None:
        """Run the text tower once: the first run is slow, and nobody should wait for it."""
        self.embed_caption("a")

    def warm_images(self) -> None:
        """Run the image tower once, as `warm_texts`; whoever brings a picture meanwhile waits for no more than that."""
        self.embed_image(Image.new("RGB", (64, 64)))

    # ------------------------------------------------------------ search

    @property
    def draft_size(self) -> int | None:
        """How small a picture may be opened that is to be embedded and shown small; see `open_image`."""
        encoders = [self.encoder, self.second.encoder] if self.second else [self.encoder]
        wanted = [encoder.preprocessor.draft_size for encoder in encoders]
        return None if None in wanted else max(side or 0 for side in wanted)

    def embed_image(self, image: ImageSource) -> Tensor:
        """Embed one picture; (embed_dim,). Raises InputError when it cannot be opened."""
        return self.embed_images([image])[0]

    def embed_caption(self, caption: str) -> Tensor:
        """Embed one caption; (embed_dim,). Raises InputError when it is empty or too long."""
        return self.embed_captions([caption])[0]

    def embed_images(self, images: Sequence[ImageSource]) -> Tensor:
        """Embed pictures, (n, embed_dim). Raises InputError when one cannot be opened."""
        prepare = self.encoder.preprocessor.image  # not for the batch to do: others encode meanwhile
        if len(images) == 1:
            return self._encode_images([prepare(images[0])])
        embeds = [torch.empty(0, self.encoder.embed_dim)]
        with closing(prefetch_map(prepare, images)) as prepared:
            while some := list(islice(prepared, chunk_size(_PREPARED_AT_ONCE, 64))):
                embeds.append(self._encode_images(some))
        return torch.cat(embeds)

    def _encode_prepared(self, images: Sequence[Inputs]) -> Tensor:
        return torch.stack(list(self.encoder.encode_prepared(images)))

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, (n, embed_dim). Raises InputError when one is empty or too long."""
        return self._encode_texts([clean_caption(caption) for caption in captions])

    def cut_captions(self, captions: Sequence[str]) -> list[str]:
        """List the captions that are longer than the model reads."""
        return self.encoder.preprocessor.truncated(captions)

    def search_captions(
        self, image: ImageSource | Tensor, k: int = 10, lang: str | None = None
    ) -> SearchResult[Caption]:
        """Find the gallery's captions that fit a picture.

        Args:
            image: the picture, or its embedding.
            k: how many.
            lang: only captions of this language compete; all do where the gallery has none in it.

        Raises:
            InputError: when the picture cannot be opened.
        """
        embed = image if isinstance(image, Tensor) else self.embed_image(image)
        return self.gallery.search_captions(embed, k, lang=lang if lang in self.gallery.languages else None)

    def search_images(
        self, caption: str | Tensor | Query, k: int = 12, *, photos: Photos | None = None
    ) -> SearchResult[Picture]:
        """Find the pictures that fit a caption.

        Args:
            caption: the caption, its embedding, or a composed query.
            k: how many.
            photos: where to look, instead of the gallery.

        Raises:
            InputError: when the caption is empty or too long.
        """
        gallery = self.gallery if photos is None else photos.gallery
        if isinstance(caption, Query):
            return search(gallery, caption, k)
        embed = caption if isinstance(caption, Tensor) else self.embed_caption(caption)
        return gallery.search_images(embed, k)

    def compose_query(self, terms: Sequence[Term]) -> Query:
        """Put captions and pictures together, see `alignment.engine.queries`.

        Args:
            terms: pictures need their embedding, captions are embedded here.

        Raises:
            InputError: when there is nothing to look for, too much, or a caption is too long.
        """
        check_count(len(terms))
        texts = [term.text for term in terms if not term.picture]
        embeds = iter(self.embed_captions(texts) if texts else ())
        return Query(tuple(term if term.picture else replace(term, embed=next(embeds)) for term in terms))

    def align(self, images: Sequence[ImageSource] | Tensor | Photos, captions: Sequence[str]) -> Alignment:
        """Score every picture against every caption.

        Args:
            images: pictures, their embeddings, or a visitor's photos.
            captions: in any language.

        Raises:
            InputError: when a picture cannot be opened, or a caption is empty or too long.
        """
        text_embeds = self.embed_captions(captions)
        if isinstance(images, Photos):
            image_embeds = images.gallery.image_embeds
        else:
            image_embeds = images if isinstance(images, Tensor) else self.embed_images(images)
        return Alignment.of(image_embeds, text_embeds, self.encoder)

    def align_both(self, photos: Photos, captions: Sequence[str]) -> tuple[Alignment, ...]:
        """Score photos against captions under this model and, where it knows them too, under the second."""
        first = self.align(photos, captions)
        if self.second is None or photos.second_embeds is None:
            return (first,)
        text_embeds = self.second.encoder.encode_texts(captions)
        return first, Alignment.of(photos.second_embeds, text_embeds, self.second.encoder)

    def explain(self, image: Image.Image, caption: str) -> Explanation:
        """Find what each word and each place adds. Raises InputError when the caption is empty or too long."""
        return self._explaining.submit(lambda: explain_match(self.encoder, self.scale, image, caption)).result()

    @property
    def scale(self) -> Scale:
        """What a cosine is worth, for all results alike."""
        return self._scale_of(self.gallery)

    # ------------------------------------------------------------ photos of a visitor

    def no_photos(self, *, both: bool = False) -> Photos:
        """Start an empty collection; with `both`, the second model, if there is one, will embed it too."""
        second = torch.empty(0, self.second.encoder.embed_dim) if both and self.second else None
        return self._photos([], torch.empty(0, self.encoder.embed_dim), {}, second)

    def gallery_photos(self, ids: Sequence[str], *, both: bool = False) -> Photos:
        """Take some of the starter gallery's pictures as if a visitor had brought them."""
        gallery = self.starter
        rows = [row for id in ids if (row := gallery.pictures.position(id)) is not None]
        pictures = [gallery.pictures[row] for row in rows]
        embeds, ids = gallery.images[torch.tensor(rows, dtype=torch.int64)], [picture.id for picture in pictures]
        images = [self.picture_image(id) for id in ids] if both and self.second else []
        second = self._second_embeds(self.no_photos(both=both), images)
        return self._photos(pictures, embeds, Thumbnails(ids, self.thumbnail), second)

    def add_photos(
        self, photos: Photos, files: Sequence[tuple[str, bytes]], *, limit: int = MAX_PHOTOS
    ) -> tuple[Photos, list[Skipped]]:
        """Embed more photos; a bad file is skipped and named, never fatal.

        Args:
            photos: what is there already.
            files: name and content of each file.
            limit: of photos in all.

        Returns:
            The larger collection, and what was left out of it.
        """
        new: dict[str, tuple[str, Image.Image]] = {}
        skipped = []
        for name, data in files:
            id = hashlib.sha256(data).hexdigest()[:32]
            try:
                if id in photos.thumbnails or id in new:
                    raise InputError("This picture is there already.", "photo.duplicate")
                if len(photos) + len(new) >= limit:
                    raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=limit)
                new[id] = name, open_image(data, draft_size=self.draft_size)
            except InputError as error:
                skipped.append(Skipped(name, error))
        return self._extended(photos, new), skipped

    def _extended(self, photos: Photos, new: Mapping[str, tuple[str, Image.Image]]) -> Photos:
        if not new:
            return photos
        embeds = self.embed_images([image for _, image in new.values()])
        return self._photos(
            [*photos.gallery.pictures, *(Picture(id, name) for id, (name, _) in new.items())],
            torch.cat([photos.gallery.image_embeds, embeds]),
            {**photos.thumbnails, **{id: as_webp(image) for id, (_, image) in new.items()}},
            self._second_embeds(photos, [image for _, image in new.values()]),
        )

    def add_embedded(
        self, photos: Photos, pictures: Sequence[Picture], embeds: Tensor, thumbnails: Mapping[str, bytes]
    ) -> Photos:
        """Add photos that are embedded already; `embeds` is (num_pictures, embed_dim)."""
        return self._photos(
            [*photos.gallery.pictures, *pictures],
            torch.cat([photos.gallery.image_embeds, embeds]),
            {**photos.thumbnails, **thumbnails},
        )

    def _second_embeds(self, photos: Photos, more: Sequence[Image.Image]) -> Tensor | None:
        if self.second is None or photos.second_embeds is None or not more:
            return photos.second_embeds
        return torch.cat([photos.second_embeds, self.second.encoder.encode_images(more)])

    def without(self, photos: Photos, id: str) -> Photos:
        """Take one photo out; one that is not there is no error."""
        rows = [row for row, picture in enumerate(photos.gallery.pictures) if picture.id != id]
        kept = [photos.gallery.pictures[row] for row in rows]
        thumbnails = {picture.id: photos.thumbnails[picture.id] for picture in kept}
        second = None if photos.second_embeds is None else photos.second_embeds[rows]
        return self._photos(kept, photos.gallery.image_embeds[rows], thumbnails, second)

    def _photos(
        self,
        pictures: Sequence[Picture],
        embeds: Tensor,
        thumbnails: Mapping[str, bytes],
        second_embeds: Tensor | None = None,
    ) -> Photos:
        none = torch.empty(0, self.encoder.embed_dim)
        gallery = Gallery(pictures, (), embeds, none, self.gallery.metadata, judge=self.gallery.judge)
        return Photos(gallery, thumbnails, second_embeds)

    # ------------------------------------------------------------ pictures to show

    def picture_embed(self, id: str) -> Tensor:
        """Look up the embedding of one of the gallery's pictures; KeyError when it has no such picture."""
        gallery, picture = self._holder(id)
        embed = gallery.images.embed(picture.id)
        if embed is None:  # deleted by another process
            raise KeyError(id)
        return embed

    def picture_image(self, id: str) -> Image.Image:
        """Open one of the gallery's pictures: its file, or what is left of it, its thumbnail.

        Raises:
            KeyError: when the gallery has no such picture.
            InputError: when there is neither.
        """
        try:
            return open_image(self._holder(id)[1].path)
        except (InputError, OSError):
            return open_image(self.thumbnail(id))

    def can_show(self, id: str) -> bool:
        """Tell whether there is a file behind one of the gallery's pictures, without opening it."""
        try:
            gallery, picture = self._holder(id)
            shown = gallery.thumbnail(picture)
            return isinstance(shown, bytes) or shown.is_file()
        except (FileNotFoundError, KeyError):  # its package is not installed; another gallery is shown
            return False

    def thumbnail(self, id: str) -> bytes:
        """Show one of the gallery's pictures small, as WebP; made once.

        Raises:
            KeyError: when the gallery has no such picture.
            InputError: when its file is gone.
        """
        gallery, picture = self._holder(id)
        shown = gallery.thumbnail(picture)
        return shown if isinstance(shown, bytes) else self._made_thumbnail(shown, picture.file)

    def _holder(self, id: str) -> tuple[Gallery, Picture]:
        """Find a picture in the gallery or among the worked examples; KeyError where it is in neither."""
        for gallery in (self.gallery, self.starter):
            if (picture := gallery.picture(id)) is not None:
                return gallery, picture
        raise KeyError(id)


def _make_thumbnail(path: Path, file: FileFingerprint | None) -> bytes:
    """Make a thumbnail of a file; its fingerprint is there for the cache, which tells changed files apart by it."""
    return as_webp(open_image(path, draft_size=THUMBNAIL_PIXELS))
