"""Read a folder of pictures with the captions in it: tables, and sidecars, `0001.txt` beside `0001.jpg`."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignment.data.coco_flickr import is_coco_captions, read_coco
from alignment.data.collector import NOT_UTF8, Collector, RawAnnotation
from alignment.data.encoding import decode_text
from alignment.data.files import ARCHIVE_SUFFIXES, OTHER_IMAGE_SUFFIXES, SPLITS, is_image_name, split_from_name, walk
from alignment.data.records import read_captions
from alignment.data.tables import is_caption_table, may_be_captions, read_rows
from alignment.preprocess import IMAGE_SUFFIXES

UNUSED_SIDECARS = "text files beside pictures that have their captions from elsewhere"
MAX_SIDECAR_BYTES = 2**20
_SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
_NOT_READ = {".tar": "tar files without samples such as 0001.jpg with 0001.txt"}
_NOT_READ |= dict.fromkeys(OTHER_IMAGE_SUFFIXES, "pictures of a kind not read here")
_NOT_READ |= dict.fromkeys(ARCHIVE_SUFFIXES, "archives, which have to be unpacked first")
_TABLE_DEPTH = 2  # folders below the first in which a table may have any name


def read_folder(folder: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read the tables, then list the pictures with their sidecars; a folder named after a split is one."""
    pictures, others, sidecars = [], [], Sidecars(collector)
    for file in walk(folder, collector.skip_folder):
        suffix, is_metadata = file.suffix.lower(), file.stem == "metadata"
        is_near = len(file.relative_to(folder).parts) <= _TABLE_DEPTH + 1
        if suffix in IMAGE_SUFFIXES:
            pictures.append(file)
        elif suffix in _NOT_READ and not may_be_captions(file, collector.index):
            collector.skip(_NOT_READ[suffix], file.name)
        elif suffix in _SIDECAR_SUFFIXES and (collector.index.has_stem(file.stem) or is_image_name(file.stem)):
            sidecars.files[str(file)] = file
        elif is_metadata or (collector.any_table and (is_near or "caption" in file.name.lower())):
            others.append(file)
    tables = [
        one for one in others if is_coco_captions(one) or is_caption_table(one, collector, one.stem == "metadata")
    ]
    for file in _without_competing(tables, collector):
        rows = read_coco(file, collector) if is_coco_captions(file) else read_rows(file, collector)
        for row in collector.check_file(file, rows):
            yield row._replace(split=row.split or _split(file, folder))
    for picture in pictures:
        captions = [] if collector.has_captions(picture) else sidecars.read_beside(picture)
        yield RawAnnotation(picture, captions, _split(picture, folder))
    if sidecars.files and not any(map(collector.has_captions, collector.annotations)):
        yield from sidecars.read_elsewhere()
    sidecars.record_unused([file for file in others if file not in tables])


def _split(file: Path, folder: Path) -> str:
    return next((part for part in file.relative_to(folder).parts[:-1] if part.lower() in SPLITS), "")


def _without_competing(tables: list[Path], collector: Collector) -> list[Path]:
    """Drop the tables of a folder with several, unless they are named after splits."""
    kept = []
    num_tables = Counter(file.parent for file in tables if file.stem != "metadata")
    for file in tables:
        if file.stem == "metadata" or num_tables[file.parent] == 1 or split_from_name(file.stem):
            kept.append(file)
        else:
            collector.refuse(file, "several files of captions lie in its folder; give the path of one")
    return kept


class Sidecars:
    """The `files` of a folder that may be sidecars: text files with a picture's name that hold its captions."""

    def __init__(self, collector: Collector) -> None:
        self.files: dict[str, Path] = {}  # by path, in the order found
        self._collector = collector
        self._used: set[str] = set()

    def read_beside(self, picture: Path) -> list[str]:
        """Read `0001.txt`, `0001.jpg.txt` or one with another suffix beside `0001.jpg`."""
        for suffix in _SIDECAR_SUFFIXES:
            for path in (os.path.splitext(picture)[0] + suffix, f"{picture}{suffix}"):
                if path in self.files and (captions := self._read(path)):
                    return captions
        return []

    def read_elsewhere(self) -> Iterator[RawAnnotation]:
        """Read `captions/0001.txt` for `images/0001.jpg`, if no other picture has this name."""
        for path, file in self.files.items():
            found = self._collector.index.find(file.stem, "", os.fspath(file.parent))[0]
            if len(found) > 1:
                self._skip("text files that may belong to several pictures", file)
                self._used.add(path)
            elif path not in self._used and found and (captions := self._read(path)):
                yield RawAnnotation(Path(found[0]), captions)

    def record_unused(self, others: Sequence[Path]) -> None:
        """Record the text files without captions; beside sidecars, `others` are likely to be such without a picture."""
        for path, file in self.files.items():
            if path not in self._used and file.suffix.lower() != ".json":
                self._skip(UNUSED_SIDECARS, file)
        for file in others if self._used else ():
            if file.suffix.lower() in (".txt", ".caption"):
                self._skip("text files beside which no picture of their name lies", file)

    def _skip(self, reason: str, file: Path) -> list[str]:
        self._collector.skip(reason, self._collector.relative(file))
        return []

    def _read(self, path: str) -> list[str]:
        self._used.add(path)
        file = self.files[path]
        is_json = file.suffix.lower() == ".json"
        try:
            if file.stat().st_size > MAX_SIDECAR_BYTES:
                raise ValueError("it is too large")
            text, encoding = decode_text(file.read_bytes())
            captions = _read_object(text) if is_json else text.splitlines()
        except OSError as error:
            self._collector.refuse(file, error.strerror or str(error))
            return []
        except (ValueError, RecursionError):
            return self._skip("unreadable captions", file)
        if not encoding.is_utf8:
            self._collector.repair(NOT_UTF8, f"{self._collector.relative(file)} as {encoding.name}")
        captions = [caption for caption in captions if caption.strip()]
        if is_json or any(re.search(r"[^\W\d_]", caption) for caption in captions):
            return captions
        # A detector's boxes hold numbers only.
        return self._skip("text files beside pictures that hold no words" if captions else "empty captions", file)


def _read_object(text: str) -> list[str]:
    """Read the captions of a JSON object about one picture, as img2dataset and photo services write it."""
    about = json.loads(text)
    names = ("caption", "captions", "text", "description") if isinstance(about, dict) else ()
    captions = (caption for name in names if name in about for caption in read_captions(about[name]))
    return [caption for caption in captions if not is_image_name(caption)]
