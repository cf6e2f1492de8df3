"""Recognise the format of a data set from its path; one table of all readers."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from alignment.data.coco_flickr import (
    is_coco,
    is_coco_captions,
    is_flickr30k,
    is_karpathy,
    read_coco,
    read_flickr,
    read_karpathy,
)
from alignment.data.collector import Collector, RawAnnotation
from alignment.data.columns import UnreadableTable
from alignment.data.files import ARCHIVE_SUFFIXES, ImageIndex, find_files, is_hidden, split_from_path
from alignment.data.image_folder import UNUSED_SIDECARS, read_folder
from alignment.data.image_store import read_hub
from alignment.data.tables import check_table, explain_unsupported, is_caption_table, read_table
from alignment.data.webdataset import find_shards, read_shard
from alignment.preprocess import join_first

_FLICKR8K = "Flickr8k.token.txt"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")

Detect = Callable[[Path, ImageIndex], list[Path]]


class Format(NamedTuple):
    """How to recognise a format and read one of its files."""

    detect: Detect  # returns the files to read, none if a path is not of this format
    read: Callable[[Path, Collector], Iterator[RawAnnotation]]
    in_parts: bool = False  # several files are one data set, whatever their names
    is_exclusive: bool = True  # other files of captions in the folder are ignored


def detect_format(source: Path, format: str | None, index: ImageIndex) -> tuple[str, list[Path]]:
    """Find the name of the format, if it is not given, and the files to read.

    Raises:
        FileNotFoundError: when there is nothing at the path.
        ValueError: when the format is unknown, or no file, or one of several, is of it.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    if format == "hub" or (format and source.is_file()):
        return format, [source]
    for name in [format] if format else FORMATS:
        files = FORMATS[name].detect(source, index)
        if len(files) > 1 and not FORMATS[name].in_parts and not all(split_from_path(file, source) for file in files):
            listed = join_first([str(file.relative_to(source)) for file in files], 9)
            raise ValueError(f"{source} holds several {name} annotation files ({listed}); give the path of one.")
        if files:
            return name, files
    if not source.exists():
        raise FileNotFoundError(
            f"There is no {source}; give a folder, an annotation file, or OWNER/NAME of a Hugging Face data set."
        )
    if source.suffix.lower() in ARCHIVE_SUFFIXES:
        raise ValueError(f"{source} has to be unpacked first: give the folder, or the .tar, that comes out of it.")
    if source.is_file():
        raise ValueError(f"{source} cannot be read: {explain_unsupported(source)}.")
    raise ValueError(f"{source} holds nothing to read as {format or 'pairs'}; formats are {', '.join(FORMATS)}.")


def record_others(folder: Path, files: Sequence[Path], collector: Collector) -> None:
    """Record the files of captions in a folder that are not among those read."""
    for file in sorted(folder.iterdir()):
        if file in files or is_hidden(file.name) or not file.is_file():
            continue
        if collector.index.has_stem(file.stem):
            if file.suffix.lower() in (".txt", ".caption"):
                collector.skip(UNUSED_SIDECARS, file.name)
        elif is_caption_table(file, collector):
            collector.skip("other files of captions, whose path has to be given", file.name)


def _by_name(*patterns: str, fits: Callable[[Path], bool], others: Callable[[Path], bool] | None = None) -> Detect:
    """Make a function that detects a file by its content, or those of a folder by name and content.

    If a folder has none of these names, JSON files recognised by `others` are detected, and those one folder below it
    if that is named after a split.
    """

    def detect(source: Path, index: ImageIndex) -> list[Path]:
        if source.is_file():
            return [source] if fits(source) else []
        files = [file for file in find_files(source, *patterns) if fits(file)]
        if files or others is None:
            return files
        files = [file for file in find_files(source, "*.json") if not index.has_stem(file.stem)]
        return [file for file in files if (file.parent == source or split_from_path(file, source)) and others(file)]

    return detect


def _by_suffix(*suffixes: str) -> Detect:
    """Make a function that detects a table by its suffix, or those in a folder by their content."""

    def fits(file: Path, index: ImageIndex) -> bool:
        if file.stem == "metadata" or is_hidden(file.name) or index.has_stem(file.stem):
            return False  # metadata is read with the folder's pictures
        try:
            check_table(file, Collector(index))
        except UnreadableTable:
            return False
        return True

    def detect(source: Path, index: ImageIndex) -> list[Path]:
        if source.is_file():
            return [source] if source.suffix.lower() in suffixes else []
        return [file for suffix in suffixes for file in sorted(source.glob(f"*{suffix}")) if fits(file, index)]

    return detect


FORMATS: dict[str, Format] = {  # in the order in which they are tried
    "karpathy": Format(_by_name("dataset*.json", fits=is_karpathy, others=is_karpathy), read_karpathy),
    "flickr8k": Format(_by_name(_FLICKR8K, fits=lambda file: file.name == _FLICKR8K), read_flickr),
    "flickr30k": Format(_by_name("results_20130124.token", "results.csv", fits=is_flickr30k), read_flickr),
    "coco": Format(_by_name("captions*.json", fits=is_coco, others=is_coco_captions), read_coco, is_exclusive=False),
    "jsonl": Format(_by_suffix(".jsonl", ".ndjson", ".json"), read_table, is_exclusive=False),
    "csv": Format(_by_suffix(".csv", ".tsv", ".txt"), read_table, is_exclusive=False),
    "parquet": Format(_by_suffix(".parquet"), read_table, in_parts=True, is_exclusive=False),
    "webdataset": Format(lambda source, index: find_shards(source), read_shard, in_parts=True),
    "folder": Format(lambda source, index: [source] if source.is_dir() else [], read_folder),
    "hub": Format(
        lambda source, index: [source] if not source.exists() and _HUB_ID.fullmatch(source.as_posix()) else [], read_hub
    ),
}
