"""Find out what the columns of a table mean: by their usual names, else by their values."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from alignment.data.files import SPLITS, is_image_name
from alignment.preprocess import join_first

IMAGE_COLUMNS = (
    *("image", "image_path", "file_name", "filename", "image_name", "filepath", "path", "img", "image_file", "file"),
    *("photo", "picture", "img_path", "img_name", "image_filename"),
    *("jpg", "jpeg", "png", "webp"),  # as the Hub names the parts of a WebDataset
)
CAPTION_COLUMNS = ("caption", "sentence", "raw", "text", "title", "description", "comment", "txt")
CLASS_COLUMNS = ("label", "class", "category", "target", "species", "breed")
ID_COLUMNS = ("id", "image_id", "img_id", "imgid", "cocoid", "__key__")
_MOST = 0.8  # share of a column's values that must look alike
_MIN_VALUES = 3  # in a column that is judged by its values
_PROSE = re.compile(r"[^\W\d_]\S*\s+\S*[^\W\d_]|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}")
_LETTERS = re.compile(r"[^\W\d_]{2}")
_CLASS = re.compile(rf"\s*({'|'.join(CLASS_COLUMNS)})(s|es)?([_ -]?(name|id|idx|index|no|number)s?)?\s*", re.IGNORECASE)
_NO_TEXT = re.compile(r"\s*(\w+://\S*|[\d\s.,:/TZ+-]*|true|false|none|nan|null)\s*", re.IGNORECASE)


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
