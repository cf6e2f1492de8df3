"""Read JSON documents in which captions of many pictures are written, in any of their common forms, as records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from alignment.data.collector import Collector
from alignment.data.columns import find_columns
from alignment.data.encoding import read_text
from alignment.data.files import SPLITS

_ANSWER_ROLES = ("gpt", "assistant")
_NUM_KEYS = 50  # of an object that are looked at

NamesImage = Callable[[object], bool]


def read_document(file: Path, collector: Collector) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a JSON document record by record, each with its place in the file.

    The forms are a list of objects; an object that maps names of pictures to captions; one with a list for each column,
    as pandas writes it; or one of these below a key such as `data`. Of LLaVA's conversations the first answer is read.

    Raises:
        ValueError: when it is empty, no JSON, or of none of these forms.
    """
    text, is_empty = read_text(file), True
    if not text.strip():
        raise ValueError(f"{file.name} is empty")
    for number, value in enumerate(_values(json.loads(text), collector.index.names_image)):
        where = f"{file.name}[{number}]"
        if record := as_record(value, collector.index.names_image):
            is_empty = False
            yield where, _read_conversation(record, where, collector)
        else:
            collector.skip("unreadable lines", where)
    if is_empty:
        raise ValueError(f"{file.name} holds no list of pictures with captions")


def as_record(value: object, names_image: NamesImage) -> dict[str, Any]:
    """Turn one item of a list into a record: an object, `{"0.jpg": "a dog"}`, or a list; {} for anything else."""
    if isinstance(value, list) and len(value) > 1:
        return {f"column {number}": item for number, item in enumerate(value, start=1)}
    if not isinstance(value, dict):
        return {}
    name = next(iter(value), None)
    return {"image": name, "caption": value[name]} if len(value) == 1 and names_image(name) else value


def _values(data: object, names_image: NamesImage) -> Iterator[object]:
    """Find the items of a document that describe one picture each."""
    if not isinstance(data, dict) or not data:
        yield from data if isinstance(data, list) else ()
        return
    names, first = list(data)[:_NUM_KEYS], next(iter(data.values()))
    tables: list[list[Any]] = [
        value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    columns = [_column(value) for value in data.values()]
    if all(name.lower() in SPLITS for name in data):
        for split, part in data.items():
            for value in _values(part, names_image):
                record = as_record(value, names_image)
                yield {"split": split, **record} if record else value
    elif sum(map(names_image, names)) > len(names) / 2:
        for name, value in data.items():
            yield {"image": name, **(value if isinstance(value, dict) else {"caption": value})}
    elif tables:
        captioned = [table for table in tables if all(find_columns(tuple(table[0]))[:2])]
        yield from chain.from_iterable(captioned or [max(tables, key=len)])
    elif len(columns) > 1 and all(columns) and len({len(column) for column in columns}) == 1:
        yield from (dict(zip(data, values, strict=True)) for values in zip(*columns, strict=True))
    elif len(data) == 1 and isinstance(first, dict):
        yield from _values(first, names_image)
    else:
        yield data


def _column(value: object) -> list[object]:
    """Read a column: a list of values, or pandas' map from row to value."""
    if isinstance(value, dict):
        return list(value.values()) if all(key.isdigit() for key in value) else []
    return value if isinstance(value, list) else []


def _read_conversation(record: dict[str, Any], where: str, collector: Collector) -> dict[str, Any]:
    """Turn a conversation about one picture into a record whose caption is the first answer."""
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        return record
    answers = [turn for turn in turns if isinstance(turn, dict) and turn.get("from", turn.get("role")) in _ANSWER_ROLES]
    if len(answers) > 1:
        collector.skip("further answers of a conversation", where)
    images = record.get("image", record.get("images"))
    image = images[0] if isinstance(images, list) and len(images) == 1 else images
    caption = answers[0].get("value", answers[0].get("content")) if answers else ""
    others = {name: value for name, value in record.items() if name not in ("conversations", "messages", "images")}
    return {**others, "image": image, "caption": caption}
