"""Read a whole data set: find its format, ask that format's reader, and hand over what counts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from alignment.data.collector import Collection, Pair
from alignment.data.columns import NotRead
from alignment.data.files import UNLISTED, canonical_split, root_of
from alignment.data.formats import FORMATS, detect, note_others
from alignment.data.image_index import PictureIndex
from alignment.data.partition import Partition


@dataclass(frozen=True)
class ReadResult:
    """What a data set holds, and what of it was left out.

    Attributes:
        pairs: one entry per image, in the order of the data set.
        format: the name it was read by.
        left_out: reason -> what was left out for it.
        repaired: what was read although something is wrong with it -> where.
        unread: files of captions of which nothing could be read -> why.
        unlisted: absolute paths of folders that could not be listed, so that their pictures are not known.
    """

    pairs: list[Pair]
    format: str
    left_out: Mapping[str, tuple[str, ...]]
    unlisted: tuple[str, ...] = ()
    repaired: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether all folders could be listed and all files of captions could be read."""
        return not (self.unlisted or self.unread)


def read_data(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    split: str | None = None,
    trusted: bool = True,
    partition: Partition | None = None,
) -> ReadResult:
    """Read the pictures of a data set, each once, with all captions that belong to it.

    Missing pictures, empty captions and unreadable lines are left out, counted, and logged as one summary. A picture
    named without its folder is looked for up to two folders deep. Names never lead out of the data set's folder by
    ".."; absolute paths count only in a CSV or JSON-lines file of one's own.

    Args:
        source: folder, annotation file, tar shard or pattern of shards, or Hub id.
        format: a name from the package's table, where the found one is wrong.
        split: keep only this one; "val" and "dev" mean the same.
        trusted: whether absolute paths may count; in annotations that a stranger wrote they must not.
        partition: read only this part, which may be empty. Of several shards, each belongs to one partition, so that
            no process opens the shards of another.

    Raises:
        FileNotFoundError: when there is no such folder, file or Hub data set.
        ValueError: when the format is unknown, the annotations cannot be read, or no picture is left.
    """
    source = Path(source)
    root = root_of(source)
    index = PictureIndex(root)
    name, files = detect(source, format, index)
    by_file = partition is not None and FORMATS[name].in_parts and len(files) > 1
    if partition is not None and by_file:
        files = partition.select(files, block=1)
    absolute = trusted and name in ("csv", "jsonl", "parquet")
    collection = Collection(
        root,
        canonical_split(split or ""),
        absolute=absolute,
        trusted=trusted,
        any_table=format != "folder",
        index=index,
    )
    for file in files:
        _read_file(file, name, collection)
    if source.is_dir() and format is None and not FORMATS[name].alone:
        note_others(source, files, collection)
        if not (split or partition):
            for path in index.paths:
                if path not in collection.rows:
                    collection.skip("pictures that no caption names", collection.shown(Path(path)))
    for folder in index.unlisted:
        collection.leave_out(UNLISTED, Path(folder))
    pairs = collection.pairs(f"{source} ({name})", may_be_empty=partition is not None)
    if partition is not None and not by_file:
        pairs = partition.select(pairs)
    left_out, repaired = (
        {reason: tuple(what) for reason, what in found.items()} for found in (collection.skipped, collection.repaired)
    )
    return ReadResult(pairs, name, left_out, tuple(collection.unlisted), repaired, collection.unread)


def _read_file(file: Path, name: str, into: Collection) -> None:
    rows = FORMATS[name].read(file, into)
    try:
        for row in into.counted(file, rows) if file.is_file() else rows:
            into.add(row)
    except NotRead as error:
        raise ValueError(f"{file} cannot be read as {name}: {error}.") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read as {name} ({type(error).__name__}: {error}); "
            "check that it is complete and saved as UTF-8, or name another format."
        ) from error


def read_pairs(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    split: str | None = None,
    partition: Partition | None = None,
) -> list[Pair]:
    """Read the pictures of a data set with their captions; `read_data` without what was left out."""
    return read_data(source, format=format, split=split, partition=partition).pairs


def positive_mask(pairs: Sequence[Pair]) -> tuple[Tensor, list[str]]:
    """Lay the captions out flat and say which belong to which image.

    Args:
        pairs: images in the order of the rows; one without captions is a row without a positive.

    Returns:
        Bool (num_images, num_texts), and the num_texts captions, image by image.
    """
    texts = [caption for pair in pairs for caption in pair.captions]
    owners = torch.repeat_interleave(torch.tensor([len(pair.captions) for pair in pairs], dtype=torch.long))
    return owners == torch.arange(len(pairs))[:, None], texts
