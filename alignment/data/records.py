"""Turn one record, a line of a table or a sample of a shard, into a raw annotation."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment.data.collector import RawAnnotation
from alignment.data.columns import CAPTION_COLUMNS, Columns, find_columns
from alignment.data.files import is_image_name

TEXT_PARTS = ("txt", "caption", "captions")  # of a WebDataset sample, which hold captions, one a line

_LANGUAGE = re.compile(r"[a-z]{2}([-_][A-Za-z]{2,4})?")
_LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None)"""
_LITERAL_LIST = re.compile(rf"[\[(]\s*{_LITERAL}(?:(?:\s*,\s*|\s+){_LITERAL})*\s*,?\s*[\])]", re.DOTALL)


def read_record(record: Mapping[str, Any], columns: Columns | None = None) -> RawAnnotation:
    """Read a line of a table, or a sample of a WebDataset, which has a `__key__`."""
    if "__key__" in record:
        record = _flatten_sample(record)
    columns = columns or find_columns(tuple(record))
    image, split, identity = (record.get(name) if name else "" for name in (columns.image, columns.split, columns.id))
    captions = [text for name in columns.captions if name in record for text in read_captions(record[name])]
    split = split if isinstance(split, str) else ""
    if isinstance(image, Path):  # a picture that the table itself contains
        return RawAnnotation(image, captions, split, image.stem)
    identity = str(identity) if isinstance(identity, str | int | float) else ""
    return RawAnnotation(_read_image_name(image), captions, split, identity)


def _read_image_name(value: object) -> str:
    """Read a picture's name: a text, a number, a list of one, or an object with a column of names; else ""."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and (column := find_columns(tuple(value)).image):
        value = value[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = value if isinstance(value, str) else ""
    return re.sub(r"#\d+$", "", name) if is_image_name(name.strip()) else name


def _flatten_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a WebDataset sample into one record: the columns of its `json`, and the lines of its text parts.

    With a text part, captions in the JSON are ignored, since img2dataset repeats the text there.
    """
    inner = sample.get("json")
    if isinstance(inner, list):
        inner = {"caption": inner}
    columns = dict(inner) if isinstance(inner, Mapping) else {}
    texts = [sample[name] for name in TEXT_PARTS if isinstance(sample.get(name), str)]
    if lines := [line for text in texts for line in text.splitlines() if line.strip()]:
        for name in find_columns(tuple(columns)).captions:
            del columns[name]
        columns["caption"] = lines
    return columns | {name: value for name, value in sample.items() if name not in ("json", *TEXT_PARTS)}


def read_captions(value: object) -> list[str]:
    """Flatten a value of a caption column: a text, a list (as JSON or Python too), or an object such as Karpathy's.

    Anything that is no text counts as an empty caption.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "(")):
        value = _parse_list(value)
    if isinstance(value, Mapping):
        by_language = [text for name, text in value.items() if _LANGUAGE.fullmatch(str(name))]
        value = next((value[name] for name in CAPTION_COLUMNS if name in value), by_language)
    if isinstance(value, list | tuple):
        return [text for item in value for text in read_captions(item)]
    return [value if isinstance(value, str) else ""]


def _parse_list(text: str) -> object:
    """Parse a list as JSON, Python or numpy write it; any other text is a caption that begins with a bracket."""
    if text.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if _LITERAL_LIST.fullmatch(text.strip()):
            # Item by item: numpy writes no commas, and Python joins adjacent literals.
            return [ast.literal_eval(literal) for literal in re.findall(_LITERAL, text, re.DOTALL)]
        if text.rstrip().endswith(("]", ")")) and _is_nested_texts(found := ast.literal_eval(text.strip())):
            return found
    return text


def _is_nested_texts(value: object) -> bool:
    return all(map(_is_nested_texts, value)) if isinstance(value, list | tuple) else isinstance(value, str | None)
