"""Which picture a name means: one index of a data set's folder, in which every name is looked up.

Names are compared in composed form (NFC), since some systems store é as one character and some as two. Of several
pictures that a name may mean, the split of the annotation decides; where it does not, the name is ambiguous.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from alignment.data.files import OTHER_PICTURES, UNLISTED, canonical_split, split_of_name, walk
from alignment.preprocess import IMAGE_SUFFIXES

_POINT_ZERO = re.compile(r"^(\d+)\.0$", re.ASCII)
_NUMBERED = re.compile(r"#\d+$")


class Found(NamedTuple):
    """What a name may mean.

    Attributes:
        paths: the pictures; several where nothing decides between them, none where there is none.
        by_case: whether the name and that of the picture differ in upper and lower case.
    """

    paths: tuple[str, ...]
    by_case: bool = False


class PictureIndex:
    """The pictures below a folder, by the end of their path, with and without its ending; listed when first needed.

    Attributes:
        unlisted: absolute paths of folders that cannot be listed, as far as they have been met with.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self.unlisted: list[str] = []

    @cached_property
    def paths(self) -> list[str]:
        """All of them, in alphabetical order; folders that cannot be listed come into `unlisted`."""
        files = walk(Path(self.root), self._leave_out) if os.path.isdir(self.root) else ()
        return [os.fspath(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES]

    def _leave_out(self, reason: str, folder: Path) -> None:
        if reason == UNLISTED:
            self.unlisted.append(os.path.abspath(folder))

    def is_away(self, path: str) -> bool:
        """Whether a picture lies in a folder that cannot be listed or entered now; that comes into `unlisted`."""
        folder = os.path.dirname(path)
        if shut := _is_shut(path):
            while _is_shut(folder) and folder != os.path.dirname(folder):
                folder = os.path.dirname(folder)
            if folder not in self.unlisted:
                self.unlisted.append(folder)
        return shut or any(path.startswith(os.path.join(away, "")) for away in self.unlisted)

    @cached_property
    def _by_name(self) -> Mapping[str, list[str]]:
        return _grouped(self.paths, lambda path: composed(os.path.basename(path)))

    @cached_property
    def _by_case(self) -> Mapping[str, list[str]]:
        return _grouped(self.paths, lambda path: composed(os.path.basename(path)).casefold())

    @cached_property
    def _by_stem(self) -> Mapping[str, list[str]]:
        return _grouped(self.paths, _stem)

    @cached_property
    def _by_number(self) -> Mapping[str, list[str]]:
        return _grouped((path for path in self.paths if _is_number(_stem(path))), lambda path: _stem(path).lstrip("0"))

    def has_stem(self, stem: str) -> bool:
        """Whether a picture is called so, its ending apart."""
        return composed(stem) in self._by_stem

    def knows(self, name: object) -> bool:
        """Whether a value looks like the name of a picture, or is the stem of one that is there."""
        if not isinstance(name, str | int) or isinstance(name, bool):
            return False
        text = str(name).strip()
        return is_picture_name(text) or ("\n" not in text and bool(self._without_ending(text)))

    def find(self, name: str, split: str = "", near: str = "") -> Found:
        """Look a name up, folders before it counting as far as they are given.

        Args:
            name: with forward slashes; of a name without an ending of pictures, the stem counts.
            split: of the annotation, canonical; it decides between pictures in folders named after splits.
            near: folder of the annotation; pictures below it come before others.
        """
        name = composed(os.path.normpath(name).replace(os.sep, "/"))
        base = name.rpartition("/")[2]
        exact = self._ending(self._by_name.get(base, ()), name)
        if not exact and os.path.splitext(base)[1].lower() not in IMAGE_SUFFIXES:
            exact = self._without_ending(name)
        by_case = () if exact else self._ending(self._by_case.get(base.casefold(), ()), name, fold=True)
        return Found(self._decided(exact or by_case, split, near), bool(by_case))

    def _ending(self, paths: Iterable[str], name: str, *, fold: bool = False) -> tuple[str, ...]:
        """Keep the paths whose last parts are those of the name."""
        wanted = f"/{name}".casefold() if fold else f"/{name}"

        def shown(path: str) -> str:
            text = composed(path[len(self.root) :].replace(os.sep, "/"))
            return text.casefold() if fold else text

        return tuple(path for path in paths if shown(path).endswith(wanted))

    def _without_ending(self, name: str) -> tuple[str, ...]:
        folder, _, stem = composed(name).rpartition("/")
        paths = self._by_stem.get(stem, ())
        if not paths:  # a table of numbers with a gap in it is written as 139.0
            stem = _POINT_ZERO.sub(r"\1", stem)
        if not paths and _is_number(stem):  # 139 stands for 000000000139.jpg
            paths = self._by_number.get(stem.lstrip("0"), ())
        return tuple(path for path in paths if not folder or os.path.dirname(path).endswith(f"/{folder}"))

    def _decided(self, paths: tuple[str, ...], split: str, near: str) -> tuple[str, ...]:
        if split:
            own = tuple(path for path in paths if self.split_of(path) == split)
            if own or (self._names_repeat and split in self._splits):
                paths = own or tuple(path for path in paths if not self.split_of(path))
        below = tuple(path for path in paths if near and path.startswith(os.path.join(near, "")))
        return below if len(paths) > 1 and below else paths

    def split_of(self, path: str) -> str:
        """Read the split off the folders of a picture, the nearest first; "" if there is none in them."""
        parts = os.path.dirname(path)[len(self.root) :].split(os.sep)
        return next((canonical_split(split) for part in reversed(parts) if (split := split_of_name(part))), "")

    @cached_property
    def _splits(self) -> set[str]:
        """The splits that folders are named after."""
        folders = {os.path.dirname(path): path for path in self.paths}
        return {self.split_of(path) for path in folders.values()} - {""}

    @cached_property
    def _names_repeat(self) -> bool:
        """Whether one name stands for different pictures in different splits."""
        return any(len(set(map(self.split_of, paths))) > 1 for paths in self._by_name.values() if len(paths) > 1)


def _is_shut(path: str) -> bool:
    """Whether a folder around a path may not be entered."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _grouped(paths: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    return dict(groups)


def _stem(path: str) -> str:
    return composed(os.path.splitext(os.path.basename(path))[0])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def composed(name: str) -> str:
    """Bring a name into composed form."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_picture_name(text: str) -> bool:
    """Whether a text looks like the name of a picture file; `0.jpg#3` is its fourth caption, as in Flickr8k."""
    if len(text) > 1000 or "\n" in text:
        return False
    return os.path.splitext(_NUMBERED.sub("", text))[1].lower() in (*IMAGE_SUFFIXES, *OTHER_PICTURES)
