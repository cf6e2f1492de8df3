"""What a reader says, and what of it counts: rows go in, pictures with their captions come out."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from alignment.data.encoding import Encoding, encoding_of
from alignment.data.files import TEXTS, UNLISTED, canonical_split
from alignment.data.image_index import PictureIndex
from alignment.data.unsupported import told_unread
from alignment.preprocess import MAX_CAPTION_CHARS, InputError, clean_caption, join_first, sanitize_text

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)
_NO_VALUES = {"nan", "none", "null", "<na>", "n/a", "#n/a"}  # as programs write that there is no caption
AWAY = "pictures in folders that cannot be listed"


class AmbiguousImageNames(ValueError):
    """Nothing decides which of several pictures is meant.

    Attributes:
        names: that may mean several.
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = names


class EmptyDataset(ValueError):
    """No picture of a data set is left.

    Attributes:
        left_out: reason -> what was left out for it.
    """

    def __init__(self, message: str, left_out: Mapping[str, Sequence[str]]) -> None:
        super().__init__(message)
        self.left_out = left_out


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
    """The pictures found so far, each with its rows, and what was left out.

    Attributes:
        wanted: the only split to read; "" for all.
        absolute: whether absolute paths count.
        trusted: whether the annotations are the user's own.
        any_table: whether tables in a folder of pictures count that are not called metadata.
        index: the pictures of the data set's folder.
        skipped: reason -> what was left out for it.
        repaired: reason -> what was read although something is wrong with it.
        unread: files of captions of which nothing could be read -> why.
    """

    def __init__(
        self,
        root: Path,
        wanted: str,
        *,
        absolute: bool = False,
        trusted: bool = True,
        any_table: bool = True,
        index: PictureIndex | None = None,
    ) -> None:
        self.root = os.fspath(root)
        self.index = index or PictureIndex(root)
        self.wanted = wanted
        self.absolute = absolute
        self.trusted = trusted
        self.any_table = any_table
        self.rows: dict[str, list[Row]] = {}
        self.splits: set[str] = set()
        self.skipped: defaultdict[str, list[str]] = defaultdict(list)
        self.unlisted: list[str] = []
        self.repaired: defaultdict[str, list[str]] = defaultdict(list)
        self.unread: dict[str, str] = {}
        self._file = ""
        self._added: Counter[str] = Counter()  # of this file: captions; rows joined, unwanted, away
        self._found: dict[tuple[str | Path, Path | None, str], str | None] = {}
        self._ambiguous: dict[str, tuple[str, ...]] = {}
        self._claims: defaultdict[str, dict[str, str]] = defaultdict(dict)  # searched picture -> split -> file

    def skip(self, reason: str, what: object) -> None:
        """Note what was left out, and why."""
        self.skipped[reason].append(str(what))

    def leave_out(self, reason: str, folder: Path) -> None:
        """Note a folder that is not gone into, and why; once, though two may come by it."""
        path = os.path.abspath(folder)
        if reason == UNLISTED and path in self.unlisted:
            return
        self.skip(reason, os.path.relpath(path, self.root) if self._holds(path) else path)
        if reason == UNLISTED:
            self.unlisted.append(path)

    def repair(self, reason: str, what: object) -> None:
        """Note what was read although something is wrong with it."""
        self.repaired[reason].append(str(what))

    def refuse(self, file: Path, reason: str) -> None:
        """Note a file of captions of which nothing could be read."""
        self.unread[self.shown(file)] = reason

    def note_encoding(self, file: Path, encoding: Encoding) -> None:
        """Note as what a file is read, unless that is UTF-8."""
        if not encoding.name.startswith("utf-8"):
            self.repair("files not in UTF-8", f"{self.shown(file)} as {encoding.name}")

    def shown(self, file: Path) -> str:
        """Name a file below the data set's folder."""
        path = os.path.abspath(file)
        return os.path.relpath(path, self.root).replace(os.sep, "/") if self._holds(path) else path

    def wants(self, split: str) -> bool:
        """Note that there is such a split, and say whether it is asked for."""
        self.splits.add(canonical_split(split))
        return self.wanted in ("", canonical_split(split))

    def counted(self, file: Path, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass on the rows of a file of captions; if none finds its picture, the file counts as unread."""
        self._file, self._added = self.shown(file), Counter()
        encoding = encoding_of(file) if file.suffix.lower() in TEXTS else None
        if encoding:
            self.note_encoding(file, encoding)
        for row in rows:
            if encoding and encoding.damaged and any("\ufffd" in text for text in row.captions):
                self.repair("captions with damaged characters", f"{self._file}: {row.image}")
            yield row
        if self._added["captions"] and not any(self._added[kind] for kind in ("joined", "unwanted", "away")):
            self.refuse(file, f"none of its {self._added['captions']} captions belongs to a picture that is there")

    def has_captions(self, path: str) -> bool:
        """Whether captions of this picture have been read."""
        return any(row.captions for row in self.rows.get(path, ()))

    def add(self, row: Row) -> None:
        """Take a row in, if it is of the split asked for and its picture is there."""
        row = row._replace(split=canonical_split(row.split))
        is_wanted = self.wants(row.split)
        path = self._found_once(row, is_wanted)
        self._added["captions"] += len(row.captions)
        self._added["unwanted"] += not is_wanted
        if path and is_wanted:
            self._added["joined"] += 1
            self.rows.setdefault(path, []).append(row)

    def _found_once(self, row: Row, is_wanted: bool) -> str | None:
        """Look up what a row names, if another has not asked for it."""
        if isinstance(row.image, str) and not row.image.strip():
            if is_wanted:
                self.skip("lines without a picture", f"{self._file}: {', '.join(row.captions)}")
            return None
        key = (row.image, row.folder, row.split)
        if key not in self._found:
            self._found[key] = self._find(row, is_wanted)
        return self._found[key]

    def pairs(self, title: str, *, may_be_empty: bool = False) -> list[Pair]:
        """Merge the rows of each picture and log what happened.

        Raises:
            AmbiguousImageNames: when nothing decides which of several pictures a name means.
            EmptyDataset: when no picture is left.
        """
        self._settle_claims()
        if self._ambiguous:
            raise AmbiguousImageNames(f"{title}: {self._ambiguity()}", list(self._ambiguous))
        pairs = [self._merge(path, rows) for path, rows in self.rows.items()]
        left_out = "; ".join(f"{len(what)} {reason} ({join_first(what)})" for reason, what in self.skipped.items())
        if not pairs and not may_be_empty:
            named = sorted(filter(None, self.splits))
            there = f"its splits are {join_first(named)}" if named else "it has no splits, so ask for none"
            asked = f" of split {self.wanted!r}; {there}" if self.wanted else ""
            reason = f"; left out: {left_out}" if left_out else ""
            raise EmptyDataset(
                f"{title} has no pictures{asked}{reason}. Check the path, the format and the split.", self.skipped
            )
        logger.info("%s: %d pictures, %d captions.", title, len(pairs), sum(len(pair.captions) for pair in pairs))
        if left_out:
            logger.warning("%s: left out %s.", title, left_out)
        for line in told_unread(self.unread):
            logger.warning("%s: could not be read, %s.", title, line)
        return pairs

    def _settle_claims(self) -> None:
        """Of a picture that the annotations of two splits claim by its bare name, its folder decides which is right."""
        for path, claimed in self._claims.items():
            claims = {split: file for split, file in claimed.items() if split}
            if len(claims) < 2 or len(set(claims.values())) < 2:
                continue
            own = self.index.split_of(path)
            if own not in claims:
                self._ambiguous[self.shown(Path(path))] = tuple(sorted(set(claims.values())))
                continue
            rows = self.rows.get(path, [])
            kept = [row for row in rows if row.split in ("", own)]
            for row in rows:
                if row not in kept:
                    self.skip("missing pictures", f"{row.split}: {row.image}")
            self.rows[path] = kept
            if not kept:
                self.rows.pop(path)

    def _ambiguity(self) -> str:
        some = [f"{sanitize_text(name)} ({join_first(meant)})" for name, meant in self._ambiguous.items()]
        return (
            f"nothing decides which picture is meant, of {len(some)} names: {join_first(some)}. Write the folder "
            "before the names, put each part with its annotations into a folder of its own, or give the path of one of "
            "them."
        )

    def _merge(self, path: str, rows: list[Row]) -> Pair:
        captions = tuple(caption for row in rows for text in row.captions if (caption := self._clean(text, path)))
        splits = dict.fromkeys(row.split for row in rows if row.split)
        if len(splits) > 1:
            self.repair("pictures of several splits, taken for the first", f"{os.path.basename(path)}: {[*splits]}")
        name = Path(path).relative_to(self.root).as_posix() if self._holds(path) else path
        return Pair(path, captions, next(iter(splits), ""), next((row.id for row in rows if row.id), name))

    def _clean(self, text: str, path: str) -> str:
        """Tidy one caption; no text tower reads as far as a long one is cut here."""
        if len(text) > MAX_CAPTION_CHARS:
            self.skip("ends of very long captions", os.path.basename(path))
        try:
            return clean_caption("" if text.strip().lower() in _NO_VALUES else text[:MAX_CAPTION_CHARS])
        except InputError:
            self.skip("empty captions", os.path.basename(path))
            return ""

    def _find(self, row: Row, is_wanted: bool) -> str | None:
        """Find the picture a row names: beside its annotation, in the data set's folder, or anywhere below that."""
        if isinstance(row.image, Path):
            return os.path.abspath(row.image)
        name = row.image.strip().replace("\\", "/")
        if _ADDRESS.match(name):
            if is_wanted:
                self.skip("addresses on the network, which are not opened", row.image)
            return None
        if os.path.isabs(name):
            paths = [name] if self.absolute else []
        else:
            starts = [row.folder or self.root, self.root]
            paths = [os.path.abspath(os.path.join(start, name)) for start in starts]
            paths = [path for path in paths if self._holds(path)]
        if not paths:
            if is_wanted:
                self.skip("paths outside the data set", row.image)
            return None
        found = next(filter(os.path.isfile, paths), None) or self._search(name, row, is_wanted)
        if found is None and is_wanted and name not in self._ambiguous:
            is_away = any(map(self.index.is_away, paths))
            self._added["away"] += is_away
            self.skip(AWAY if is_away else "missing pictures", row.image)
        return found

    def _search(self, name: str, row: Row, is_wanted: bool) -> str | None:
        """Look a picture up that is not where its name says."""
        if os.path.isabs(name):
            return None
        near = os.fspath(row.folder or "")
        found = self.index.find(name, row.split, near)
        if not found.paths and "%" in name:
            found = self.index.find(unquote(name), row.split, near)
            if found.paths and is_wanted:
                self.repair("names written as in an address, with % for letters", name)
        if len(found.paths) > 1 and is_wanted:
            self._ambiguous[name] = tuple(self.shown(Path(path)) for path in found.paths)
        if len(found.paths) != 1:
            return None
        if found.by_case and is_wanted:
            self.repair("names that differ from their pictures' in upper and lower case", name)
        self._claims[found.paths[0]].setdefault(row.split, self._file)
        return found.paths[0]

    def _holds(self, path: str) -> bool:
        return path.startswith(os.path.join(self.root, ""))
