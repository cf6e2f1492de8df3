"""A folder of pictures, with the captions that lie in it: tables, and text files that go by a picture's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from alignment.data.coco_flickr import is_coco_captions, read_coco
from alignment.data.collector import Collection, Row
from alignment.data.columns import NotRead
from alignment.data.files import ARCHIVES, OTHER_PICTURES, SPLITS, split_of_name, walk
from alignment.data.image_index import is_picture_name
from alignment.data.sidecars import SIDECARS, Sidecars
from alignment.data.tables import TABLES, ClassLabelsOnly, check_table, table_rows
from alignment.data.unsupported import could_be_captions, why_unread
from alignment.preprocess import IMAGE_SUFFIXES

_NOT_READ = {
    ".tar": "tar files without samples such as 0001.jpg with 0001.txt",
    **dict.fromkeys(OTHER_PICTURES, "pictures of a kind not read here"),
    **dict.fromkeys(ARCHIVES, "archives, which have to be unpacked first"),
}
_FOLDERS_DEEP = 2  # in which tables of any name are looked at


def read_folder(folder: Path, into: Collection) -> Iterator[Row]:
    """Read the tables below, then list the pictures, with their sidecars; a folder named like a split is one."""
    pictures, tables, sidecars = [], [], Sidecars(into)
    for file in walk(folder, into.leave_out):
        ending = file.suffix.lower()
        if ending in IMAGE_SUFFIXES:
            pictures.append(file)
        elif ending in _NOT_READ and not could_be_captions(file, into.index):
            into.skip(_NOT_READ[ending], file.name)
        elif ending in SIDECARS and (into.index.has_stem(file.stem) or is_picture_name(file.stem)):
            sidecars.files[os.fspath(file)] = file
        elif file.stem == "metadata" or (into.any_table and _may_be_table(file, folder)):
            tables.append(file)
    readable = [file for file in tables if _is_table(file, into)]
    for file in _told_apart(list(readable), into):
        rows = read_coco(file, into) if _is_coco(file) else table_rows(file, into)
        for row in into.counted(file, rows):
            yield row._replace(split=row.split or _split(file, folder))
    for picture in pictures:
        texts = sidecars.beside(picture) if not into.has_captions(os.path.abspath(picture)) else []
        yield Row(picture, texts, _split(picture, folder))
    if sidecars.files and not any(map(into.has_captions, into.rows)):
        yield from sidecars.elsewhere()
    sidecars.note_rest([file for file in tables if file not in readable])


def _may_be_table(file: Path, folder: Path) -> bool:
    return len(file.relative_to(folder).parts) <= _FOLDERS_DEEP + 1 or "caption" in file.name.lower()


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
    except ClassLabelsOnly as reason:
        ClassLabelsOnly.note(file, reason.column, into)
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
