"""Sidecars: text files that go by a picture's name and hold its captions, `0001.txt` beside `0001.jpg`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.data.collector import Collection, Row
from alignment.data.encoding import encoding_of, read_text
from alignment.data.image_index import is_picture_name
from alignment.data.records import texts_of

SIDECARS = (".txt", ".caption", ".json")
MAX_SIDECAR_BYTES = 2**20
UNUSED_SIDECARS = "text files beside pictures that have their captions from elsewhere"


class Sidecars:
    """The sidecars of a folder.

    Attributes:
        files: path -> file; those that may be sidecars, as found.
    """

    def __init__(self, into: Collection) -> None:
        self.into = into
        self.files: dict[str, Path] = {}
        self._used: set[str] = set()

    def beside(self, picture: Path) -> list[str]:
        """Read `0001.txt`, `0001.caption` or `0001.json` beside `0001.jpg`."""
        for ending in SIDECARS:
            for path in (os.path.splitext(picture)[0] + ending, f"{picture}{ending}"):
                if path in self.files and (texts := self._texts(path)):
                    return texts
        return []

    def elsewhere(self) -> Iterator[Row]:
        """Read `captions/0001.txt` for `images/0001.jpg`, if only one picture is called so."""
        for path, file in self.files.items():
            found = self.into.index.find(file.stem, "", os.fspath(file.parent)).paths
            if len(found) > 1:
                self.into.skip("text files that may belong to several pictures", self.into.shown(file))
                self._used.add(path)
            elif path not in self._used and found and (texts := self._texts(path)):
                yield Row(Path(found[0]), texts)

    def note_rest(self, others: Sequence[Path]) -> None:
        """Name the text files that came to nothing.

        Args:
            others: files that are neither sidecars nor tables; among sidecars they are likely to be such without a
                picture.
        """
        for path, file in self.files.items():
            if path not in self._used and file.suffix.lower() != ".json":
                self.into.skip(UNUSED_SIDECARS, self.into.shown(file))
        for file in others if self._used else ():
            if file.suffix.lower() in (".txt", ".caption"):
                self.into.skip("text files beside which no picture of their name lies", self.into.shown(file))

    def _texts(self, path: str) -> list[str]:
        self._used.add(path)
        file = self.files[path]
        try:
            if file.stat().st_size > MAX_SIDECAR_BYTES:
                raise ValueError("it is too large")
            text = read_text(file)
            self.into.note_encoding(file, encoding_of(file))
            if file.suffix.lower() == ".json":
                return _described(text)
        except OSError as error:
            self.into.refuse(file, error.strerror or str(error))
            return []
        except (ValueError, RecursionError):
            self.into.skip("unreadable captions", self.into.shown(file))
            return []
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            self.into.skip("empty captions", self.into.shown(file))
        elif not any(re.search(r"[^\W\d_]", line) for line in lines):  # boxes of a detector, most often
            self.into.skip("text files beside pictures that hold no words", self.into.shown(file))
            return []
        return lines


def _described(text: str) -> list[str]:
    """Read the captions out of an object about one picture, as img2dataset and photo services write it.

    Raises:
        ValueError: when it is no JSON.
    """
    about = json.loads(text)
    if not isinstance(about, dict):
        return []
    found = (texts_of(about[name]) for name in ("caption", "captions", "text", "description") if name in about)
    texts = (text for texts in found for text in texts if text.strip() and not is_picture_name(text))
    return list(texts)
