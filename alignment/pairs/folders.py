"""A folder of pictures, with the captions that lie in it: tables, and text files that go by a picture's name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from alignment.pairs.annotations import is_coco_captions, read_coco
from alignment.pairs.collection import Collection, Row
from alignment.pairs.columns import NotRead
from alignment.pairs.encoding import encoding_of, read_text
from alignment.pairs.files import ARCHIVES, OTHER_PICTURES, PICTURES, SPLITS, split_of_name, walk
from alignment.pairs.lookup import is_picture_name
from alignment.pairs.tables import TABLES, OnlyClasses, check_table, table_rows, texts_of
from alignment.pairs.unread import could_be_captions, why_unread

MAX_SIDECAR_BYTES = 2**20
_SIDECARS = (".txt", ".caption", ".json")
_NOT_READ = {
    ".tar": "tar files without samples such as 0001.jpg with 0001.txt",
    **dict.fromkeys(OTHER_PICTURES, "pictures of a kind not read here"),
    **dict.fromkeys(ARCHIVES, "archives, which have to be unpacked first"),
}
_FOLDERS_DEEP = 2  # in which tables of any name are looked at


def read_folder(folder: Path, into: Collection) -> Iterator[Row]:
    """Read the tables below, then list the pictures, with their sidecars; a folder named like a split is one."""
    pictures, tables, sidecars = [], [], dict[str, Path]()
    for file in walk(folder, into.leave_out):
        ending = file.suffix.lower()
        if ending in PICTURES:
            pictures.append(file)
        elif ending in _NOT_READ:
            into.skip(_NOT_READ[ending], file.name)
        elif ending in _SIDECARS and (into.index.has_stem(file.stem) or is_picture_name(file.stem)):
            sidecars[os.fspath(file)] = file
        elif file.stem == "metadata" or (into.any_table and len(file.relative_to(folder).parts) <= _FOLDERS_DEEP + 1):
            tables.append(file)
    for file in _told_apart([file for file in tables if _is_table(file, into)], into):
        rows = read_coco(file, into) if _is_coco(file) else table_rows(file, into)
        for row in into.counted(file, rows):
            yield row._replace(split=row.split or _split(file, folder))
    for picture in pictures:
        texts = [] if into.has_captions(os.path.abspath(picture)) else _captions_beside(picture, sidecars, into)
        yield Row(picture, texts, _split(picture, folder))
    if sidecars and not any(map(into.has_captions, into.rows)):
        yield from _captions_elsewhere(list(sidecars.values()), into)


def _split(file: Path, folder: Path) -> str:
    return next((part for part in file.relative_to(folder).parts[:-1] if part.lower() in SPLITS), "")


def _is_coco(file: Path) -> bool:
    return file.suffix.lower() == ".json" and is_coco_captions(file)


def _is_table(file: Path, into: Collection) -> bool:
    """Whether a file holds captions; if it seems to be meant so and cannot be read, that is noted."""
    try:
        if file.suffix.lower() in TABLES and not _is_coco(file):
            check_table(file, into.index, trusted=into.trusted)
        elif file.suffix.lower() not in TABLES:
            if could_be_captions(file, into.index):
                into.refuse(file, why_unread(file))
            return False
    except OnlyClasses as reason:
        OnlyClasses.note(file, reason.column, into)
        return False
    except NotRead as reason:
        if reason.names_pictures or file.stem == "metadata":
            into.refuse(file, str(reason))
        return False
    return True


def _told_apart(tables: list[Path], into: Collection) -> list[Path]:
    """Keep the tables that are the only ones in their folder, or that belong to different splits."""
    others = [file for file in tables if file.stem != "metadata"]
    crowded = {one.parent for one in others if sum(one.parent == other.parent for other in others) > 1}
    for file in others:
        if file.parent in crowded and not split_of_name(file.stem):
            into.refuse(file, "several files of captions lie in its folder; give the path of one")
            tables.remove(file)
    return tables


# ---------------------------------------------------------------- text beside pictures


def _captions_beside(picture: Path, sidecars: dict[str, Path], into: Collection) -> list[str]:
    """Read `0001.txt`, `0001.caption` or `0001.json` beside `0001.jpg`."""
    for ending in _SIDECARS:
        for path in (os.path.splitext(picture)[0] + ending, f"{picture}{ending}"):
            if path in sidecars and (texts := _sidecar(sidecars.pop(path), into)):
                return texts
    return []


def _captions_elsewhere(sidecars: list[Path], into: Collection) -> Iterator[Row]:
    """Read `captions/0001.txt` for `images/0001.jpg`, if only one picture is called so."""
    for file in sidecars:
        found = into.index.find(file.stem, "", os.fspath(file.parent)).paths
        if len(found) == 1 and (texts := _sidecar(file, into)):
            yield Row(Path(found[0]), texts)


def _sidecar(file: Path, into: Collection) -> list[str]:
    try:
        if file.stat().st_size > MAX_SIDECAR_BYTES:
            raise ValueError("it is too large")
        text = read_text(file)
        into.note_encoding(file, encoding_of(file))
    except (OSError, ValueError):
        into.skip("unreadable captions", into.shown(file))
        return []
    if file.suffix.lower() == ".json":
        return _described(text)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and not any(re.search(r"[^\W\d_]", line) for line in lines):  # boxes of a detector, most often
        into.skip("text files beside pictures that hold no words", into.shown(file))
        return []
    return lines


def _described(text: str) -> list[str]:
    """Read the captions out of an object about one picture, as img2dataset and photo services write it."""
    about: object = None
    with suppress(ValueError, RecursionError):
        about = json.loads(text)
    if not isinstance(about, dict):
        return []
    found = (texts_of(about[name]) for name in ("caption", "captions", "text", "description") if name in about)
    texts = (text for texts in found for text in texts if text.strip() and not is_picture_name(text))
    return list(texts)
