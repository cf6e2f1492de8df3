"""Read a whole data set: detect its format, read its annotations, and join them to the pictures."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from alignment.data.collector import Collector, Pair, ReadIssues
from alignment.data.columns import UnreadableTable
from alignment.data.files import UNLISTED, ImageIndex, canonical_split, dataset_root
from alignment.data.formats import FORMATS, detect_format, record_others

Item = TypeVar("Item")

BLOCK = 64
"""Neighbours that stay in one partition: they are close on disk, and form the same batches as in one process."""

_ABSOLUTE = ("csv", "jsonl", "parquet")  # formats in which a user writes absolute paths


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
    index = ImageIndex(dataset_root(source))
    name, files = detect_format(source, format, index)
    by_file = partition is not None and FORMATS[name].in_parts and len(files) > 1
    if partition is not None and by_file:
        files = partition.select(files, block=1)
    absolute = trusted and name in _ABSOLUTE
    collector = Collector(index, canonical_split(split or ""), absolute, trusted, any_table=format != "folder")
    for file in files:
        _read_file(file, name, collector)
    if source.is_dir() and format is None and not FORMATS[name].is_exclusive:
        record_others(source, files, collector)
        for path in index.paths if not (split or partition) else ():
            if path not in collector.annotations:
                collector.skip("pictures that no caption names", collector.relative(path))
    for folder in index.unlisted:
        collector.skip_folder(UNLISTED, folder)
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


def _read_file(file: Path, format: str, collector: Collector) -> None:
    annotations = FORMATS[format].read(file, collector)
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


def read_pairs(source: str | os.PathLike[str], format: str | None = None, split: str | None = None) -> list[Pair]:
    """Read the pictures of a data set with their captions: the `pairs` of `read_data`."""
    return read_data(source, format=format, split=split).pairs
