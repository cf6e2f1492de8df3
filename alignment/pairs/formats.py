"""Formats: how each is recognised from its path, and the one registry of readers."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from alignment.pairs.annotations import (
    is_coco,
    is_flickr8k,
    is_flickr30k,
    is_karpathy,
    read_coco,
    read_flickr,
    read_flickr30k,
    read_karpathy,
)
from alignment.pairs.collection import Collection, Row
from alignment.pairs.files import ARCHIVES, is_hidden, near, split_of
from alignment.pairs.hub import read_hub
from alignment.pairs.shards import find_shards, read_shard
from alignment.pairs.tables import columns_of, read_folder, read_table, records

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def detect(source: Path, format: str | None) -> tuple[str, list[Path]]:
    """Name the format, and the annotation files to read."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    if format == "hub" or (format and source.is_file()):
        return format, [source]
    for name in [format] if format else FORMATS:
        files = FORMATS[name].detect(source)
        if len(files) > 1 and not FORMATS[name].in_parts and not all(map(split_of, files)):
            listed = ", ".join(str(file.relative_to(source)) for file in files)
            raise ValueError(f"{source} holds several {name} annotation files ({listed}); give the path of one.")
        if files:
            return name, files
    if not source.exists():
        raise FileNotFoundError(
            f"There is no {source}; give a folder, an annotation file, or OWNER/NAME of a Hugging Face data set."
        )
    if source.suffix.lower() in ARCHIVES:
        raise ValueError(f"{source} has to be unpacked first: give the folder, or the .tar, that comes out of it.")
    raise ValueError(f"{source} holds nothing to read as {format or 'pairs'}; formats are {', '.join(FORMATS)}.")


def _named(*patterns: str, fits: Callable[[Path], bool]) -> Callable[[Path], list[Path]]:
    """Detect a file by what is in it, or those of a folder by their usual names too."""

    def detect(source: Path) -> list[Path]:
        files = [source] if source.is_file() else near(source, *patterns)
        return [file for file in files if fits(file)]

    return detect


def _tables(*suffixes: str) -> Callable[[Path], list[Path]]:
    """Detect a table by its ending, or those at the top of a folder that have an image and a caption column."""

    def fits(file: Path) -> bool:
        try:
            columns = columns_of(tuple(next(records(file), {})))
        except (ValueError, TypeError, csv.Error):
            return False
        return columns.image is not None and bool(columns.captions)

    def detect(source: Path) -> list[Path]:
        if source.is_file():
            return [source] if source.suffix.lower() in suffixes else []
        # A folder's metadata belongs to its pictures, and a .json there can be anything of any size.
        files = [file for suffix in suffixes if suffix != ".json" for file in sorted(source.glob(f"*{suffix}"))]
        return [file for file in files if file.stem != "metadata" and not is_hidden(file.name) and fits(file)]

    return detect


class Format(NamedTuple):
    """How to recognise a format, giving the files to read, and how to read one of them."""

    detect: Callable[[Path], list[Path]]
    read: Callable[[Path, Collection], Iterator[Row]]
    in_parts: bool = False  # several files are one data set, whatever their names


def _hub_id(source: Path) -> list[Path]:
    return [source] if not source.exists() and _HUB_ID.fullmatch(source.as_posix()) else []


FORMATS: dict[str, Format] = {
    "karpathy": Format(_named("dataset*.json", fits=is_karpathy), read_karpathy),
    "flickr8k": Format(_named("Flickr8k.token.txt", fits=is_flickr8k), read_flickr),
    "flickr30k": Format(_named("results_20130124.token", "results.csv", fits=is_flickr30k), read_flickr30k),
    "coco": Format(_named("captions*.json", fits=is_coco), read_coco),
    "jsonl": Format(_tables(".jsonl", ".ndjson", ".json"), read_table),
    "csv": Format(_tables(".csv", ".tsv", ".txt"), read_table),
    "webdataset": Format(find_shards, read_shard, in_parts=True),
    "folder": Format(lambda source: [source] if source.is_dir() else [], read_folder),
    "hub": Format(_hub_id, read_hub),
}
