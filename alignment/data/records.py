"""Find out what the columns of a table mean, and turn a record, such as a line of a table, into a raw annotation."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from alignment.data.collector import Collector, RawAnnotation
from alignment.data.encoding import read_text
from alignment.data.files import SPLITS, is_image_name
from alignment.preprocess import join_first

IMAGE_COLUMNS = ["image", "image_path", "file_name", "filename", "image_name", "filepath", "path", "img", "image_file"]
IMAGE_COLUMNS += ["file", "photo", "picture", "img_path", "img_name", "image_filename"]
IMAGE_COLUMNS += ["jpg", "jpeg", "png", "webp"]  # as the Hub names the parts of a WebDataset
CAPTION_COLUMNS = ("caption", "sentence", "raw", "text", "title", "description", "comment", "txt")
CLASS_COLUMNS = ("label", "class", "category", "target", "species", "breed")
ID_COLUMNS = ("id", "image_id", "img_id", "imgid", "cocoid", "__key__")
_MOST = 0.8  # share of a column's values that must look alike
_MIN_VALUES = 3  # in a column that is judged by its values
_PROSE = re.compile(r"[^\W\d_]\S*\s+\S*[^\W\d_]|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}")
_LETTERS = re.compile(r"[^\W\d_]{2}")
_CLASS = re.compile(rf"\s*({'|'.join(CLASS_COLUMNS)})(s|es)?([_ -]?(name|id|idx|index|no|number)s?)?\s*", re.IGNORECASE)
_NO_TEXT = re.compile(r"\s*(\w+://\S*|[\d\s.,:/TZ+-]*|true|false|none|nan|null)\s*", re.IGNORECASE)

TEXT_PARTS = ("txt", "caption", "captions")  # of a WebDataset sample, which hold captions, one a line
_ANSWER_ROLES = ("gpt", "assistant")
_NUM_KEYS = 50  # of an object that are looked at
_LANGUAGE = re.compile(r"[a-z]{2}([-_][A-Za-z]{2,4})?")
_LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None)"""
_LITERAL_LIST = re.compile(rf"[\[(]\s*{_LITERAL}(?:(?:\s*,\s*|\s+){_LITERAL})*\s*,?\s*[\])]", re.DOTALL)

NamesImage = Callable[[object], bool]


class UnreadableTable(ValueError):
    """A file cannot be read as captions of pictures; with `may_be_captions` it is probably meant as such."""

    def __init__(self, reason: str, *, may_be_captions: bool = True) -> None:
        super().__init__(reason)
        self.may_be_captions = may_be_captions


class Columns(NamedTuple):
    """The columns of a table by what they mean."""

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    id: str | None
    classes: str | None = None  # as for image classification, where there are no captions


@lru_cache(maxsize=64)
def find_columns(names: tuple[str, ...]) -> Columns:
    """Find columns by their usual names; of several kinds of caption the first in `CAPTION_COLUMNS` counts.

    All columns of that kind do: `caption` and `captions`, `caption_1` to `caption_5`, `caption_en` and `caption_zh`.
    """
    known = {name.strip().lower(): name for name in reversed(names)}

    def first(usual: Iterable[str]) -> str | None:
        return next((known[name] for name in usual if name in known), None)

    kinds = (re.compile(rf"\s*{kind}s?([_ -]?(\d+|[a-z]{{2}}))?\s*", re.IGNORECASE) for kind in CAPTION_COLUMNS)
    captions = (tuple(filter(kind.fullmatch, names)) for kind in kinds)
    return Columns(first(IMAGE_COLUMNS), next(filter(None, captions), ()), first(["split"]), first(ID_COLUMNS))


@dataclass(frozen=True)
class TableSample:
    """The first rows of a table, by which its columns are identified."""

    names: tuple[str, ...]  # of the columns
    rows: Sequence[Sequence[str]]  # values as texts, as many as there are names
    names_image: Callable[[object], bool]  # whether a value names a picture, with its suffix or without
    has_header: bool = True  # the names are in the first row

    @cached_property
    def columns(self) -> Columns:
        """The columns by name where that is sufficient; a list of pictures has no captions and no classes."""
        named = find_columns(self.names)
        named = named._replace(image=named.image or self._find_image(named))
        return named if named.captions else self._find_captions(named)

    @cached_property
    def texts(self) -> frozenset[str]:
        """The columns of text."""
        return frozenset(name for name in self.names if self._is_mostly(name, _is_text))

    def _values(self, name: str) -> list[str]:
        column = self.names.index(name)
        return [row[column].strip() for row in self.rows if row[column].strip()]

    def _is_mostly(self, name: str, fits: Callable[[str], object]) -> bool:
        values = self._values(name)
        return bool(values) and sum(bool(fits(value)) for value in values) >= _MOST * len(values)

    def _varies(self, name: str) -> bool:  # as names and captions do, and classes do not
        values = self._values(name)
        return len(values) >= _MIN_VALUES and len({*values}) > len(values) / 2

    def _find_image(self, named: Columns) -> str:
        """Find the one column of picture names, with their suffix or without."""
        free = [name for name in self.names if name not in named.captions and name != named.split]
        found = [name for name in free if self._is_mostly(name, is_image_name)]
        stems = [name for name in free if self._is_mostly(name, self.names_image)]
        found = found or [name for name in stems if name == named.id or self._varies(name)]
        if named.id in found:
            return str(named.id)
        if len(found) == 1:
            return found[0]
        if found:
            reason = f"its columns {join_first(found)} all name pictures; call the right one image"
            raise UnreadableTable(reason, may_be_captions=bool(named.captions or self.texts))
        reason = f"none of its columns ({join_first(self.names)}) names pictures that are there"
        reason += "; call the right one image, or add a header line"
        raise UnreadableTable(reason, may_be_captions=bool(named.captions) and len(self.names) > 1)

    def _find_captions(self, named: Columns) -> Columns:
        """Add the one column of text, else one of classes."""
        names = [name for name in self.names if name not in (named.image, named.split)]
        texts = [name for name in names if name != named.id and self._is_mostly(name, _is_text)]
        prose = [name for name in texts if self._is_mostly(name, _PROSE.search)]
        classes = [name for name in names if _CLASS.fullmatch(name) and not (name in prose and self._varies(name))]
        found = [name for name in prose or filter(self._varies, texts) if name not in classes]
        if len(found) == 1:
            return named._replace(captions=(found[0],))
        if found:
            raise UnreadableTable(f"its columns {join_first(found)} may all be captions; call the right ones caption")
        if classes := classes or [name for name in texts if len(self._values(name)) >= _MIN_VALUES]:
            return named._replace(classes=classes[0])
        reason = f"none of its columns ({join_first(self.names)}) holds captions; call the right one caption"
        if texts:
            raise UnreadableTable(reason)
        return named

    def fit_row(self, fields: list[str], delimiter: str) -> list[str] | None:
        """Bring a row to as many fields as there are columns; None if several ways to do so, or none, are possible.

        A row with too many fields has the delimiter in a value without quotation marks. All ways to join neighbouring
        fields are tried, and those that put an impossible value into a column are dropped.
        """
        while len(fields) > len(self.names) and not fields[-1].strip():
            fields = fields[:-1]
        surplus = len(fields) - len(self.names)
        if surplus <= 0:
            return fields + [""] * -surplus
        rows, prose_rows = [], []
        for at in range(len(self.names)):
            joined, after = fields[at : at + surplus + 1], fields[at + surplus + 1 :]
            row = [*fields[:at], delimiter.join(joined), *after]
            if all(self._may_be(value.strip(), number, number == at) for number, value in enumerate(row)):
                rows.append(row)
                # In prose a blank follows the comma, between fields it does not.
                is_prose = all(part[:1].isspace() for part in joined[1:])
                if is_prose and not any(field[:1].isspace() for field in [*fields[1 : at + 1], *after]):
                    prose_rows.append(row)
        rows = prose_rows or rows
        return rows[0] if len(rows) == 1 else None

    def _may_be(self, value: str, number: int, is_joined: bool) -> bool:
        name, columns = self.names[number], self.columns
        if name in (columns.image, columns.split):
            is_known = is_image_name(value) if name == columns.image else value.lower() in SPLITS
            return is_known or not (is_joined or " " in value)
        return name in columns.captions or name in self.texts or not (is_joined or _is_text(value))


def _is_text(value: str) -> bool:
    return bool(_LETTERS.search(value)) and not _NO_TEXT.fullmatch(value) and not is_image_name(value)


def read_document(file: Path, collector: Collector) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a JSON document record by record, each with its place in the file.

    The forms are a list of objects; an object that maps names of pictures to captions; one with a list for each column,
    as pandas writes it; or one of these below a key such as `data`. Of LLaVA's conversations the first answer is read.
    A ValueError says that it is empty, no JSON, or of none of these forms.
    """
    text, names_image = read_text(file), collector.index.names_image
    if not text.strip():
        raise ValueError(f"{file.name} is empty")
    records = [as_record(value, names_image) for value in _values(json.loads(text), names_image)]
    if not any(records):
        raise ValueError(f"{file.name} holds no list of pictures with captions")
    for number, record in enumerate(records):
        where = f"{file.name}[{number}]"
        if record:
            yield where, _read_conversation(record, where, collector)
        else:
            collector.skip("unreadable lines", where)


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
    lists: list[list[Any]] = [value for value in data.values() if isinstance(value, list) and value]
    tables = [value for value in lists if isinstance(value[0], dict)]
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
