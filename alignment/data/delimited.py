"""Split a delimited file (CSV, TSV) into rows and fields, without one malformed row affecting its neighbours.

Python's `csv` reads a quotation mark that is never closed as a field that reaches to the next mark, over any number of
lines. Here a field contains line breaks only if its mark is closed and no line in it looks like a row.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

DELIMITERS = ",\t;|"
MAX_LINES_OF_A_FIELD = 200
_MAX_LINES_OF_A_HEAD = 1000
BLANK = " "
"""Delimiter of lists such as `0.jpg a dog, running`: the first blank, or colon, after the name of a picture."""

IsRow = Callable[[Sequence[str]], bool]
_LISTED = re.compile(r"([^\s,;|\"]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:#\d+)?):?[ ]+(?=\S)", re.IGNORECASE)
_SEP = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # a line in which Excel names the delimiter


class Row(NamedTuple):
    """A row of a delimited file."""

    number: int  # of its first line, from 1
    fields: list[str]
    is_open: bool  # a quotation mark in it is never closed, so that the mark is part of the value


def read_file_head(lines: Iterable[str]) -> tuple[str, int]:
    """Find the delimiter, and the number of lines before the first row: empty ones, comments, `sep=;`."""
    skipped, named = 0, ""
    for line in islice(lines, _MAX_LINES_OF_A_HEAD):
        text = line.strip("\ufeff \n")
        if found := _SEP.fullmatch(text.rstrip(",;|\t")) or _SEP.fullmatch(text):
            named = found[1]
        elif text.strip('",;|\t') and (not text.startswith("#") or _is_header(text)):
            if not named and _LISTED.match(text):
                return BLANK, skipped
            return named or max(DELIMITERS, key=lambda mark: len(split_line(text, mark)[0])), skipped
        skipped += 1
    return named or ",", skipped


def _is_header(comment: str) -> bool:  # `# image,caption` and not a remark
    names = re.split(f"[{DELIMITERS}]", comment.lstrip("# "))
    return len(names) > 1 and all(re.fullmatch(r"\s*\w+\s*", name) for name in names)


@lru_cache
def _quoted(delimiter: str) -> re.Pattern[str]:  # a field in closed quotation marks, up to the delimiter after it
    mark = re.escape(delimiter)
    return re.compile(rf'[^\S\n{mark}]*"((?:[^"]|"")*)"[^\S\n{mark}]*(?={mark}|\n?$)')


def split_line(text: str, delimiter: str) -> tuple[list[str], bool]:
    """Split one row into its fields, and tell whether a quotation mark at the beginning of one is not closed.

    A field that begins with a mark but does not end with one is taken literally.
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
            field = text[at : end if end >= 0 else len(text)]
            is_open |= field.lstrip().startswith('"') and field.count('"') % 2 == 1
            fields.append(field)
            at += len(field)
        if at >= len(text):
            return fields, is_open
        at += len(delimiter)


def split_rows(lines: Iterable[str], delimiter: str, is_row: IsRow, first: int) -> Iterator[Row]:
    """Split lines, the first of which has number `first`, into rows; `is_row` tells rows from lines within a field."""
    source, waiting = iter(lines), list[str]()
    while waiting or (waiting := list(islice(source, 1))):
        fields, is_open, used = _first_row(waiting, source, delimiter, is_row)
        if any(field.strip() for field in fields):
            yield Row(first, fields, is_open)
        first += used
        del waiting[:used]


def _first_row(waiting: list[str], source: Iterator[str], delimiter: str, is_row: IsRow) -> tuple[list[str], bool, int]:
    """Split the row that the first waiting line begins, and count its lines; further ones go to `waiting`."""
    text = waiting[0]
    fields, is_open = split_line(text, delimiter)
    for used in range(1, MAX_LINES_OF_A_FIELD if is_open else 1):
        if used == len(waiting):
            waiting += islice(source, 1)
        if used == len(waiting) or is_row(split_line(waiting[used], delimiter)[0]):
            break
        text += waiting[used]
        if '"' in waiting[used]:
            joined, is_still_open = split_line(text, delimiter)
            if not is_still_open:
                return joined, False, used + 1
    return fields, is_open, 1
