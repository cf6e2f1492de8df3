"""Galleries that the app makes for itself, in the cache folder: one for each model and source.

Place in the flow: `model + photos or starter captions -> build_gallery -> $ALIGNMENT_CACHE/galleries (here) -> app`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

from alignment.gallery.building import build_gallery
from alignment.gallery.judging import background_name
from alignment.gallery.search import Gallery
from alignment.model import DualEncoder
from alignment.pairs.store import cache_folder
from alignment.shipped import GALLERY, shipped

Bar: TypeAlias = Callable[[], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a progress bar; what it gives is called with (done, total) items."""

_PATIENCE = 600.0  # seconds to wait for another process that makes the same starter gallery


def cached_folder(encoder: DualEncoder, source: str | os.PathLike[str]) -> Path:
    """Say where the gallery of a source lies that this model embeds; one folder for each model and source."""
    place = os.path.realpath(source)
    name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return cache_folder() / "galleries" / encoder.fingerprint[:12] / f"{name}-photos"


def starter_gallery(encoder: DualEncoder, bar: Bar) -> Gallery:
    """Load the starter gallery, embedded by this model; for another than the shipped one it is made once.

    Args:
        encoder: the model in use.
        bar: opened when the gallery has to be made.

    Raises:
        ValueError: when the shipped gallery is damaged, or its sources cannot be read.
        OSError: when the cache folder cannot be written.
    """
    come_along = Path(shipped(GALLERY))
    if _made_by(come_along) in ("", encoder.fingerprint):
        return Gallery.load(come_along, encoder)
    sources = come_along / "sources"
    folder = cache_folder() / "galleries" / encoder.fingerprint[:12] / f"starter-{_version(sources)}"
    try:
        return Gallery.load(folder, encoder)
    except (FileNotFoundError, ValueError):  # not made yet, or damaged
        with bar() as show:
            return build_gallery(sources, folder, encoder, progress=show, patience=_PATIENCE)


def _made_by(folder: Path) -> str:
    """Read the fingerprint of the model that made a gallery; "" where nothing tells."""
    try:
        return str(json.loads((folder / "gallery.json").read_text("utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _version(sources: Path) -> str:
    """Name the sources and the background by their content: after an update of the code the gallery is made anew."""
    parts = [(sources / name).read_bytes() for name in ("pictures.jsonl", "captions.jsonl")]
    return hashlib.sha256(b"\0".join([*parts, background_name().encode()])).hexdigest()[:12]
