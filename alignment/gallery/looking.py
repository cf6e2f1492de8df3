"""Look at a picture's file in a thread ahead of the model: has it changed, and what does it show.

Place in the flow: `records -> looking (here, in threads) -> model -> gallery folder`. A file is read once, for its hash
and its pixels, and decoded once, for its thumbnail and the model's inputs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from alignment.catalogue import FileState, Picture
from alignment.gallery.unfinished import THUMBNAILS, Unfinished
from alignment.preprocess import InputError, Preprocessor, message_with_option, open_image

THUMBNAIL_PIXELS = 320
_READ_AT_ONCE = 64 * 2**20  # bytes of the largest file that is held in memory


@dataclass(frozen=True)
class Look:
    """What was found at a picture's place: its file's state, and the model's inputs if it has to be embedded.

    Attributes:
        picture: with its state, or as it was if it cannot be read.
        inputs: None if it is embedded already.
        refusal: why it cannot be read.
        error: the same, as it was raised, if it is the file's fault.
        is_shut: whether the file is there, but may not be read now.
    """

    picture: Picture
    inputs: Mapping[str, Tensor] | None = None
    refusal: str = ""
    error: InputError | None = None
    is_shut: bool = False


@dataclass(frozen=True)
class Looker:
    """Finds out whether a picture's file has changed; if so, makes its thumbnail and inputs. For many threads at once.

    Attributes:
        out: the gallery as it is.
        unfinished: where new thumbnails go, and those of a build that was killed are.
        files: what is known of a picture, by its source.
        is_known: whether a file is embedded or about to be, by its hash.
        preprocessor: of the model.
    """

    out: Path
    unfinished: Unfinished
    files: Mapping[str, FileState]
    is_known: Callable[[str], bool]
    preprocessor: Preprocessor

    def __call__(self, picture: Picture) -> Look:
        """Look at one picture; one that cannot be read is reported, not raised.

        Raises:
            OSError: when its thumbnail cannot be written.
        """
        try:
            look, thumbnail = self._look(picture)
        except InputError as error:
            return Look(picture, refusal=message_with_option(error), error=error)
        except OSError as error:
            return Look(picture, refusal=error.strerror or str(error), is_shut=not isinstance(error, FileNotFoundError))
        if thumbnail is not None:
            self.unfinished.keep_thumbnail(look.picture, thumbnail)
        return look

    def _look(self, picture: Picture) -> tuple[Look, Image.Image | None]:
        path, before = picture.path, self.files.get(picture.source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        stat = path.stat()
        time = 0 if picture.package else stat.st_mtime_ns  # when a package was installed says nothing
        if (again := self.unfinished.files.get(picture.source)) and _is_as(again, stat) and self.is_known(again.sha256):
            done = replace(picture, file=again)
            if is_whole(self.unfinished.thumbnail_of(done)):
                return Look(done), None
        shown = bool(picture.package) or is_whole(self.out / THUMBNAILS / f"{picture.id}.webp")
        if before and shown and time and _is_as(before, stat):
            return Look(replace(picture, file=before)), None
        content, sha256 = _read(path)
        seen = replace(picture, file=FileState(stat.st_size, time, sha256))
        shown = shown and (bool(picture.package) or (before is not None and before.sha256 == sha256))
        shown = shown or is_whole(self.unfinished.thumbnail_of(seen))
        known = self.is_known(sha256)
        if shown and known:
            return Look(seen), None
        near = self.preprocessor.draft_size and max(self.preprocessor.draft_size, THUMBNAIL_PIXELS)
        image = open_image(content, draft_size=near)
        inputs = None if known else self.preprocessor.images([image])
        if shown:
            return Look(seen, inputs), None
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        return Look(seen, inputs), image


def _is_as(state: FileState, stat: os.stat_result) -> bool:
    """Whether a file has kept its size and time."""
    return (state.size, state.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def is_whole(thumbnail: Path) -> bool:
    """Whether there is a thumbnail, and all of it, going by the size that stands at its beginning."""
    try:
        with thumbnail.open("rb") as file:
            head, size = file.read(12), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    return head[:4] == b"RIFF" and head[8:] == b"WEBP" and size >= 8 + int.from_bytes(head[4:8], "little")


def _read(path: Path) -> tuple[bytes | Path, str]:
    """Read a file once: its content, of a very large one its path again; and the hash of it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _READ_AT_ONCE:
            return path, hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return content, hashlib.sha256(content).hexdigest()
