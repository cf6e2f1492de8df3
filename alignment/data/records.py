"""Records: what the values of one line of a table, or of one sample of a shard, say of a picture."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.data.collector import Row
from alignment.data.columns import CAPTION_COLUMNS, Columns, columns_of
from alignment.data.image_index import is_picture_name

TEXT_PARTS = ("txt", "caption", "captions")  # of a WebDataset sample

_LANGUAGE = re.compile(r"[a-z]{2}([-_][A-Za-z]{2,4})?")
_LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None)"""
_WRITTEN_LIST = re.compile(rf"[\[(]\s*{_LITERAL}(?:(?:\s*,\s*|\s+){_LITERAL})*\s*,?\s*[\])]", re.DOTALL)


def row_of(record: Mapping[str, Any], columns: Columns | None = None) -> Row:
    """Read one line of a table, or one sample of a WebDataset."""
    if "__key__" in record:
        record = _unfolded(record)
    columns = columns or columns_of(tuple(record))
    image, split, identity = (record.get(name) if name else "" for name in (columns.image, columns.split, columns.id))
    if isinstance(image, Path):  # it lay in the table
        captions = [text for name in columns.captions for text in texts_of(record.get(name))]
        return Row(image, captions, _text(split), image.stem)
    image = _name_in(image)
    captions = [text for name in columns.captions if name in record for text in texts_of(record[name])]
    return Row(
        re.sub(r"#\d+$", "", image) if isinstance(image, str) and is_picture_name(image.strip()) else _text(image),
        captions,
        _text(split),
        _text(identity) or (str(identity) if isinstance(identity, int | float) else ""),
    )


def _name_in(value: object) -> object:
    """Read a picture's name out of a number, a list of one, or an object that says more about it."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and (column := columns_of(tuple(value)).image):
        value = value[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


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


def texts_of(value: object) -> list[str]:
    """Flatten what a caption column holds: a text, a list of them (as JSON or Python too), or Karpathy's sentences.

    What is no text counts as an empty caption.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "(")):
        value = _written_list(value)
    if isinstance(value, Mapping):
        spoken = [text for name, text in value.items() if _LANGUAGE.fullmatch(str(name))]
        value = next((value[name] for name in CAPTION_COLUMNS if name in value), spoken)
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_of(item)]
    return [value if isinstance(value, str) else ""]


def _written_list(text: str) -> object:
    """Read a list as JSON, Python or numpy write it; anything else is a caption that begins with a bracket."""
    if text.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    if not _WRITTEN_LIST.fullmatch(text.strip()):
        return _nested_list(text)
    with suppress(ValueError, SyntaxError):
        # One by one: numpy writes no commas, and Python joins neighbours into one text.
        return [ast.literal_eval(literal) for literal in re.findall(_LITERAL, text, re.DOTALL)]
    return text


def _nested_list(text: str) -> object:
    """Read a list of lists of texts as Python writes it; anything else stays as it is."""

    def is_texts(value: object) -> bool:
        return all(map(is_texts, value)) if isinstance(value, list | tuple) else isinstance(value, str | None)

    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if text.rstrip().endswith(("]", ")")):
            found = ast.literal_eval(text.strip())
            return found if isinstance(found, list | tuple) and is_texts(found) else text
    return text
