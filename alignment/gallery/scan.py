"""Scan picture files in threads ahead of the model: what has changed, what is shown, what is embedded.

Place in the flow: `records -> scan (here, in threads) -> model -> gallery.db`. A file is read once, for its hash and
its pixels, and decoded once, for its thumbnail and the model's inputs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from alignment.atomic import sha256_of
from alignment.gallery.records import FileFingerprint, Picture
from alignment.preprocess import InputError, Preprocessor, open_image

THUMBNAIL_PIXELS = 320
_MAX_IN_MEMORY = 64 * 2**20  # bytes of a file


@dataclass(frozen=True)
class ScannedImage:
    """State of a picture's file, and what has to be embedded and stored of it."""

    picture: Picture  # with its state, or as it was if it cannot be read
    inputs: Mapping[str, Tensor] | None = None  # of the model; None if the embedding is there already
    thumbnail: bytes | None = None  # WebP; None if it is there already, or not needed
    failure: InputError | OSError | None = None  # why it cannot be read


@dataclass(frozen=True)
class ImageScanner:
    """Scans one picture; called from several threads."""

    files: Mapping[str, FileFingerprint]  # last known state, by the source of a picture
    known: Callable[[str], tuple[bool, bool]]  # whether a SHA-256 is embedded or about to be, and has a thumbnail
    preprocessor: Preprocessor

    def __call__(self, picture: Picture) -> ScannedImage:
        """Scan a picture; one that cannot be read is reported, not raised."""
        try:
            return self._scan(picture)
        except (InputError, OSError) as error:
            return ScannedImage(picture, failure=error)

    def _scan(self, picture: Picture) -> ScannedImage:
        path, before = picture.path, self.files.get(picture.source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        stat = path.stat()
        # The time of a package's installation says nothing.
        size, time = stat.st_size, 0 if picture.package else stat.st_mtime_ns
        if before and time and (before.size, before.mtime_ns) == (size, time) and all(self.known(before.sha256)):
            return ScannedImage(replace(picture, file=before))
        # Read once; a very large file is opened again for its pixels.
        content = path.read_bytes() if size <= _MAX_IN_MEMORY else path
        sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(path)
        picture = replace(picture, file=FileFingerprint(size, time, sha256))
        embedded, shown = self.known(sha256)
        shown = shown or bool(picture.package)
        if embedded and shown:
            return ScannedImage(picture)
        near = self.preprocessor.draft_size and max(self.preprocessor.draft_size, THUMBNAIL_PIXELS)
        image = open_image(content, draft_size=near)
        inputs = None if embedded else self.preprocessor.images([image])
        return ScannedImage(picture, inputs, None if shown else _thumbnail(image))


def _thumbnail(image: Image.Image) -> bytes:
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    # As sharp as by the default method, in 2 ms instead of 5, for a tenth more bytes.
    image.save(buffer, "WEBP", quality=80, method=1)
    return buffer.getvalue()
