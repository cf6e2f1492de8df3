"""Read sidecar files: text files with a picture's name that hold its captions, `0001.txt` beside `0001.jpg`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.data.collector import Collector, RawAnnotation
from alignment.data.encoding import decode_text
from alignment.data.files import is_image_name
from alignment.data.records import read_captions

SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
MAX_SIDECAR_BYTES = 2**20
UNUSED_SIDECARS = "text files beside pictures that have their captions from elsewhere"


class Sidecars:
    """The files of a folder that may be sidecars.

    Attributes:
        files: path -> file, in the order found.
    """

    def __init__(self, collector: Collector) -> None:
        self.files: dict[str, Path] = {}
        self._collector = collector
        self._used: set[str] = set()

    def read_beside(self, picture: Path) -> list[str]:
        """Read `0001.txt`, `0001.caption` or `0001.json` beside `0001.jpg`."""
        for suffix in SIDECAR_SUFFIXES:
            for path in (os.path.splitext(picture)[0] + suffix, f"{picture}{suffix}"):
                if path in self.files and (captions := self._read(path)):
                    return captions
        return []

    def read_elsewhere(self) -> Iterator[RawAnnotation]:
        """Read `captions/0001.txt` for `images/0001.jpg`, if no other picture has this name."""
        for path, file in self.files.items():
            found = self._collector.index.find(file.stem, "", os.fspath(file.parent)).paths
            if len(found) > 1:
                self._collector.skip("text files that may belong to several pictures", self._collector.relative(file))
                self._used.add(path)
            elif path not in self._used and found and (captions := self._read(path)):
                yield RawAnnotation(Path(found[0]), captions)

    def record_unused(self, others: Sequence[Path]) -> None:
        """Record the text files that no caption was read from.

        Args:
            others: files that are neither sidecars nor tables; beside sidecars they are likely to be such without a
                picture.
        """
        unused = [
            file for path, file in self.files.items() if path not in self._used and file.suffix.lower() != ".json"
        ]
        for file in unused:
            self._collector.skip(UNUSED_SIDECARS, self._collector.relative(file))
        for file in others if self._used else ():
            if file.suffix.lower() in (".txt", ".caption"):
                reason = "text files beside which no picture of their name lies"
                self._collector.skip(reason, self._collector.relative(file))

    def _read(self, path: str) -> list[str]:
        self._used.add(path)
        file, name = self.files[path], self._collector.relative(path)
        try:
            if file.stat().st_size > MAX_SIDECAR_BYTES:
                raise ValueError("it is too large")
            text, encoding = decode_text(file.read_bytes())
            captions = _read_object(text) if file.suffix.lower() == ".json" else text.splitlines()
        except OSError as error:
            self._collector.refuse(file, error.strerror or str(error))
            return []
        except (ValueError, RecursionError):
            self._collector.skip("unreadable captions", name)
            return []
        self._collector.record_encoding(name, encoding)
        captions = [caption for caption in captions if caption.strip()]
        if file.suffix.lower() == ".json" or any(re.search(r"[^\W\d_]", caption) for caption in captions):
            return captions
        reason = (
            "text files beside pictures that hold no words" if captions else "empty captions"
        )  # as a detector's boxes
        self._collector.skip(reason, name)
        return []


def _read_object(text: str) -> list[str]:
    """Read the captions of a JSON object about one picture, as img2dataset and photo services write it.

    Raises:
        ValueError: when it is no JSON.
    """
    about = json.loads(text)
    names = ("caption", "captions", "text", "description") if isinstance(about, dict) else ()
    captions = (caption for name in names if name in about for caption in read_captions(about[name]))
    return [caption for caption in captions if not is_image_name(caption)]
