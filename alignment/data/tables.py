"""Read tables: CSV and TSV, JSON lines, JSON documents, parquet, and the metadata of a folder of pictures.

Python's `csv` reads a quotation mark that is never closed as a field that reaches to the next mark, over any number of
lines. Here a field contains line breaks only if its mark is closed and no line in it looks like a row.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from alignment.data.collector import Collector, RawAnnotation
from alignment.data.encoding import open_text
from alignment.data.files import ARCHIVE_SUFFIXES, TEXT_SUFFIXES, ImageIndex, is_image_name, read_head, split_from_path
from alignment.data.image_store import read_parquet
from alignment.data.records import TableSample, UnreadableTable, as_record, find_columns, read_document, read_record
from alignment.preprocess import join_first, sanitize_text

DELIMITERS = ",\t;|"
MAX_LINES_OF_A_FIELD = 200
_MAX_LINES_OF_A_HEAD = 1000
BLANK = " "
"""Delimiter of lists such as `0.jpg a dog, running`: the first blank, or colon, after the name of a picture."""

Rows = Iterator[tuple[RawAnnotation, bool]]  # each with whether its table has a column of captions
Row = tuple[int, list[str], bool]  # number of its first line, fields, whether a quotation mark is never closed
IsRow = Callable[[Sequence[str]], bool]
_LISTED = re.compile(r"([^\s,;|\"]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:#\d+)?):?[ ]+(?=\S)", re.IGNORECASE)
_SEP = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # a line in which Excel names the delimiter


TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_NUM_SAMPLED = 50  # rows by which the columns are identified
_SAMPLE_LINES = 5000  # lines in which these rows are looked for; a field may have 200
_CAPTIONS_NAME = re.compile("caption|metadata|annotation|descri")
_MIN_WIDTH_SHARE = 0.1  # of the rows that have a number of fields, for it to be that of the columns
_SPREADSHEETS = {".xlsx", ".ods", ".xls", ".xlsm", ".numbers"}
_OTHERS = {"", ".dat", ".data", ".tab", ".psv", ".bak", ".rtf", ".odt", ".html", ".md", ".doc", ".docx", ".pdf", ".xml"}
_OTHERS |= {".yaml", ".yml", ".arrow", ".feather", ".pkl", ".pickle", ".h5", ".hdf5", ".npy", ".npz", ".mat"}
_OTHERS |= {".db", ".sqlite", ".lmdb", ".tfrecord"}
_CAPTIONS_STEM = re.compile(r"caption|metadata|annotation|descri(be|pt)|sentences")
_IMAGE_NAME = re.compile(rb"\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
_MAX_BYTES = 64 * 2**20

CLASSES_ONLY = "files of classes, not captions (to take them as captions, call their column caption)"
"""Reason to leave out a table of classes of pictures, as for image classification, without captions."""


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
            yield first, fields, is_open
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


def read_table(file: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read the rows of a table; its name, or that of its folder, may say their split."""
    for row in read_rows(file, collector):
        yield row._replace(split=row.split or split_from_path(file, collector.root))


def read_rows(file: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read the rows of a table that name a picture; an UnreadableTable says that the columns are not known."""
    for row, _ in _read_records(file, collector):
        yield row._replace(folder=file.parent)


def _check_table(file: Path, collector: Collector) -> None:
    """Read the beginning of a table; an UnreadableTable says that it contains no captions, or why it cannot be read."""
    is_named_so = bool(_CAPTIONS_NAME.search(file.name.lower()))
    try:
        first = list(islice(_read_records(file, collector), _NUM_SAMPLED))
    except UnreadableTable as error:
        error.may_be_captions |= "caption" in file.name.lower() or (is_named_so and not read_head(file))
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise UnreadableTable(reason, may_be_captions=is_named_so) from error
    if not first:
        reason = "no line of it can be read" if collector.left_out else "it is empty"
        names_images = re.search(r"\.(jpe?g|png|webp)\b", read_head(file), re.IGNORECASE)
        raise UnreadableTable(reason, may_be_captions=is_named_so or bool(names_images))
    if not any(has_captions or row.captions for row, has_captions in first):
        raise UnreadableTable("it holds no captions", may_be_captions=False)


def is_caption_table(file: Path, collector: Collector, is_metadata: bool = False) -> bool:
    """Tell whether a file is a table of captions; metadata, or one that seems meant so, may be recorded as unread."""
    probe = Collector(collector.index, trusted=collector.trusted)
    try:
        if file.suffix.lower() in TABLE_SUFFIXES:
            _check_table(file, probe)
            return True
        if may_be_captions(file, collector.index):
            collector.refuse(file, explain_unsupported(file))
    except UnreadableTable as reason:
        if classes := probe.left_out.get(CLASSES_ONLY):
            collector.skip(CLASSES_ONLY, classes[0])
        elif reason.may_be_captions or is_metadata:
            collector.refuse(file, str(reason))
    return False


def _record_classes(file: Path, column: str | None, collector: Collector) -> None:
    if column:
        collector.skip(CLASSES_ONLY, f"{collector.relative(file)}, column {sanitize_text(column, 40)}")


def _read_records(file: Path, collector: Collector) -> Rows:
    suffix = file.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".json", ".parquet"):
        return _read_delimited(file, collector)
    read = read_parquet if suffix == ".parquet" else _read_json
    return _identify_columns(file, read(file, collector), collector)


def _identify_columns(file: Path, records: Iterator[tuple[str, Mapping[str, Any]]], collector: Collector) -> Rows:
    """Identify the columns of each record by their names, else by the values of the first records."""
    first = list(islice(records, _NUM_SAMPLED))
    names = tuple(dict.fromkeys(name for _, record in first for name in record))
    usual = find_columns(names)
    if first and not (usual.image and usual.captions):
        rows = [[_as_text(record.get(name)) for name in names] for _, record in first]
        usual = TableSample(names, rows, collector.index.names_image).columns
        _record_classes(file, usual.classes, collector)
    for where, record in chain(first, records):
        columns = find_columns(tuple(record))
        if columns.image is None and usual.image in record:
            columns = usual
        if columns.image is None:
            collector.skip("lines whose columns name no image", f"{where}: {join_first(list(record))}")
            continue
        if not columns.captions:
            columns = columns._replace(captions=usual.captions, classes=usual.classes)
        yield read_record(record, columns), bool(columns.captions)


def _as_text(value: object) -> str:
    if isinstance(value, list) and value:
        value = value[0]
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _read_json(file: Path, collector: Collector) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read one object a line, or a document (see `read_document`)."""
    head = read_head(file)
    if (file.suffix.lower() == ".json" or head.startswith("[")) and not _is_json_lines(head):
        yield from read_document(file, collector)
        return
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            value: object = {}
            with suppress(ValueError, RecursionError):
                value = json.loads(line.lstrip("\ufeff")) if line.strip() else None
            if record := as_record(value, collector.index.names_image):
                yield f"{file.name}:{number}", record
            elif value is not None:
                collector.skip("unreadable lines", f"{file.name}:{number}")


def _is_json_lines(head: str) -> bool:
    """Distinguish JSON lines from a document by the first line."""
    first, _, rest = head.partition("\n")
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(first), dict | list) and bool(rest.strip())
    return False


def _read_delimited(file: Path, collector: Collector) -> Rows:
    with open_text(file) as lines:
        start = list(islice(lines, _SAMPLE_LINES))
        delimiter, skipped = read_file_head(start)
        del start[:skipped]
        first = split_rows(start, delimiter, lambda fields: any(map(is_image_name, fields)), skipped + 1)
        sample = _sample_table([row for _, row, _ in islice(first, _NUM_SAMPLED + 1)], collector.index.names_image)
        _record_classes(file, sample.columns.classes, collector)
        at = sample.names.index(str(sample.columns.image))
        all_lines = chain(start, lines)
        rows = split_rows(all_lines, delimiter, lambda row: any(map(is_image_name, row[at : at + 1])), skipped + 1)
        for number, read, is_open in islice(rows, sample.has_header, None):
            where = f"{file.name}:{number}"
            if (fields := sample.fit_row(read, delimiter)) is None:
                collector.skip("lines with more values than columns", where)
                continue
            if is_open:
                collector.repair("lines with a quotation mark that is not closed", where)
            if any(field.strip() for field in read[len(fields) :]):
                collector.repair("lines with a delimiter in a value without quotation marks", where)
            record = dict(zip(sample.names, fields, strict=True))
            yield read_record(record, sample.columns), bool(sample.columns.captions)


def _sample_table(rows: Sequence[Sequence[str]], names_image: Callable[[object], bool]) -> TableSample:
    """Take the names of the columns from the first row, unless that is one of values."""
    if not rows:
        raise UnreadableTable("it is empty", may_be_captions=False)
    first = [name.strip().lstrip("# ") for name in rows[0]]
    named = [name for name in first if name]
    is_numbered = named == [str(number) for number in range(len(named))]  # as pandas writes columns without names
    has_header = is_numbered or all(find_columns(tuple(first))[:2]) or not any(map(names_image, first))
    if not has_header:  # the smallest common number of fields: rows with more have a delimiter in a value
        widths = Counter(map(len, rows))
        first = first[: min(width for width, times in widths.items() if times >= _MIN_WIDTH_SHARE * len(rows))]
    names: list[str] = []
    for number, name in enumerate(first, start=1):
        name = name if has_header and name else f"column {number}"
        names.append(f"{name}_{len(names)}" if name in names else name)  # two columns may have one name
    body = rows[has_header:]
    fitting = [row for row in body if len(row) == len(names)]
    return TableSample(tuple(names), fitting or [[*row, *names][: len(names)] for row in body], names_image, has_header)


def may_be_captions(file: Path, index: ImageIndex) -> bool:
    """Tell whether a file is named like captions, or is a spreadsheet that names pictures."""
    suffix = file.suffix.lower()
    if suffix in ARCHIVE_SUFFIXES:  # COCO's archives of annotations often lie beside what they contain
        return Path(file.stem).suffix.lower() in TEXT_SUFFIXES or "caption" in file.stem.lower()
    if suffix in _SPREADSHEETS | _OTHERS and _CAPTIONS_STEM.search(file.stem.lower()):
        return bool(index.paths)
    return suffix in _SPREADSHEETS and _names_images(file)


def explain_unsupported(file: Path) -> str:
    """Say what to do with a file of a kind that is not read."""
    if file.suffix.lower() in _SPREADSHEETS:
        return "a spreadsheet; save it as CSV (UTF-8), with the columns image and caption"
    if file.suffix.lower() in ARCHIVE_SUFFIXES:
        return "it has to be unpacked first"
    ending = f"that end in {sanitize_text(file.suffix.lower(), 20)}" if file.suffix else "without an ending"
    return f"files {ending} are not read as captions; save it as CSV with the columns image and caption"


def _names_images(file: Path) -> bool:  # a zip file of XML, or the older binary format
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as sheet:
                members = [entry for entry in sheet.infolist() if entry.filename.endswith(".xml")]
                return any(_IMAGE_NAME.search(sheet.read(entry)) for entry in members if entry.file_size < _MAX_BYTES)
        with file.open("rb") as handle:
            return bool(_IMAGE_NAME.search(handle.read(_MAX_BYTES).replace(b"\0", b"")))
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return False
