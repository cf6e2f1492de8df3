"""Tables: CSV, JSON lines, and the metadata of a folder of pictures; which columns mean what."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from alignment.pairs.collection import Collection, Row
from alignment.pairs.files import ARCHIVES, OTHER_PICTURES, PICTURES, SPLITS, begins, split_of, walk

IMAGE_COLUMNS = (
    *("image", "image_path", "file_name", "filename", "image_name", "filepath", "path", "img"),
    *("jpg", "jpeg", "png", "webp"),  # as the Hub names the parts of a WebDataset
)
CAPTION_COLUMNS = ("caption", "sentence", "raw", "text", "title", "description", "comment", "txt")
ID_COLUMNS = ("id", "image_id", "img_id", "imgid", "cocoid", "__key__")
TEXT_PARTS = ("txt", "caption", "captions")  # of a WebDataset sample


def read_table(file: Path, into: Collection) -> Iterator[Row]:
    """Read a table whose name may say the split."""
    for row in table_rows(file, into):
        yield row._replace(split=row.split or split_of(file))


def read_folder(folder: Path, into: Collection) -> Iterator[Row]:
    """Read the metadata files anywhere below, then list the pictures; a folder named like a split is one."""
    pictures = []
    for file in walk(folder, into.leave_out):
        split = next((part for part in file.relative_to(folder).parts[:-1] if part.lower() in SPLITS), "")
        if file.name in ("metadata.csv", "metadata.jsonl"):
            for row in table_rows(file, into):
                yield row._replace(split=row.split or split)
        elif file.suffix.lower() in PICTURES:
            pictures.append(Row(file, split=split))
        elif file.suffix.lower() in OTHER_PICTURES:
            into.skip("pictures of a kind not read here", file.name)
        elif file.suffix.lower() == ".tar":
            into.skip("tar files without samples such as 0001.jpg with 0001.txt", file.name)
        elif file.suffix.lower() in ARCHIVES:
            into.skip("archives, which have to be unpacked first", file.name)
    yield from pictures


class Columns(NamedTuple):
    """Which columns of a table mean what."""

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    id: str | None


@lru_cache(maxsize=64)
def columns_of(names: tuple[str, ...]) -> Columns:
    """Find the columns by their usual names; of several kinds of caption the first in `CAPTION_COLUMNS` counts.

    All columns of that kind do: `caption` and `captions`, `caption_1` to `caption_5`, `caption_en` and `caption_zh`.
    """
    known = {name.strip().lower(): name for name in reversed(names)}

    def first(usual: Iterable[str]) -> str | None:
        return next((known[name] for name in usual if name in known), None)

    kinds = (re.compile(rf"\s*{kind}s?([_ -]?(\d+|[a-z]{{2}}))?\s*", re.IGNORECASE) for kind in CAPTION_COLUMNS)
    captions = (tuple(filter(kind.fullmatch, names)) for kind in kinds)
    return Columns(first(IMAGE_COLUMNS), next(filter(None, captions), ()), first(["split"]), first(ID_COLUMNS))


def table_rows(file: Path, into: Collection) -> Iterator[Row]:
    """Read the lines of a table that name an image."""
    for record in records(file, into.skip):
        if columns_of(tuple(record)).image is None:
            into.skip(f"lines whose columns {list(record)} name no image", file.name)
        else:
            yield row_of(record)._replace(folder=file.parent)


def row_of(record: Mapping[str, Any]) -> Row:
    """Read one line of a table, or one sample of a WebDataset."""
    if "__key__" in record:
        record = _unfolded(record)
    columns = columns_of(tuple(record))
    image, split, identity = (record[name] if name else "" for name in (columns.image, columns.split, columns.id))
    captions = [text for name in columns.captions for text in _texts(record[name])]
    identity = "" if identity is None else str(identity)
    return Row(image if isinstance(image, str) else "", captions, str(split or ""), identity)


def _unfolded(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a WebDataset sample out as one line: `json` by its columns, a text part by its lines.

    Where there is a text part, it is the caption, and what the JSON calls one (img2dataset repeats it there) is not.
    """
    inner = sample.get("json")
    if isinstance(inner, list):
        inner = {"caption": inner}
    columns = dict(inner) if isinstance(inner, Mapping) else {}
    texts = [sample[name] for name in TEXT_PARTS if isinstance(sample.get(name), str)]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if lines:
        repeated = columns_of(tuple(columns)).captions
        columns = {name: value for name, value in columns.items() if name not in repeated} | {"caption": lines}
    return {**columns, **{name: value for name, value in sample.items() if name not in ("json", *TEXT_PARTS)}}


def _texts(value: object) -> list[str]:
    """Flatten what a caption column holds: a text, a list of them (as JSON too), or Karpathy's sentences."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # else it is a caption that begins with a bracket
            value = json.loads(value)
    if isinstance(value, Mapping):
        value = next((value[name] for name in CAPTION_COLUMNS if name in value), None)
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value if isinstance(value, str) else ""]


def records(file: Path, skip: Callable[[str, object], None] = lambda reason, what: None) -> Iterator[dict[str, Any]]:
    """Read a table, line by line, as column name -> value."""
    if file.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return _json_records(file, skip)
    return _csv_records(file)


def _json_records(file: Path, skip: Callable[[str, object], None]) -> Iterator[dict[str, Any]]:
    """Read one object a line, or a single list of objects."""
    if begins(file).startswith("["):
        yield from json.loads(file.read_text(encoding="utf-8-sig"))
        return
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            record: object = {}
            with suppress(json.JSONDecodeError):
                record = json.loads(line) if line.strip() else None
            if isinstance(record, dict) and record:
                yield record
            elif record is not None:
                skip("unreadable lines", f"{file.name}:{number}")


def _csv_records(file: Path) -> Iterator[dict[str, Any]]:
    """Read a table with a header, parted by comma, tab, semicolon or bar, whichever gives most columns."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
        delimiter = max(",\t;|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
        lines.seek(0)
        rows = csv.reader(lines, delimiter=delimiter)
        names: list[str] = []
        for name in next(rows, []):  # two columns may go by one name
            names.append(f"{name}_{len(names)}" if name in names else name)
        for row in filter(any, rows):
            while len(row) > len(names) and not row[-1]:
                row.pop()
            if len(row) > len(names):  # commas in a caption without quotes, which comes last
                row[len(names) - 1 :] = [delimiter.join(row[len(names) - 1 :])]
            yield dict(zip(names, row + [""] * (len(names) - len(row)), strict=True))
