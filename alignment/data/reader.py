"""Read a whole data set: detect its format, read its annotations, and join them to the pictures."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from alignment.data import coco_flickr as coco
from alignment.data.collector import Collector, Pair, RawAnnotation, ReadIssues
from alignment.data.files import ARCHIVE_SUFFIXES, ImageIndex, canonical_split, find_files, is_hidden, split_from_path
from alignment.data.image_folder import UNUSED_SIDECARS, read_folder
from alignment.data.image_store import find_shards, read_hub, read_shard
from alignment.data.records import UnreadableTable
from alignment.data.tables import explain_unsupported, is_caption_table, read_table
from alignment.preprocess import join_first

_FLICKR8K = "Flickr8k.token.txt"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")

_IN_PARTS = ("parquet", "webdataset")  # formats of which several files are one data set, whatever their names
_TABLES = ("csv", "jsonl", "parquet")  # formats in which a user writes absolute paths
# Folders of annotations; the pictures are elsewhere below the folder around them.
_ANNOTATION_FOLDERS = {"annotations", "flickr8k_text", "karpathy", "caption_datasets"}

BLOCK = 64
"""Neighbours that stay in one partition: they are close on disk, and form the same batches as in one process."""

Item = TypeVar("Item")
Detect = Callable[[Path, ImageIndex], list[Path]]
"""Returns the files to read, none if a path is not of the format."""
Read = Callable[[Path, Collector], Iterator[RawAnnotation]]


def detect_format(source: Path, format: str | None, index: ImageIndex) -> tuple[str, list[Path]]:
    """Find the name of the format, if it is not given, and the files to read; errors as of `read_data`."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    if format == "hub" or (format and source.is_file()):
        return format, [source]
    for name in [format] if format else FORMATS:
        files = FORMATS[name][0](source, index)
        if len(files) > 1 and name not in _IN_PARTS and not all(split_from_path(file, source) for file in files):
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

    def detect(source: Path, index: ImageIndex) -> list[Path]:
        if source.is_file():
            return [source] if source.suffix.lower() in suffixes else []
        files = [file for suffix in suffixes for file in sorted(source.glob(f"*{suffix}")) if not is_hidden(file.name)]
        # Metadata is read with the folder's pictures.
        files = [file for file in files if file.stem != "metadata" and not index.has_stem(file.stem)]
        return [file for file in files if is_caption_table(file, Collector(index))]

    return detect


FORMATS: dict[str, tuple[Detect, Read]] = {  # in the order in which they are tried
    "karpathy": (_by_name("dataset*.json", fits=coco.is_karpathy, others=coco.is_karpathy), coco.read_karpathy),
    "flickr8k": (_by_name(_FLICKR8K, fits=lambda file: file.name == _FLICKR8K), coco.read_flickr),
    "flickr30k": (_by_name("results_20130124.token", "results.csv", fits=coco.is_flickr30k), coco.read_flickr),
    "coco": (_by_name("captions*.json", fits=coco.is_coco, others=coco.is_coco_captions), coco.read_coco),
    "jsonl": (_by_suffix(".jsonl", ".ndjson", ".json"), read_table),
    "csv": (_by_suffix(".csv", ".tsv", ".txt"), read_table),
    "parquet": (_by_suffix(".parquet"), read_table),
    "webdataset": (lambda source, index: find_shards(source), read_shard),
    "folder": (lambda source, index: [source] if source.is_dir() else [], read_folder),
    "hub": (lambda path, index: [path] if not path.exists() and _HUB_ID.fullmatch(path.as_posix()) else [], read_hub),
}


@dataclass(frozen=True)
class Partition:
    """One of `count` equal parts of a data set, of processes that need not know of each other; counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2/4", the second of four; a ValueError says that the text is something else."""
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text!r} is no share; the second of four is 2/4.")
        return cls(int(found[1]), int(found[2]))

    def select(self, items: Sequence[Item], block: int = BLOCK) -> list[Item]:
        """Take every `count`-th block of `block` neighbours."""
        starts = range((self.number - 1) * block, len(items), self.count * block)
        return [item for start in starts for item in items[start : start + block]]


@dataclass(kw_only=True)
class ReadResult(ReadIssues):
    """The content of a data set, and what of it does not fit."""

    pairs: list[Pair]  # one for each picture, in the order of the data set
    format: str  # the name it was read by


def read_data(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    split: str | None = None,
    trusted: bool = True,
    partition: Partition | None = None,
) -> ReadResult:
    """Read the pictures of a data set, each once, with all captions that belong to it.

    Missing pictures, empty captions and unreadable lines are left out, counted, and logged in one line. A picture
    named without its folder is looked for in the whole data set. Names with ".." never lead out of the data set's
    folder; absolute paths are opened only if a table of the user's own names them.

    Args:
        source: folder, annotation file, tar shard or pattern of shards, or Hub id.
        format: a name from the package's table, where the detected one is wrong.
        split: read only this one; "val" and "dev" mean the same.
        trusted: whether the annotations are the user's own; absolute paths in those of others are not opened.
        partition: read only this part, which may be empty; each of several shards belongs to one partition.

    Raises:
        FileNotFoundError: when there is no such folder, file or Hub data set.
        ValueError: when the format is unknown, the annotations cannot be read, or no picture is left.
    """
    source = Path(source)
    index = ImageIndex(_dataset_root(source))
    name, files = detect_format(source, format, index)
    by_file = partition is not None and name in _IN_PARTS and len(files) > 1
    if partition is not None and by_file:
        files = partition.select(files, block=1)
    absolute = trusted and name in _TABLES
    collector = Collector(index, canonical_split(split or ""), absolute, trusted, any_table=format != "folder")
    for file in files:
        _read_file(file, name, collector)
    if source.is_dir() and format is None and name in (*_TABLES, "coco"):
        record_others(source, files, collector)
        for path in index.paths if not (split or partition) else ():
            if path not in collector.annotations:
                collector.skip("pictures that no caption names", collector.relative(path))
    pairs = collector.pairs(f"{source} ({name})", may_be_empty=partition is not None)
    if partition is not None and not by_file:
        pairs = partition.select(pairs)
    return ReadResult(
        pairs=pairs,
        format=name,
        left_out={reason: tuple(what) for reason, what in collector.left_out.items()},
        repaired={reason: tuple(what) for reason, what in collector.repaired.items()},
        unread=collector.unread,
        unlisted=tuple(collector.unlisted),
    )


def _dataset_root(source: Path) -> Path:
    """Return the data set's folder: that of an annotation file, or the one around a folder of annotations."""
    folder = Path(os.path.abspath(source if source.is_dir() else source.parent))
    return folder.parent if folder.name.lower() in _ANNOTATION_FOLDERS else folder


def _read_file(file: Path, format: str, collector: Collector) -> None:
    annotations = FORMATS[format][1](file, collector)
    try:
        for annotation in collector.check_file(file, annotations) if file.is_file() else annotations:
            collector.add(annotation)
    except UnreadableTable as error:
        raise ValueError(f"{file} cannot be read as {format}: {error}.") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read as {format} ({type(error).__name__}: {error}); "
            "check that it is complete and saved as UTF-8, or name another format."
        ) from error
