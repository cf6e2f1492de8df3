"""Lines of a delimited file (CSV, TSV), each split into fields whatever is wrong with its neighbours.

Python's `csv` reads a quotation mark that is never closed as a field that reaches to the next mark, over any number of
lines. Here a field may hold line breaks only where its mark is closed and no line in it looks like a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

DELIMITERS = ",\t;|"
MAX_LINES_OF_A_FIELD = 200

BLANK = " "
"""Delimiter of lists such as `0.jpg a dog, running`: the first blank after the name of a picture, or a colon."""

_LISTED = re.compile(r"([^\s,;|\"]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:#\d+)?):?[ ]+(?=\S)", re.IGNORECASE)
_SEP = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # what Excel writes, and reads


class Line(NamedTuple):
    """A row of a delimited file.

    Attributes:
        number: of its first line, from 1.
        fields: its values.
        is_open: whether a quotation mark in it is never closed, so that it is read as it stands.
    """

    number: int
    fields: list[str]
    is_open: bool = False


class Head(NamedTuple):
    """What stands before the rows.

    Attributes:
        delimiter: what parts the fields.
        skipped: lines to pass over: empty ones, comments, `sep=;`.
    """

    delimiter: str
    skipped: int


def head_of(lines: Iterable[str]) -> Head:
    """Find the delimiter, and how many lines stand before the first row."""
    skipped, told = 0, ""
    for line in islice(lines, 1000):
        text = line.strip("\ufeff \n")
        if not text.strip('",;|\t') or (text.startswith("#") and not _is_header(text)):
            skipped += 1
        elif found := _SEP.fullmatch(text.rstrip(",;|\t")) or _SEP.fullmatch(text):
            skipped, told = skipped + 1, found[1]
        else:
            if not told and _LISTED.match(text):
                return Head(BLANK, skipped)
            return Head(told or max(DELIMITERS, key=lambda mark: len(split_line(text, mark)[0])), skipped)
    return Head(told or ",", skipped)


def _is_header(comment: str) -> bool:
    """Tell `# image,caption` from a remark."""
    names = re.split(f"[{DELIMITERS}]", comment.lstrip("# "))
    return len(names) > 1 and all(re.fullmatch(r"\s*\w+\s*", name) for name in names)


@lru_cache
def _quoted(delimiter: str) -> re.Pattern[str]:
    """Match a field in quotation marks that are closed, and what ends it."""
    mark = re.escape(delimiter)
    return re.compile(rf'[^\S\n{mark}]*"((?:[^"]|"")*)"[^\S\n{mark}]*(?={mark}|\n?$)')


def split_line(text: str, delimiter: str) -> tuple[list[str], bool]:
    """Split one row; the second value says whether a quotation mark at the beginning of a field is not closed.

    A field that begins with a mark but does not end with one is taken as it stands.
    """
    text = text.removesuffix("\n")
    if delimiter == BLANK:
        listed = _LISTED.match(text)
        return ([listed[1], text[listed.end() :]] if listed else [text]), False
    if '"' not in text:
        return text.split(delimiter), False
    fields, at, is_open = [], 0, False
    while True:
        if found := _quoted(delimiter).match(text, at):
            fields.append(found[1].replace('""', '"'))
            at = found.end()
        else:
            end = text.find(delimiter, at)
            end = len(text) if end < 0 else end
            field = text[at:end]
            is_open |= field.lstrip().startswith('"') and field.count('"') % 2 == 1
            fields.append(field)
            at = end
        if at >= len(text):
            return fields, is_open
        at += len(delimiter)


def rows_of(
    lines: Iterable[str], delimiter: str, is_row: Callable[[Sequence[str]], bool], first: int
) -> Iterator[Line]:
    """Split lines into rows; empty lines are none.

    Args:
        lines: each with its newline.
        delimiter: what parts the fields.
        is_row: whether these fields look like a row of their own, and not like a line within a field.
        first: number of the first line.
    """
    waiting: list[str] = []
    source = iter(lines)
    number = first
    while waiting or (waiting := list(islice(source, 1))):
        fields, is_open = split_line(waiting[0], delimiter)
        used = 1
        if is_open:
            joined = waiting[0]
            while used < MAX_LINES_OF_A_FIELD:
                if used == len(waiting):
                    waiting += islice(source, 1)
                if used == len(waiting) or is_row(split_line(waiting[used], delimiter)[0]):
                    used = 1
                    break
                joined += waiting[used]
                used += 1
                whole, still_open = split_line(joined, delimiter)
                if not still_open and '"' in waiting[used - 1]:
                    fields, is_open = whole, False
                    break
            else:
                used = 1
        if any(field.strip() for field in fields):
            yield Line(number, fields, is_open)
        number += used
        del waiting[:used]
