"""What a build has embedded so far, kept until its gallery is written: a build that was killed is gone on with.

Place in the flow: `embeddings -> parts in a folder of the gallery (here) -> the next build`. A part holds some hundred
rows, by the hash of a picture's file or by a caption's text. Parts of another model, or damaged ones, are taken away.
Beside them lie the thumbnails, by what they show: they go into the gallery together with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignment.catalogue import Picture
from alignment.durable import ASIDE, write_file

logger = logging.getLogger(__name__)

FOLDER = ".building"
THUMBNAILS = "thumbnails"
SECONDS = 5.0
"""What is embedded in so many seconds may be lost."""

_READY = "ready"


class Unfinished:
    """The rows and thumbnails of a build that is under way.

    Attributes:
        rows: of pictures, by the hash of their file.
        texts: of captions, by their text.
    """

    def __init__(self, gallery: Path, fingerprint: str) -> None:
        """Take over what the last build of this model left, if it was killed."""
        self.folder, self.fingerprint = gallery / FOLDER, fingerprint
        self.thumbnails = self.folder / THUMBNAILS
        self.rows: dict[str, Tensor] = {}
        self.texts: dict[str, Tensor] = {}
        self._fresh: list[tuple[str, str, Tensor]] = []
        self._kept_at = time.monotonic()
        for part in self.folder.glob("*.safetensors"):
            self._take(part)
        self.thumbnails.mkdir(parents=True, exist_ok=True)
        if self.rows or self.texts:
            logger.warning("%d embeddings of a build that was broken off are taken over.", len(self))

    def __len__(self) -> int:
        return len(self.rows) + len(self.texts)

    def _take(self, part: Path) -> None:
        try:
            with safe_open(part, "pt") as file:
                about, rows = file.metadata() or {}, file.get_tensor("rows")
            if about["fingerprint"] == self.fingerprint and about["sha256"] == _digest(about["keys"], rows):
                for (kind, key), row in zip(json.loads(about["keys"]), rows, strict=True):
                    getattr(self, kind)[key] = row
                return
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.debug("%s is not taken over: %s", part, error)
        shutil.rmtree(part) if part.is_dir() else part.unlink()

    # ------------------------------------------------------------ rows

    def add(self, kind: str, keys: Iterable[str], rows: Iterable[Tensor]) -> None:
        """Keep rows of pictures ("rows") or captions ("texts"); on the disk some seconds later."""
        self._fresh += [(kind, key, row) for key, row in zip(keys, rows, strict=True)]
        if self._fresh and time.monotonic() - self._kept_at >= SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write down what has come since the last time."""
        if self._fresh:
            rows = torch.stack([row for _, _, row in self._fresh])
            keys = json.dumps([(kind, key) for kind, key, _ in self._fresh])
            digest = _digest(keys, rows)
            about = {"fingerprint": self.fingerprint, "keys": keys, "sha256": digest}
            write_file(self.folder / f"{digest[:16]}.safetensors", save({"rows": rows}, about))
        self._fresh, self._kept_at = [], time.monotonic()

    def close(self) -> None:
        """Leave to the next build what there is, if there is anything."""
        self.keep()
        with suppress(OSError):  # a folder that is not empty stays
            self.thumbnails.rmdir()
            self.folder.rmdir()

    # ------------------------------------------------------------ thumbnails

    def thumbnail_of(self, picture: Picture) -> Path:
        """Say where the thumbnail of a picture, as its file is now, lies or is to lie."""
        assert picture.file is not None
        return self.thumbnails / f"{picture.id}.{picture.file.sha256[:16]}.webp"

    def keep_thumbnail(self, picture: Picture, thumbnail: Image.Image) -> None:
        """Write a thumbnail; half of one is never found under its name."""
        place = self.thumbnail_of(picture)
        fresh = place.with_name(f"{ASIDE}{place.name}")
        # As sharp as by the default method, in 2 ms instead of 5, for a tenth more bytes.
        thumbnail.save(fresh, "WEBP", quality=80, method=1)
        os.replace(fresh, place)

    def gathered(self, pictures: Iterable[Picture]) -> Path:
        """Put the new thumbnails of a gallery's pictures together, in a folder laid out like the gallery's."""
        ready = self.folder / _READY
        if ready.is_dir():
            shutil.rmtree(ready)
        ready.mkdir()
        for picture in pictures:
            if picture.file and (found := self.thumbnail_of(picture)).is_file():
                (ready / THUMBNAILS).mkdir(exist_ok=True)
                os.replace(found, ready / THUMBNAILS / f"{picture.id}.webp")
        return ready

    def clear(self) -> None:
        """Take everything away: the gallery is written."""
        shutil.rmtree(self.folder)


def _digest(keys: str, rows: Tensor) -> str:
    digest = hashlib.sha256(f"{keys} {rows.dtype} {tuple(rows.shape)}".encode("utf-8", "surrogatepass"))
    digest.update(rows.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
