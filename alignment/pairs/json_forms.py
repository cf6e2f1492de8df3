"""JSON documents: the forms in which captions of many pictures are written into one of them, each read as records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.pairs.collection import Collection
from alignment.pairs.encoding import read_text

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
        if isinstance(record, dict) and record:
            found = True
            yield where, _answered(record, where, into)
        else:
            into.skip("unreadable lines", where)
    if not found:
        raise ValueError(f"{file} holds no list of pictures with captions.")


def _records_in(data: object, is_picture: Callable[[object], bool]) -> Iterator[object]:
    if isinstance(data, list):
        yield from data
    elif isinstance(data, dict) and data:
        yield from _of_object(data, is_picture)


def _of_object(data: dict[str, Any], is_picture: Callable[[object], bool]) -> Iterator[object]:
    names = list(data)
    tables = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    columns = [_column(value) for value in data.values()]
    if sum(map(is_picture, names[:50])) > min(len(names), 50) / 2:
        for name, value in data.items():
            yield {"image": name, **(value if isinstance(value, dict) else {"caption": value})}
    elif tables:
        yield from max(tables, key=len)
    elif len(columns) > 1 and all(columns) and len({len(column) for column in columns}) == 1:
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))
    elif len(data) == 1 and isinstance(data[names[0]], dict):
        yield from _of_object(data[names[0]], is_picture)
    else:
        yield data


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
