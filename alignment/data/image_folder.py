"""Read a folder of pictures with the captions in it: tables, and text files named after the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alignment.data.coco_flickr import is_coco_captions, read_coco
from alignment.data.collector import Collector, RawAnnotation
from alignment.data.files import (
    ARCHIVE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    SPLITS,
    is_image_name,
    split_from_name,
    walk,
)
from alignment.data.sidecars import SIDECAR_SUFFIXES, Sidecars
from alignment.data.tables import is_caption_table, read_rows
from alignment.data.unsupported import may_be_captions
from alignment.preprocess import IMAGE_SUFFIXES

_NOT_READ = {
    ".tar": "tar files without samples such as 0001.jpg with 0001.txt",
    **dict.fromkeys(OTHER_IMAGE_SUFFIXES, "pictures of a kind not read here"),
    **dict.fromkeys(ARCHIVE_SUFFIXES, "archives, which have to be unpacked first"),
}
_TABLE_DEPTH = 2  # folders below the first in which a table may have any name


def read_folder(folder: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read the tables, then list the pictures with their sidecars; a folder named after a split is one."""
    pictures, others, sidecars = [], [], Sidecars(collector)
    for file in walk(folder, collector.leave_out):
        suffix = file.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            pictures.append(file)
        elif suffix in _NOT_READ and not may_be_captions(file, collector.index):
            collector.skip(_NOT_READ[suffix], file.name)
        elif suffix in SIDECAR_SUFFIXES and (collector.index.has_stem(file.stem) or is_image_name(file.stem)):
            sidecars.files[str(file)] = file
        elif file.stem == "metadata" or (collector.any_table and _may_be_table(file, folder)):
            others.append(file)
    tables = [file for file in others if _is_table(file, collector)]
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


def _is_table(file: Path, collector: Collector) -> bool:
    return is_coco_captions(file) or is_caption_table(file, collector, is_metadata=file.stem == "metadata")


def _may_be_table(file: Path, folder: Path) -> bool:
    return len(file.relative_to(folder).parts) <= _TABLE_DEPTH + 1 or "caption" in file.name.lower()


def _split(file: Path, folder: Path) -> str:
    return next((part for part in file.relative_to(folder).parts[:-1] if part.lower() in SPLITS), "")


def _without_competing(tables: list[Path], collector: Collector) -> list[Path]:
    """Drop the tables of a folder with several, unless they are named after splits."""
    kept = []
    for file in tables:
        competing = [other for other in tables if other.stem != "metadata" and other.parent == file.parent]
        if file.stem == "metadata" or len(competing) == 1 or split_from_name(file.stem):
            kept.append(file)
        else:
            collector.refuse(file, "several files of captions lie in its folder; give the path of one")
    return kept
