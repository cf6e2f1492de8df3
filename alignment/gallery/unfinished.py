"""What a build has embedded so far, kept until its gallery is written: a build that was killed is gone on with.

Place in the flow: `embeddings -> parts in a folder of the gallery (here) -> the next build`. A part holds some hundred
rows, by the hash of a picture's file or by a caption's text. Parts of another model, or damaged ones, are taken away.
Beside them lie the thumbnails, by what they show: they go into the gallery together with it. Several processes may
write parts at once; no two of them give a file the same name unless it holds the same.
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
from dataclasses import astuple
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignment.atomic import atomic_write, write_file
from alignment.catalogue import FileState, Picture, Stamp
from alignment.gallery.kept import Kept

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
        files: how the files looked that were embedded, by a picture's source.
    """

    def __init__(self, gallery: Path, stamp: Stamp, embed_dim: int, *, alone: bool = True) -> None:
        """Take over what earlier builds of this model left, or have done so far.

        Args:
            gallery: its folder.
            stamp: says the model and the source.
            embed_dim: of the model.
            alone: whether no other process may be writing parts; then what is of no use is taken away.
        """
        self.folder, self.alone = gallery / FOLDER, alone
        self.about = {"fingerprint": stamp.fingerprint, "source": stamp.source}
        self.thumbnails = self.folder / THUMBNAILS
        self.rows, self.texts = Kept(embed_dim), Kept(embed_dim)
        self.files: dict[str, FileState] = {}
        self._noted: dict[str, FileState] = {}
        self._kept_at = time.monotonic()
        for part in sorted(self.folder.glob("*.safetensors")):
            self._take(part)
        self.thumbnails.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.rows) + len(self.texts)

    def _take(self, part: Path) -> None:
        try:
            with safe_open(part, "pt") as file:
                about, rows = file.metadata() or {}, file.get_tensor("rows")
            if about["fingerprint"] == self.about["fingerprint"] and about["sha256"] == _digest(about["keys"], rows):
                pictures, captions, files = json.loads(about["keys"])
                self.rows.include(pictures, _Part(part, 0, len(pictures)))
                self.texts.include(captions, _Part(part, len(pictures), len(captions)))
                if about["source"] == self.about["source"]:
                    self.files |= {source: FileState(*state) for source, state in files.items()}
                return
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
            logger.debug("%s is not taken over: %s", part, error)
        if self.alone:
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    # ------------------------------------------------------------ rows

    def add(self, kind: str, keys: Iterable[str], rows: Iterable[Tensor]) -> None:
        """Keep rows of pictures ("rows") or captions ("texts"); on the disk some seconds later."""
        getattr(self, kind).add(keys, rows)
        if time.monotonic() - self._kept_at >= SECONDS:
            self.keep()

    def note(self, picture: Picture) -> None:
        """Keep how a picture's file looks, so that one that is embedded need not be read again."""
        if picture.file and picture.file.mtime_ns and self.files.get(picture.source) != picture.file:
            self._noted[picture.source] = picture.file

    def keep(self) -> None:
        """Write down what has come since the last time."""
        pictures, captions = self.rows.fresh, self.texts.fresh
        if pictures or captions:
            rows = torch.stack([row for _, row in (*pictures, *captions)])
            files = {source: astuple(state) for source, state in self._noted.items()}
            keys = json.dumps([[key for key, _ in pictures], [key for key, _ in captions], files])
            digest = _digest(keys, rows)
            part = self.folder / f"{digest[:16]}.safetensors"
            write_file(part, save({"rows": rows}, {**self.about, "keys": keys, "sha256": digest}))
            self.rows.settle(_Part(part, 0, len(pictures)))
            self.texts.settle(_Part(part, len(pictures), len(captions)))
            self.files |= self._noted
            self._noted = {}
        self._kept_at = time.monotonic()

    def close(self) -> None:
        """Leave to the next build what there is, if there is anything."""
        self.keep()
        if self.alone:
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
        with atomic_write(self.thumbnail_of(picture), fsync=False) as fresh:
            # As sharp as by the default method, in 2 ms instead of 5, for a tenth more bytes.
            thumbnail.save(fresh, "WEBP", quality=80, method=1)

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


class _Part:
    """Some rows of a part, read when they are asked for."""

    def __init__(self, path: Path, start: int, count: int) -> None:
        self._path, self._start, self._count = path, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, positions: Tensor) -> Tensor:
        with safe_open(self._path, "pt") as file:
            rows: Tensor = file.get_tensor("rows")
        return rows[self._start + positions]


def _digest(keys: str, rows: Tensor) -> str:
    digest = hashlib.sha256(f"{keys} {rows.dtype} {tuple(rows.shape)}".encode("utf-8", "surrogatepass"))
    digest.update(rows.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
