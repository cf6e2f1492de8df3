"""Formats: how each is recognised from its path, and the one registry of readers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from alignment.data.coco_flickr import (
    is_coco,
    is_coco_captions,
    is_flickr8k,
    is_flickr30k,
    is_karpathy,
    read_coco,
    read_flickr,
    read_flickr30k,
    read_karpathy,
)
from alignment.data.collector import Collection, Row
from alignment.data.columns import NotRead
from alignment.data.files import ARCHIVES, is_hidden, near, split_of
from alignment.data.hub_dataset import read_hub
from alignment.data.image_folder import read_folder
from alignment.data.image_index import PictureIndex
from alignment.data.sidecars import UNUSED_SIDECARS
from alignment.data.tables import TABLES, ClassLabelsOnly, check_table, read_table
from alignment.data.unsupported import could_be_captions, why_unread
from alignment.data.webdataset import find_shards, read_shard
from alignment.preprocess import join_first

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def detect(source: Path, format: str | None, index: PictureIndex) -> tuple[str, list[Path]]:
    """Name the format, and the annotation files to read."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    if format == "hub" or (format and source.is_file()):
        return format, [source]
    for name in [format] if format else FORMATS:
        files = FORMATS[name].detect(source, index)
        if len(files) > 1 and not FORMATS[name].in_parts and not all(split_of(file, source) for file in files):
            listed = join_first([str(file.relative_to(source)) for file in files], 9)
            raise ValueError(f"{source} holds several {name} annotation files ({listed}); give the path of one.")
        if files:
            return name, files
    if not source.exists():
        raise FileNotFoundError(
            f"There is no {source}; give a folder, an annotation file, or OWNER/NAME of a Hugging Face data set."
        )
    if source.suffix.lower() in ARCHIVES:
        raise ValueError(f"{source} has to be unpacked first: give the folder, or the .tar, that comes out of it.")
    if source.is_file():
        raise ValueError(f"{source} cannot be read: {why_unread(source)}.")
    raise ValueError(f"{source} holds nothing to read as {format or 'pairs'}; formats are {', '.join(FORMATS)}.")


def note_others(source: Path, read: Sequence[Path], into: Collection) -> None:
    """Name the files of captions in a folder that were not read, and those that cannot be."""
    for file in sorted(source.iterdir()):
        if file in read or is_hidden(file.name) or not file.is_file():
            continue
        if into.index.has_stem(file.stem):
            if file.suffix.lower() in (".txt", ".caption"):
                into.skip(UNUSED_SIDECARS, file.name)
            continue
        try:
            if file.suffix.lower() in TABLES:
                check_table(file, into.index)
                into.skip("other files of captions, whose path has to be given", file.name)
            elif could_be_captions(file, into.index):
                into.refuse(file, why_unread(file))
        except ClassLabelsOnly as reason:
            ClassLabelsOnly.note(file, reason.column, into)
        except NotRead as reason:
            if reason.names_pictures:
                into.refuse(file, str(reason))


Detect = Callable[[Path, PictureIndex], list[Path]]


def _named(*patterns: str, fits: Callable[[Path], bool], others: Callable[[Path], bool] | None = None) -> Detect:
    """Detect a file by what is in it, or those of a folder by their usual names too.

    Of a folder without one of these names, JSON files count that `others` recognises, below it if their folders are
    named after splits.
    """

    def detect(source: Path, index: PictureIndex) -> list[Path]:
        if source.is_file():
            return [source] if fits(source) else []
        files = [file for file in near(source, *patterns) if fits(file)]
        if files or others is None:
            return files
        unusual = [file for file in near(source, "*.json") if file.parent == source or split_of(file, source)]
        return [file for file in unusual if not index.has_stem(file.stem) and others(file)]

    return detect


def _tables(*suffixes: str) -> Detect:
    """Detect a table by its ending, or those at the top of a folder that hold captions of pictures."""

    def fits(file: Path, index: PictureIndex) -> bool:
        if file.stem == "metadata" or is_hidden(file.name) or index.has_stem(file.stem):
            return False  # a folder's metadata belongs to its pictures
        try:
            check_table(file, index)
        except NotRead:
            return False
        return True

    def detect(source: Path, index: PictureIndex) -> list[Path]:
        if source.is_file():
            return [source] if source.suffix.lower() in suffixes else []
        return [file for suffix in suffixes for file in sorted(source.glob(f"*{suffix}")) if fits(file, index)]

    return detect


class Format(NamedTuple):
    """How to recognise a format, giving the files to read, and how to read one of them."""

    detect: Detect
    read: Callable[[Path, Collection], Iterator[Row]]
    in_parts: bool = False  # several files are one data set, whatever their names
    alone: bool = True  # nothing else in its folder is looked at


def _hub_id(source: Path, index: PictureIndex) -> list[Path]:
    return [source] if not source.exists() and _HUB_ID.fullmatch(source.as_posix()) else []


FORMATS: dict[str, Format] = {
    "karpathy": Format(_named("dataset*.json", fits=is_karpathy, others=is_karpathy), read_karpathy),
    "flickr8k": Format(_named("Flickr8k.token.txt", fits=is_flickr8k), read_flickr),
    "flickr30k": Format(_named("results_20130124.token", "results.csv", fits=is_flickr30k), read_flickr30k),
    "coco": Format(_named("captions*.json", fits=is_coco, others=is_coco_captions), read_coco, alone=False),
    "jsonl": Format(_tables(".jsonl", ".ndjson", ".json"), read_table, alone=False),
    "csv": Format(_tables(".csv", ".tsv", ".txt"), read_table, alone=False),
    "parquet": Format(_tables(".parquet"), read_table, in_parts=True, alone=False),
    "webdataset": Format(lambda source, index: find_shards(source), read_shard, in_parts=True),
    "folder": Format(lambda source, index: [source] if source.is_dir() else [], read_folder),
    "hub": Format(_hub_id, read_hub),
}
