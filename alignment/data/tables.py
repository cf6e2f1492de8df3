"""Tables: CSV and its kin, JSON lines, parquet, and the metadata of a folder of pictures."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.data.collector import Collection, Row
from alignment.data.columns import Columns, NotRead, Sample, columns_of, fitted
from alignment.data.delimited import Head, Line, head_of, rows_of
from alignment.data.encoding import open_text
from alignment.data.files import begins, split_of
from alignment.data.image_index import PictureIndex, is_picture_name
from alignment.data.image_store import cache_folder, stored
from alignment.data.json_documents import document_records, named_entry
from alignment.data.records import row_of
from alignment.preprocess import join_first, sanitize_text

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet")

_SAMPLED = 50
_OFTEN = 0.1  # of the rows


def read_table(file: Path, into: Collection) -> Iterator[Row]:
    """Read a table whose name, or whose folder's, may say the split."""
    for row in table_rows(file, into):
        yield row._replace(split=row.split or split_of(file, into.root))


def table_rows(file: Path, into: Collection) -> Iterator[Row]:
    """Read the rows of a table that name an image.

    Raises:
        NotRead: when it cannot be told which columns are which.
    """
    for _, record, columns in _records(file, into):
        yield row_of(record, columns)._replace(folder=file.parent)


def check_table(file: Path, index: PictureIndex, *, trusted: bool = True) -> None:
    """Look at the beginning of a table.

    Raises:
        NotRead: when it does not hold captions of pictures, or cannot be read.
    """
    into = Collection(Path(index.root), "", trusted=trusted, index=index)
    try:
        first = list(islice(_records(file, into), _SAMPLED))
    except NotRead as error:
        if _is_meant_as_captions(file) and _is_blank(file):
            raise NotRead("it is empty") from error
        raise NotRead(str(error), names_pictures=error.names_pictures or "caption" in file.name.lower()) from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        if _is_meant_as_captions(file) and _is_blank(file):
            raise NotRead("it is empty") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise NotRead(reason, names_pictures=_is_meant_as_captions(file)) from error
    if not first:
        reason = "no line of it can be read" if into.skipped else "it is empty"
        raise NotRead(reason, names_pictures=_is_meant_as_captions(file) or _mentions_pictures(file))
    if classes := next((columns.classes for _, _, columns in first if columns.classes), None):
        raise ClassLabelsOnly(classes)
    if not any(columns.captions or row_of(record, columns).captions for _, record, columns in first):
        raise NotRead("it holds no captions", names_pictures=False)


class ClassLabelsOnly(NotRead):
    """A table names the classes of pictures, as for image classification, and no captions.

    Attributes:
        column: of the classes.
    """

    REASON = "files of classes, not captions (to take them as captions, call their column caption)"

    def __init__(self, column: str) -> None:
        super().__init__("it holds classes, not captions", names_pictures=False)
        self.column = column

    @classmethod
    def note(cls, file: Path, column: str, into: Collection) -> None:
        """Note that a file holds classes."""
        into.skip(cls.REASON, f"{into.shown(file)}, column {sanitize_text(column, 40)}")


def _is_meant_as_captions(file: Path) -> bool:
    return bool(re.search("caption|metadata|annotation|descri", file.name.lower()))


def _is_blank(file: Path) -> bool:
    with suppress(OSError, ValueError), open_text(file) as lines:
        return not any(line.strip() for line in lines)
    return False


def _mentions_pictures(file: Path) -> bool:
    return bool(re.search(r"\.(jpe?g|png|webp)\b", begins(file), re.IGNORECASE))


# ---------------------------------------------------------------- one file


def _records(file: Path, into: Collection) -> Iterator[tuple[str, Mapping[str, Any], Columns]]:
    """Read a table, line by line: where it stands, column name -> value, which columns mean what."""
    ending = file.suffix.lower()
    if ending == ".parquet":
        return _sampled(file, _parquet_records(file, into), into)
    if ending in (".jsonl", ".ndjson", ".json"):
        return _sampled(file, _json_records(file, into), into)
    return _csv_records(file, into)


def _sampled(
    file: Path, records: Iterator[tuple[str, Mapping[str, Any]]], into: Collection
) -> Iterator[tuple[str, Mapping[str, Any], Columns]]:
    """Tell the columns of each record by their names, else by what stands in the first ones."""
    first = list(islice(records, _SAMPLED))
    names = tuple(dict.fromkeys(name for _, record in first for name in record))
    usual: Columns | None = columns_of(names)
    if first and not (usual and usual.image and usual.captions):
        rows = [[_shown(record.get(name)) for name in names] for _, record in first]
        usual = Sample(names, rows, into.index.knows).columns()
        if usual.classes:
            ClassLabelsOnly.note(file, usual.classes, into)
    for where, record in _chained(first, records):
        columns = columns_of(tuple(record))
        if columns.image is None and usual and usual.image in record:
            columns = usual
        if columns.image is None:
            into.skip("lines whose columns name no image", f"{where}: {join_first(list(record))}")
        else:
            yield (
                where,
                record,
                columns
                if columns.captions or usual is None
                else columns._replace(captions=usual.captions, classes=usual.classes),
            )


def _chained(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from first
    yield from rest


def _shown(value: object) -> str:
    if isinstance(value, list) and value:
        value = value[0]
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _json_records(file: Path, into: Collection) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read one object a line, or a document of one of the forms in `json_forms`."""
    if (file.suffix.lower() == ".json" or begins(file).startswith("[")) and not _is_lines(begins(file)):
        yield from document_records(file, into)
        return
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            record: object = {}
            with suppress(ValueError, RecursionError):
                record = json.loads(line.lstrip("\ufeff")) if line.strip() else None
            if entry := named_entry(record, into.index.knows):
                yield f"{file.name}:{number}", entry
            elif record is not None:
                into.skip("unreadable lines", f"{file.name}:{number}")


def _is_lines(start: str) -> bool:
    """Tell JSON lines from one document by their first line."""
    first, _, rest = start.partition("\n")
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(first), dict | list) and bool(rest.strip())
    return False


def _csv_records(file: Path, into: Collection) -> Iterator[tuple[str, Mapping[str, Any], Columns]]:
    """Read a delimited file, with a header or without."""
    with open_text(file) as lines:
        head = head_of(lines)
    with open_text(file) as lines:
        sample = _csv_sample([line.fields for line in islice(_rows(lines, head), _SAMPLED + 1)], into.index.knows)
    columns, texts = sample.columns(), sample.texts
    if columns.classes:
        ClassLabelsOnly.note(file, columns.classes, into)
    with open_text(file) as lines:
        rows = _rows(lines, head, sample.names.index(str(columns.image)))
        for line in rows:
            where = f"{file.name}:{line.number}"
            if line.number == head.skipped + 1 and sample.has_header:
                continue
            if (fields := fitted(line.fields, sample.names, columns, head.delimiter, texts)) is None:
                into.skip("lines with more values than columns", where)
                continue
            if line.is_open:
                into.repair("lines with a quotation mark that is not closed", where)
            if len(line.fields) > len(fields) and any(field.strip() for field in line.fields[len(fields) :]):
                into.repair("lines with a delimiter in a value without quotation marks", where)
            yield where, dict(zip(sample.names, fields, strict=True)), columns


def _rows(lines: Iterable[str], head: Head, image: int | None = None) -> Iterator[Line]:
    """Split what comes after the head of a file; a line that names a picture is a row, whatever mark is open."""

    def is_row(fields: Sequence[str]) -> bool:
        return any(map(is_picture_name, fields if image is None else fields[image : image + 1]))

    return rows_of(islice(lines, head.skipped, None), head.delimiter, is_row, head.skipped + 1)


def _csv_sample(rows: list[list[str]], is_picture: Callable[[object], bool]) -> Sample:
    """Name the columns by the first row, unless it is one of values."""
    if not rows:
        raise NotRead("it is empty", names_pictures=False)
    first = [name.strip().lstrip("# ") for name in rows[0]]
    named = columns_of(tuple(first))
    counted = [name for name in first if name] == [str(number) for number in range(sum(map(bool, first)))]  # by pandas
    has_header = counted or bool(named.image and named.captions) or not any(map(is_picture, first))
    if not has_header:
        first = first[: _usual_width(rows)]
    names: list[str] = []
    for number, name in enumerate(first, start=1):  # two columns may go by one name
        name = name if has_header and name else f"column {number}"
        names.append(f"{name}_{len(names)}" if name in names else name)
    body = rows[has_header:]
    fitting = [row for row in body if len(row) == len(names)]
    return Sample(tuple(names), fitting or [[*row, *names][: len(names)] for row in body], is_picture, has_header)


def _usual_width(rows: list[list[str]]) -> int:
    """Count the columns of rows of which some have more values, by a delimiter in one: the fewest that are no slip."""
    widths = Counter(map(len, rows))
    return min(width for width, times in widths.items() if times >= _OFTEN * len(rows))


def _parquet_records(file: Path, into: Collection) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a parquet file; pictures that lie in it are written out to the cache folder."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise NotRead("reading parquet takes pyarrow: pip install '.[hub]', or save it as CSV") from error
    if not into.trusted:
        raise NotRead("parquet is not read here; save it as CSV")
    try:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=256)
        for record in (record for batch in batches for record in batch.to_pylist()):
            for name, value in record.items():
                if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
                    kept = stored(value["bytes"], Path(value.get("path") or "").suffix, cache_folder() / "pictures")
                    record = {**record, name: kept}
            yield file.name, record
    except ArrowException as error:
        raise NotRead(f"it is damaged: {error}") from error
