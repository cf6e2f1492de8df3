"""Which columns of a table mean what: by their usual names, else by what stands in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from alignment.data.files import SPLITS
from alignment.data.image_index import is_picture_name
from alignment.preprocess import join_first

IMAGE_COLUMNS = (
    *("image", "image_path", "file_name", "filename", "image_name", "filepath", "path", "img", "image_file", "file"),
    *("photo", "picture", "img_path", "img_name", "image_filename"),
    *("jpg", "jpeg", "png", "webp"),  # as the Hub names the parts of a WebDataset
)
CAPTION_COLUMNS = ("caption", "sentence", "raw", "text", "title", "description", "comment", "txt")
CLASS_COLUMNS = ("label", "class", "category", "target", "species", "breed")
ID_COLUMNS = ("id", "image_id", "img_id", "imgid", "cocoid", "__key__")

_MOST = 0.8  # of the values looked at
_FEWEST = 3  # values that say something
_PROSE = re.compile(r"[^\W\d_]\S*\s+\S*[^\W\d_]|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}")
_LETTERS = re.compile(r"[^\W\d_]{2}")
_CLASS = re.compile(rf"\s*({'|'.join(CLASS_COLUMNS)})(s|es)?([_ -]?(name|id|idx|index|no|number)s?)?\s*", re.IGNORECASE)
_NO_TEXT = re.compile(r"\s*(\w+://\S*|[\d\s.,:/TZ+-]*|true|false|none|nan|null)\s*", re.IGNORECASE)


class NotRead(ValueError):
    """Why a file is not read as captions.

    Attributes:
        names_pictures: whether it names pictures all the same, so that it may well be meant as captions.
    """

    def __init__(self, reason: str, *, names_pictures: bool = True) -> None:
        super().__init__(reason)
        self.names_pictures = names_pictures


class Columns(NamedTuple):
    """Which columns of a table mean what.

    Attributes:
        classes: where there are no captions, the column of classes, as for image classification.
    """

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    id: str | None
    classes: str | None = None


@lru_cache(maxsize=64)
def columns_of(names: tuple[str, ...]) -> Columns:
    """Find the columns by their usual names; of several kinds of caption the first in `CAPTION_COLUMNS` counts.

    All columns of that kind do: `caption` and `captions`, `caption_1` to `caption_5`, `caption_en` and `caption_zh`.
    """
    known = {name.strip().lower(): name for name in reversed(names)}

    def first(usual: Iterable[str]) -> str | None:
        return next((known[name] for name in usual if name in known), None)

    kinds = (re.compile(rf"\s*{kind}s?([_ -]?(\d+|[a-z]{{2}}))?\s*", re.IGNORECASE) for kind in CAPTION_COLUMNS)
    captions = (tuple(filter(kind.fullmatch, names)) for kind in kinds)
    return Columns(first(IMAGE_COLUMNS), next(filter(None, captions), ()), first(["split"]), first(ID_COLUMNS))


@dataclass(frozen=True)
class Sample:
    """The first rows of a table, by which its columns are told.

    Attributes:
        names: of the columns.
        rows: values as texts, as many as there are names.
        is_picture: whether a value names a picture, with its ending or without.
        has_header: whether the names stand in the first row.
    """

    names: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    is_picture: Callable[[object], bool]
    has_header: bool = True

    def columns(self) -> Columns:
        """Tell the columns apart, by name where that says enough.

        Raises:
            NotRead: when no column names pictures, or it cannot be told which ones are captions.
        """
        named = columns_of(self.names)
        image = named.image or self._image(named)
        others = [name for name in self.names if name not in (image, named.split)]
        if named.captions:
            return named._replace(image=image)
        try:
            captions, classes = self._captions(others, named)
            return named._replace(image=image, captions=captions, classes=classes)
        except NotRead as reason:
            if reason.names_pictures:
                raise
            return named._replace(image=image)  # a list of pictures

    def _values(self, name: str) -> list[str]:
        column = self.names.index(name)
        return [row[column].strip() for row in self.rows if row[column].strip()]

    def _most(self, name: str, fits: Callable[[str], object]) -> bool:
        values = self._values(name)
        return bool(values) and sum(bool(fits(value)) for value in values) >= _MOST * len(values)

    def _varies(self, name: str) -> bool:
        """Whether the values of a column differ, as names and captions do and classes do not."""
        values = self._values(name)
        return len(values) >= _FEWEST and len({*values}) > len(values) / 2

    @property
    def texts(self) -> frozenset[str]:
        """The columns that hold text."""
        return frozenset(name for name in self.names if self._most(name, _is_text))

    def _image(self, named: Columns) -> str:
        """Find the one column of picture names, or of their stems."""
        free = [name for name in self.names if name not in named.captions and name != named.split]
        found = [name for name in free if self._most(name, is_picture_name)]
        stems = [name for name in free if self._most(name, self.is_picture)]
        found = found or [name for name in stems if name == named.id or self._varies(name)]
        if named.id in found:
            return str(named.id)
        if not found:
            raise NotRead(
                f"none of its columns ({join_first(self.names)}) names pictures that are there; call the right one "
                "image, or add a header line",
                names_pictures=bool(named.captions) and len(self.names) > 1,
            )
        if len(found) > 1:
            raise NotRead(
                f"its columns {join_first(found)} all name pictures; call the right one image",
                names_pictures=bool(named.captions or self.texts),
            )
        return found[0]

    def _captions(self, names: Sequence[str], named: Columns) -> tuple[tuple[str, ...], str | None]:
        """Find the one column of text, else one of classes.

        Raises:
            NotRead: when there is neither, or several may be captions.
        """
        texts = [name for name in names if name != named.id and self._most(name, _is_text)]
        prose = [name for name in texts if self._most(name, _PROSE.search)]
        classes = [name for name in names if _CLASS.fullmatch(name) and not (name in prose and self._varies(name))]
        found = [name for name in prose or filter(self._varies, texts) if name not in classes]
        if len(found) == 1:
            return (found[0],), None
        if found:
            raise NotRead(f"its columns {join_first(found)} may all be captions; call the right ones caption")
        if classes := classes or [name for name in texts if len(self._values(name)) >= _FEWEST]:
            return (), classes[0]
        raise NotRead(
            f"none of its columns ({join_first(self.names)}) holds captions; call the right one caption",
            names_pictures=bool(texts),
        )


def _is_text(value: str) -> bool:
    return bool(_LETTERS.search(value)) and not _NO_TEXT.fullmatch(value) and not is_picture_name(value)


def fitted(
    fields: list[str], names: Sequence[str], columns: Columns, delimiter: str, texts: Collection[str]
) -> list[str] | None:
    """Bring a row to as many fields as there are columns; None where it cannot be told which ones belong together.

    Of a row with too many, one value holds the delimiter without quotation marks.

    Args:
        fields: as they are parted.
        names: of the columns.
        columns: what they mean.
        delimiter: what parts the fields.
        texts: the columns that may hold text of any kind.
    """
    while len(fields) > len(names) and not fields[-1].strip():
        fields = fields[:-1]
    surplus = len(fields) - len(names)
    if surplus <= 0:
        return fields + [""] * -surplus
    ways = []
    for at in range(len(names)):
        joined, after = fields[at : at + surplus + 1], fields[at + surplus + 1 :]
        row = [*fields[:at], delimiter.join(joined), *after]
        if all(_may_be(value, name, columns, texts, name == names[at]) for value, name in zip(row, names, strict=True)):
            # As people write: a blank after a comma of the text, none after one that parts fields.
            told = all(part[:1].isspace() for part in joined[1:])
            ways.append((told and not any(field[:1].isspace() for field in [*fields[1 : at + 1], *after]), row))
    told_ways = [row for told, row in ways if told] or [row for _, row in ways]
    return told_ways[0] if len(told_ways) == 1 else None


def _may_be(value: str, name: str, columns: Columns, texts: Collection[str], is_joined: bool) -> bool:
    """Whether a value is possible in its column."""
    value = value.strip()
    if name == columns.image:
        return is_picture_name(value) or not (is_joined or " " in value)
    if name == columns.split:
        return value.lower() in SPLITS or not (is_joined or " " in value)
    return name in columns.captions or name in texts or not (is_joined or _is_text(value))
