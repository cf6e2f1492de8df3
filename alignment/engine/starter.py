"""Galleries that the app makes for itself, in the cache folder: one for each model and source.

Place in the flow: `model + photos or starter captions -> build_gallery -> $ALIGNMENT_CACHE/galleries (here) -> app`.
"""

import hashlib
import os
from contextlib import closing
from pathlib import Path

from alignment.bundled import GALLERY, bundled
from alignment.confidence import cohort_version
from alignment.data.image_store import cache_folder
from alignment.gallery.build import build_gallery
from alignment.gallery.database import GalleryDatabase
from alignment.gallery.records import CAPTIONS, PICTURES, GalleryMetadata, read_hand_written
from alignment.gallery.search import Gallery
from alignment.model import DualEncoder
from alignment.model.dual_encoder import Progress

_TIMEOUT_S = 600.0  # to wait for another process that builds the same starter gallery


def cached_folder(encoder: DualEncoder, source: str | os.PathLike[str]) -> Path:
    """Say where the gallery of a source lies that this model embeds; one folder for each model and source."""
    return _folder(encoder, "{}-photos", os.fsencode(os.path.realpath(source)))


def starter_gallery(encoder: DualEncoder) -> Gallery:
    """Load the starter gallery as this model embeds it, or begin one that `build_starter` completes.

    The latter is in memory (`Gallery.folder` is None) and holds the pictures and their own captions. ValueError when
    the bundled gallery is damaged, or its sources cannot be read.
    """
    with closing(GalleryDatabase(Path(bundled(GALLERY)), encoder.name)) as database:
        is_ours = database.metadata.fingerprint == encoder.fingerprint
    try:
        return Gallery.load(bundled(GALLERY) if is_ours else _starter_folder(encoder), encoder)
    except (FileNotFoundError, ValueError):  # not made yet, or damaged
        if is_ours:
            raise
    pictures, captions = read_hand_written(_sources())
    shown = [picture for picture in pictures if picture.exists]
    scenes = {picture.id for picture in shown}
    own = [caption for caption in captions if caption.scene in scenes]
    images = encoder.encode_images([picture.path for picture in shown])
    texts = encoder.encode_texts([caption.text for caption in own])
    model = encoder.fingerprint, encoder.name, encoder.logit_scale, encoder.logit_bias
    return Gallery(shown, own, images, texts, GalleryMetadata(*model, str(_sources())))


def build_starter(encoder: DualEncoder, progress: Progress) -> Gallery:
    """Embed the starter gallery with another model than the bundled one, in the cache folder; as `build_gallery`."""
    return build_gallery(_sources(), _starter_folder(encoder), encoder, progress=progress, timeout=_TIMEOUT_S)


def _sources() -> Path:
    return Path(bundled(GALLERY)) / "sources"


def _starter_folder(encoder: DualEncoder) -> Path:
    """Name the sources and the cohort by their content: after an update of the code the gallery is made anew."""
    parts = [*((_sources() / name).read_bytes() for name in (PICTURES, CAPTIONS)), cohort_version().encode()]
    return _folder(encoder, "starter-{}", b"\0".join(parts))


def _folder(encoder: DualEncoder, name: str, content: bytes) -> Path:
    hashed = name.format(hashlib.sha256(content).hexdigest()[:12])
    return cache_folder() / "galleries" / encoder.fingerprint[:12] / hashed
