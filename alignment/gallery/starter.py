"""Galleries that the app makes for itself, in the cache folder: one for each model and source.

Place in the flow: `model + photos or starter captions -> build_gallery -> $ALIGNMENT_CACHE/galleries (here) -> app`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TypeAlias

from alignment.confidence import cohort_version
from alignment.gallery.build import build_gallery
from alignment.gallery.database import GalleryDatabase
from alignment.gallery.records import GalleryMetadata, read_hand_written
from alignment.gallery.search import Gallery
from alignment.model import DualEncoder
from alignment.pairs.store import cache_folder
from alignment.shipped import GALLERY, shipped

Bar: TypeAlias = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a progress bar of that name; what it gives is called with (done, total) items."""

_TIMEOUT_S = 600.0  # to wait for another process that builds the same starter gallery


def cached_folder(encoder: DualEncoder, source: str | os.PathLike[str]) -> Path:
    """Say where the gallery of a source lies that this model embeds; one folder for each model and source."""
    place = os.path.realpath(source)
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return cache_folder() / "galleries" / encoder.fingerprint[:12] / f"{name}-photos"


def starter_gallery(encoder: DualEncoder) -> Gallery:
    """Load the starter gallery as this model embeds it, or begin one that `build_starter` completes.

    Returns:
        The gallery. One that lies in no folder (`Gallery.folder` is None) holds the pictures and their own captions.

    Raises:
        ValueError: when the shipped gallery is damaged, or its sources cannot be read.
    """
    come_along = Path(shipped(GALLERY))
    if _made_by(come_along) in ("", encoder.fingerprint):
        return Gallery.load(come_along, encoder)
    try:
        return Gallery.load(_starter_folder(encoder), encoder)
    except (FileNotFoundError, ValueError):  # not made yet, or damaged
        return _begin_starter(encoder)


def build_starter(encoder: DualEncoder, progress: Callable[[int, int], None]) -> Gallery:
    """Embed the starter gallery with another model than the shipped one, in the cache folder; as `build_gallery`."""
    return build_gallery(_sources(), _starter_folder(encoder), encoder, progress=progress, timeout=_TIMEOUT_S)


def _begin_starter(encoder: DualEncoder) -> Gallery:
    pictures, captions = read_hand_written(_sources())
    shown = [picture for picture in pictures if picture.exists]
    scenes = {picture.id for picture in shown}
    own = [caption for caption in captions if caption.scene in scenes]
    images = encoder.encode_images([os.fspath(picture.path) for picture in shown])
    texts = encoder.encode_texts([caption.text for caption in own])
    model = encoder.fingerprint, encoder.name, encoder.logit_scale, encoder.logit_bias
    return Gallery(shown, own, images, texts, GalleryMetadata(*model, os.fspath(_sources())))


def _sources() -> Path:
    return Path(shipped(GALLERY)) / "sources"


def _starter_folder(encoder: DualEncoder) -> Path:
    return cache_folder() / "galleries" / encoder.fingerprint[:12] / f"starter-{_version(_sources())}"


def _made_by(folder: Path) -> str:
    """Read the fingerprint of the model that made a gallery; "" where there is none, or it is damaged."""
    try:
        with closing(GalleryDatabase.open(folder)) as database:
            return database.metadata.fingerprint
    except (OSError, ValueError):
        return ""


def _version(sources: Path) -> str:
    """Name the sources and the background by their content: after an update of the code the gallery is made anew."""
    parts = [(sources / name).read_bytes() for name in ("pictures.jsonl", "captions.jsonl")]
    return hashlib.sha256(b"\0".join([*parts, cohort_version().encode()])).hexdigest()[:12]
