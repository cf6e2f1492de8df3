"""What a reader says, and what of it counts: rows go in, pictures with their captions come out."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from alignment.pairs.files import UNLISTED, canonical, near
from alignment.preprocess import MAX_CAPTION_CHARS, InputError, clean_caption, few, legible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """An image with the captions that describe it.

    Attributes:
        image: absolute path.
        captions: cleaned, in the order written; none if the data set has none for this picture.
        split: "train", "dev", "test", another name the data set uses, or "".
        id: what the data set calls the image, else its path below the data set's folder.
    """

    image: str
    captions: tuple[str, ...]
    split: str = ""
    id: str = ""


class Row(NamedTuple):
    """What one annotation says, unchecked."""

    image: str | Path  # a name to look up, or the path of a file already found
    captions: Sequence[str] = ()
    split: str = ""
    id: str = ""
    folder: Path | None = None  # where the name starts from, if not at the data set's folder


class Collection:
    """The pictures found so far, each with its rows, and what was left out."""

    def __init__(self, root: Path, wanted: str, *, absolute: bool) -> None:
        self.root = os.fspath(root)
        self.wanted = wanted
        self.absolute = absolute
        self.rows: dict[str, list[Row]] = {}
        self.splits: set[str] = set()
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        self.unlisted: list[str] = []
        self._found: dict[tuple[str | Path, Path | None], str | None] = {}
        self._folders: list[Path] | None = None

    def skip(self, reason: str, what: object) -> None:
        """Note what was left out, and why."""
        self.skipped[reason].append(str(what))

    def leave_out(self, reason: str, folder: Path) -> None:
        """Note a folder that is not gone into, and why."""
        self.skip(reason, os.path.relpath(folder, self.root))
        if reason == UNLISTED:
            self.unlisted.append(os.path.abspath(folder))

    def wants(self, split: str) -> bool:
        """Note that there is such a split, and say whether it is asked for."""
        self.splits.add(canonical(split))
        return self.wanted in ("", canonical(split))

    def add(self, row: Row) -> None:
        """Take a row in, if it is of the split asked for and its picture is there."""
        row = row._replace(split=canonical(row.split))
        if self.wants(row.split):
            key = (row.image, row.folder)
            if key not in self._found:
                self._found[key] = self._find(row)
            if path := self._found[key]:
                self.rows.setdefault(path, []).append(row)

    def pairs(self, title: str, *, may_be_empty: bool = False) -> list[Pair]:
        """Merge the rows of each picture and log what happened."""
        pairs = [self._merge(path, rows) for path, rows in self.rows.items()]
        left_out = "; ".join(
            f"{len(what)} {reason} ({', '.join(map(legible, what[:3]))}{', ...' if len(what) > 3 else ''})"
            for reason, what in self.skipped.items()
        )
        if not pairs and not may_be_empty:
            named = sorted(filter(None, self.splits))
            there = f"its splits are {few(named)}" if named else "it has no splits, so ask for none"
            asked = f" of split {self.wanted!r}; {there}" if self.wanted else ""
            reason = f"; left out: {left_out}" if left_out else ""
            raise ValueError(f"{title} has no pictures{asked}{reason}. Check the path, the format and the split.")
        logger.info("%s: %d pictures, %d captions.", title, len(pairs), sum(len(pair.captions) for pair in pairs))
        if left_out:
            logger.warning("%s: left out %s.", title, left_out)
        return pairs

    def _merge(self, path: str, rows: list[Row]) -> Pair:
        captions = tuple(caption for row in rows for text in row.captions if (caption := self._clean(text, path)))
        split = next((row.split for row in rows if row.split), "")
        name = Path(path).relative_to(self.root).as_posix() if self._holds(path) else path
        return Pair(path, captions, split, next((row.id for row in rows if row.id), name))

    def _clean(self, text: str, path: str) -> str:
        """Tidy one caption; no text tower reads as far as a long one is cut here."""
        if len(text) > MAX_CAPTION_CHARS:
            self.skip("ends of very long captions", os.path.basename(path))
        try:
            return clean_caption(text[:MAX_CAPTION_CHARS])
        except InputError:
            self.skip("empty captions", os.path.basename(path))
            return ""

    def _find(self, row: Row) -> str | None:
        """Find the picture a row names: beside its annotation, in the data set's folder, or below that."""
        if isinstance(row.image, Path):
            return os.path.abspath(row.image)
        name = row.image.strip().replace("\\", "/")
        if os.path.isabs(name):
            paths = [name] if self.absolute else []
        else:
            starts = [row.folder or self.root, self.root]
            paths = [os.path.abspath(os.path.join(start, name)) for start in starts]
            paths = [path for path in paths if self._holds(path)]
        if not paths:
            self.skip("paths outside the data set" if name else "lines without a picture", row.image or row.captions)
            return None
        found = next(filter(os.path.isfile, paths), None) or self._search(os.path.normpath(name))
        if found is None:
            self.skip("missing pictures", row.image)
        return found

    def _search(self, name: str) -> str | None:
        """Look two folders deep for a picture that is named without its folder."""
        if name.startswith("..") or os.path.isabs(name):
            return None
        if self._folders is None:
            self._folders = near(Path(self.root), "*/")
        return next(filter(os.path.isfile, (os.path.join(folder, name) for folder in self._folders)), None)

    def _holds(self, path: str) -> bool:
        return path.startswith(os.path.join(self.root, ""))
