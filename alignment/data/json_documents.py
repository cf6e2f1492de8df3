"""JSON documents: the forms in which captions of many pictures are written into one of them, each read as records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from alignment.data.collector import Collection
from alignment.data.columns import columns_of
from alignment.data.encoding import read_text
from alignment.data.files import SPLITS

_ANSWERS = ("gpt", "assistant")


def document_records(file: Path, into: Collection) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a JSON document record by record, each with its place in it.

    A list of objects; an object that maps names of pictures to captions; one with a list for each column, as pandas
    writes it; or one of these below a key such as `data`. Conversations of LLaVA count with their first answer.

    Raises:
        ValueError: when it is no JSON, or of none of these forms.
    """
    data = json.loads(read_text(file))
    found = False
    for number, record in enumerate(_records_in(data, into.index.knows)):
        where = f"{file.name}[{number}]"
        if entry := named_entry(record, into.index.knows):
            found = True
            yield where, _answered(entry, where, into)
        else:
            into.skip("unreadable lines", where)
    if not found:
        raise ValueError(f"{file.name} holds no list of pictures with captions")


def named_entry(record: object, is_picture: Callable[[object], bool]) -> dict[str, Any]:
    """Lay one entry of a list out by names: an object, `{"0.jpg": "a dog"}`, or bare values; {} for anything else."""
    if isinstance(record, dict) and len(record) == 1 and is_picture(name := next(iter(record))):
        return {"image": name, "caption": record[name]}
    if isinstance(record, list) and len(record) > 1:
        return {f"column {number}": value for number, value in enumerate(record, start=1)}
    return record if isinstance(record, dict) else {}


def _records_in(data: object, is_picture: Callable[[object], bool]) -> Iterator[object]:
    if isinstance(data, list):
        yield from data
    elif isinstance(data, dict) and data:
        yield from _of_object(data, is_picture)


def _of_object(data: dict[str, Any], is_picture: Callable[[object], bool]) -> Iterator[object]:
    names = list(data)
    lists = [value for value in data.values() if isinstance(value, list)]
    tables: list[list[Any]] = [value for value in lists if value and isinstance(value[0], dict)]
    columns = [_column(value) for value in data.values()]
    if all(name.lower() in SPLITS for name in names):
        yield from _of_splits(data, is_picture)
    elif sum(map(is_picture, names[:50])) > min(len(names), 50) / 2:
        for name, value in data.items():
            yield {"image": name, **(value if isinstance(value, dict) else {"caption": value})}
    elif tables:
        captioned = [table for table in tables if all(columns_of(tuple(table[0]))[:2])]
        yield from chain.from_iterable(captioned or [max(tables, key=len)])
    elif len(columns) > 1 and all(columns) and len({len(column) for column in columns}) == 1:
        yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    elif len(data) == 1 and isinstance(data[names[0]], dict):
        yield from _of_object(data[names[0]], is_picture)
    else:
        yield data


def _of_splits(data: dict[str, Any], is_picture: Callable[[object], bool]) -> Iterator[object]:
    for split, part in data.items():
        for record in _records_in(part, is_picture):
            entry = named_entry(record, is_picture)
            yield {"split": split, **entry} if entry else record


def _column(value: object) -> list[object]:
    """Lay a column out: a list of values, or pandas' map from row to value."""
    if isinstance(value, dict):
        return list(value.values()) if all(key.isdigit() for key in value) else []
    return value if isinstance(value, list) else []


def _answered(record: dict[str, Any], where: str, into: Collection) -> dict[str, Any]:
    """Lay a conversation about one picture out: its first answer is the caption."""
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        return record
    said = [turn for turn in turns if isinstance(turn, dict) and turn.get("from", turn.get("role")) in _ANSWERS]
    if len(said) > 1:
        into.skip("further answers of a conversation", where)
    images = record.get("image", record.get("images"))
    image = images[0] if isinstance(images, list) and len(images) == 1 else images
    answer = said[0].get("value", said[0].get("content")) if said else ""
    kept = {name: value for name, value in record.items() if name not in ("conversations", "messages", "images")}
    return {**kept, "image": image, "caption": answer}
