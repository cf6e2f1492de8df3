"""Collect raw annotations: find the picture each one names, merge those of one picture, and count what does not fit."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from alignment.data.encoding import Encoding, detect_encoding
from alignment.data.files import TEXT_SUFFIXES, UNLISTED, ImageIndex, canonical_split
from alignment.preprocess import MAX_CAPTION_CHARS, InputError, clean_caption, join_first, sanitize_text

logger = logging.getLogger(__name__)

_URL = re.compile(r"(https?|ftp|s3|gs)://", re.IGNORECASE)
_NO_CAPTION = {"nan", "none", "null", "<na>", "n/a", "#n/a"}  # as programs write a missing value
_MAX_LISTED_FILES = 5
NOT_UTF8 = "files not in UTF-8"


class AmbiguousImageNames(ValueError):
    """Each of the `names` in the annotations fits several pictures."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = names


class EmptyDataset(ValueError):
    """No picture of a data set is left; `left_out` maps reasons to what was left out for them."""

    def __init__(self, message: str, left_out: Mapping[str, Sequence[str]]) -> None:
        super().__init__(message)
        self.left_out = left_out


@dataclass(frozen=True)
class Pair:
    """A picture with the captions that describe it."""

    image: str  # absolute path
    captions: tuple[str, ...]  # cleaned, in the order written; empty if the data set has none for this picture
    split: str = ""  # "train", "dev", "test", another name the data set uses, or ""
    id: str = ""  # what the data set calls the picture, else its path below the data set's folder


@dataclass(kw_only=True)
class ReadIssues:
    """What did not fit while reading."""

    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> what was left out for it
    repaired: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what is wrong -> what was read all the same
    unread: Mapping[str, str] = field(default_factory=dict)  # files of captions that could not be read -> why
    unlisted: Sequence[str] = ()  # absolute paths of folders that could not be listed: their pictures are not known

    @property
    def is_complete(self) -> bool:
        """Whether all folders could be listed and all files of captions could be read."""
        return not (self.unlisted or self.unread)


class RawAnnotation(NamedTuple):
    """What one annotation says, unchecked."""

    image: str | Path  # a name to look up, or the path of a picture that is known to exist
    captions: Sequence[str] = ()
    split: str = ""
    id: str = ""
    folder: Path | None = None  # that the name is relative to, if not the data set's


class Collector:
    """The pictures found so far, each with its annotations, and what did not fit (see `ReadIssues`).

    `split` is the only one to read, or "" for all; `absolute` paths in annotations may be opened; `trusted` annotations
    are the user's own; with `any_table`, tables in a folder of pictures need not be called metadata.
    """

    def __init__(
        self, index: ImageIndex, split: str = "", absolute: bool = False, trusted: bool = True, any_table: bool = True
    ) -> None:
        self.index, self.root, self.split = index, index.root, split
        self.absolute, self.trusted, self.any_table = absolute, trusted, any_table
        self.annotations: dict[str, list[RawAnnotation]] = {}  # by the path of the picture
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self.repaired: defaultdict[str, list[str]] = defaultdict(list)
        self.unread: dict[str, str] = {}
        self.unlisted: list[str] = []  # absolute paths of folders
        self._file = ""
        self._counts: Counter[str] = Counter()  # of this file: captions; annotations joined, unwanted, unreachable
        self._splits: set[str] = set()  # those not asked for included
        self._paths: dict[tuple[str | Path, Path | None, str], str | None] = {}
        self._ambiguous: dict[str, tuple[str, ...]] = {}
        self._claims: defaultdict[str, dict[str, str]] = defaultdict(dict)  # picture found by name -> split -> file

    def skip(self, reason: str, what: object) -> None:
        """Record what was left out, and why."""
        self.left_out[reason].append(str(what))

    def repair(self, reason: str, what: object) -> None:
        """Record what was read although something is wrong with it."""
        self.repaired[reason].append(str(what))

    def refuse(self, file: Path, reason: str) -> None:
        """Record a file of captions that could not be read."""
        self.unread[self.relative(file)] = reason

    def skip_folder(self, reason: str, folder: str | Path) -> None:
        """Record a folder that was not listed, and why; `UNLISTED` ones only once."""
        path = os.path.abspath(folder)
        if path not in self.unlisted:
            self.skip(reason, self.relative(path))
            self.unlisted += [path] if reason == UNLISTED else []

    def relative(self, file: str | Path) -> str:
        """Return a path relative to the data set's folder, for messages; unchanged if it is outside."""
        path = os.path.abspath(file)
        return os.path.relpath(path, self.root).replace(os.sep, "/") if self._is_inside(path) else path

    def _is_inside(self, path: str) -> bool:
        return path.startswith(os.path.join(self.root, ""))

    def wants(self, split: str) -> bool:
        """Record that a split exists, and tell whether it is to be read."""
        self._splits.add(canonical_split(split))
        return self.split in ("", canonical_split(split))

    def has_captions(self, path: str | Path) -> bool:
        """Tell whether captions of a picture have been read."""
        return any(annotation.captions for annotation in self.annotations.get(os.path.abspath(path), ()))

    def check_file(self, file: Path, annotations: Iterable[RawAnnotation]) -> Iterator[RawAnnotation]:
        """Pass on a file's annotations; if the picture of none is found, the file counts as unread."""
        self._file, self._counts = self.relative(file), Counter()
        encoding = detect_encoding(file) if file.suffix.lower() in TEXT_SUFFIXES else Encoding("utf-8")
        if not encoding.is_utf8:
            self.repair(NOT_UTF8, f"{self._file} as {encoding.name}")
        for annotation in annotations:
            if encoding.damaged and any("\ufffd" in text for text in annotation.captions):
                self.repair("captions with damaged characters", f"{self._file}: {annotation.image}")
            yield annotation
        if self._counts["captions"] and not any(self._counts[kind] for kind in ("joined", "unwanted", "unreachable")):
            self.refuse(file, f"none of its {self._counts['captions']} captions belongs to a picture that is there")

    def add(self, annotation: RawAnnotation) -> None:
        """Add an annotation if it is of the split to be read and its picture is there."""
        annotation = annotation._replace(split=canonical_split(annotation.split))
        is_wanted = self.wants(annotation.split)
        key = (annotation.image, annotation.folder, annotation.split)
        if isinstance(annotation.image, str) and not annotation.image.strip():
            self._paths[key] = None
            if is_wanted:
                self.skip("lines without a picture", f"{self._file}: {', '.join(annotation.captions)}")
        elif key not in self._paths:
            self._paths[key] = self._find(annotation, is_wanted)
        self._counts["captions"] += len(annotation.captions)
        self._counts["unwanted"] += not is_wanted
        if (path := self._paths[key]) and is_wanted:
            self._counts["joined"] += 1
            self.annotations.setdefault(path, []).append(annotation)

    def _find(self, annotation: RawAnnotation, is_wanted: bool) -> str | None:
        """Find a picture relative to its annotation or the data set's folder, or by the end of its path below that."""
        if isinstance(annotation.image, Path):
            return os.path.abspath(annotation.image)
        name, found = annotation.image.strip().replace("\\", "/"), None
        is_absolute, paths = os.path.isabs(name), [name] if self.absolute else []
        if not is_absolute:
            starts = (annotation.folder or self.root, self.root)
            paths = [os.path.abspath(os.path.join(start, name)) for start in starts]
            paths = [path for path in paths if self._is_inside(path)]
        if _URL.match(name):
            reason = "addresses on the network, which are not opened"
        elif not paths:
            reason = "paths outside the data set"
        else:
            reason = "missing pictures"
            found = next(filter(os.path.isfile, paths), None)
            if found is None and not is_absolute:
                found = self._search(name, annotation, is_wanted)
            if found is None and is_wanted and any(map(self.index.is_unreachable, paths)):
                self._counts["unreachable"] += 1
                reason = "pictures in folders that cannot be listed"
        if found is None and is_wanted and name not in self._ambiguous:
            self.skip(reason, annotation.image)
        return found

    def _search(self, name: str, annotation: RawAnnotation, is_wanted: bool) -> str | None:
        folder, repairs = os.fspath(annotation.folder or ""), []
        paths, differs_in_case = self.index.find(name, annotation.split, folder)
        if not paths and "%" in name:
            paths, differs_in_case = self.index.find(unquote(name), annotation.split, folder)
            repairs.append("names written as in an address, with % for letters")
        if differs_in_case:
            repairs.append("names that differ from their pictures' in upper and lower case")
        if len(paths) > 1 and is_wanted:
            self._ambiguous[name] = tuple(map(self.relative, paths))
        if len(paths) != 1:
            return None
        for reason in repairs if is_wanted else ():
            self.repair(reason, name)
        self._claims[paths[0]].setdefault(annotation.split, self._file)
        return paths[0]

    def pairs(self, title: str, *, may_be_empty: bool = False) -> list[Pair]:
        """Merge the annotations of each picture, and log what was read; raise AmbiguousImageNames or EmptyDataset."""
        for folder in self.index.unlisted:
            self.skip_folder(UNLISTED, folder)
        self._resolve_claims()
        if self._ambiguous:
            listed = [f"{sanitize_text(name)} ({join_first(paths)})" for name, paths in self._ambiguous.items()]
            message = (
                f"{title}: nothing decides which picture is meant, of {len(listed)} names: {join_first(listed)}. Write "
                "the folder before the names, put each part with its annotations into a folder of its own, or give the "
                "path of one of them."
            )
            raise AmbiguousImageNames(message, list(self._ambiguous))
        pairs = [self._merge(path, annotations) for path, annotations in self.annotations.items()]
        left_out = "; ".join(f"{len(what)} {reason} ({join_first(what)})" for reason, what in self.left_out.items())
        if not pairs and not may_be_empty:
            named = sorted(filter(None, self._splits))
            there = f"its splits are {join_first(named)}" if named else "it has no splits, so ask for none"
            why = f" of split {self.split!r}; {there}" if self.split else ""
            why += f"; left out: {left_out}" if left_out else ""
            message = f"{title} has no pictures{why}. Check the path, the format and the split."
            raise EmptyDataset(message, self.left_out)
        # A service logs these messages up to the first argument, since the rest may quote a visitor.
        num_captions = sum(len(pair.captions) for pair in pairs)
        logger.info("Read a data set, %s: %d pictures, %d captions.", title, len(pairs), num_captions)
        if left_out:
            logger.warning("Read a data set in part, %s: left out %s.", title, left_out)
        for line in _describe_unread(self.unread):
            logger.warning("A file of captions could not be read, of %s: %s.", title, line)
        return pairs

    def _resolve_claims(self) -> None:
        """Where annotations of two splits name one picture without its folder, keep those of its folder's split."""
        for path, claimed in self._claims.items():
            claims = {split: file for split, file in claimed.items() if split}
            if len(set(claims.values())) < 2:
                continue
            own = self.index.split_of(path)
            if own not in claims:
                self._ambiguous[self.relative(path)] = tuple(sorted(set(claims.values())))
                continue
            annotations = self.annotations.get(path, [])
            for annotation in [one for one in annotations if one.split not in ("", own)]:
                self.skip("missing pictures", f"{annotation.split}: {annotation.image}")
                annotations.remove(annotation)
            if not annotations:
                self.annotations.pop(path, None)

    def _merge(self, path: str, annotations: list[RawAnnotation]) -> Pair:
        texts = (text for annotation in annotations for text in annotation.captions)
        captions = tuple(caption for text in texts if (caption := self._clean(text, path)))
        splits = dict.fromkeys(annotation.split for annotation in annotations if annotation.split)
        if len(splits) > 1:
            self.repair("pictures of several splits, taken for the first", f"{os.path.basename(path)}: {[*splits]}")
        ids = (annotation.id for annotation in annotations if annotation.id)
        return Pair(path, captions, next(iter(splits), ""), next(ids, self.relative(path)))

    def _clean(self, text: str, path: str) -> str:
        if len(text) > MAX_CAPTION_CHARS:  # no text tower reads on
            self.skip("ends of very long captions", os.path.basename(path))
        try:
            return clean_caption("" if text.strip().lower() in _NO_CAPTION else text[:MAX_CAPTION_CHARS])
        except InputError:
            self.skip("empty captions", os.path.basename(path))
            return ""


def describe_issues(issues: ReadIssues) -> list[str]:
    """Write a line for each reason why something was left out or repaired, and for each file that could not be read."""
    kinds = {"left out": issues.left_out, "read all the same": issues.repaired}
    lines = [_reason(f"{kind}, {reason}", what) for kind, found in kinds.items() for reason, what in found.items()]
    return lines + [f"not read, {line}" for line in _describe_unread(issues.unread)]


def describe_truncated(captions: Sequence[str], max_length: int) -> list[str]:
    """Write a line about the captions that are longer than a model reads; none if there are none."""
    reason = f"captions of which the model reads only the first {max_length} tokens"
    return [_reason(reason, captions)] if captions else []


def _reason(reason: str, what: Sequence[str]) -> str:
    return f"{reason}: {len(what):,} ({join_first(what)})"


def _describe_unread(unread: Mapping[str, str]) -> list[str]:
    """Say of the first few files why they could not be read, and how many more there are."""
    lines = [f"{sanitize_text(file, 150)}: {sanitize_text(why, 300)}" for file, why in unread.items()]
    more = len(lines) - _MAX_LISTED_FILES
    return lines[:_MAX_LISTED_FILES] + ([f"and {more:,} more files of captions"] if more > 0 else [])
