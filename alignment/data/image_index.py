"""Look up which picture a name in an annotation means, in an index of the data set's folder.

Names are compared in NFC, since some systems store é as one character and some as two. Of several pictures with a
name, the split of the annotation decides; otherwise the name is ambiguous.
"""

import os
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from alignment.data.files import UNLISTED, canonical_split, is_image_name, split_from_name, walk
from alignment.preprocess import IMAGE_SUFFIXES


class Matches(NamedTuple):
    """The pictures that a name may mean: several where nothing decides between them."""

    paths: tuple[str, ...]
    differs_in_case: bool  # the name is that of the picture only if case is ignored


class ImageIndex:
    """The pictures below the folder `root` by name, listed on first use."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(root)
        self.unlisted: list[str] = []  # absolute paths of folders that cannot be listed, as far as they are known

    @cached_property
    def paths(self) -> list[str]:
        """All pictures, in alphabetical order; folders that cannot be listed are added to `unlisted`."""

        def leave_out(reason: str, folder: Path) -> None:
            if reason == UNLISTED:
                self.unlisted.append(os.path.abspath(folder))

        files = walk(Path(self.root), leave_out) if os.path.isdir(self.root) else ()
        return [os.fspath(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES]

    def is_unreachable(self, path: str) -> bool:
        """Tell whether a path is in a folder that cannot be listed or entered; that folder is added to `unlisted`."""
        if is_denied := _is_denied(path):
            folder = next(str(folder) for folder in Path(path).parents if not _is_denied(folder))
            self.unlisted += {folder} - {*self.unlisted}
        return is_denied or any(path.startswith(os.path.join(folder, "")) for folder in self.unlisted)

    def has_stem(self, stem: str) -> bool:
        """Tell whether a picture has this name without its suffix."""
        return nfc(stem) in self._groups["stem"]

    def names_image(self, value: object) -> bool:
        """Tell whether a value looks like the name of a picture, or is the stem of one in the index."""
        if not isinstance(value, str | int) or isinstance(value, bool):
            return False
        text = str(value).strip()
        return is_image_name(text) or ("\n" not in text and bool(self._find_stem(text)))

    def find(self, name: str, split: str = "", folder: str = "") -> Matches:
        """Find the pictures whose path ends in a name.

        Args:
            name: with forward slashes, its folders as far as they are given, with the suffix of a picture or without.
            split: of the annotation, canonical; decides between pictures in folders that are named after splits.
            folder: of the annotation; pictures below it take precedence.
        """
        name = nfc(os.path.normpath(name).replace(os.sep, "/"))
        base = name.rpartition("/")[2]
        same_base = self._groups["folded"].get(base.casefold(), [])
        folded = [path for path in same_base if self._relative(path).casefold().endswith(f"/{name}".casefold())]
        paths = [path for path in folded if self._relative(path).endswith(f"/{name}")]
        if not paths and os.path.splitext(base)[1].lower() not in IMAGE_SUFFIXES:
            paths = self._find_stem(name)
        return Matches(self._decide(paths or folded, split, folder), bool(folded and not paths))

    def split_of(self, path: str) -> str:
        """Return the split that the folders of a picture are named after, the nearest first; "" without one."""
        parts = os.path.dirname(path)[len(self.root) :].split(os.sep)
        return next((canonical_split(split) for part in reversed(parts) if (split := split_from_name(part))), "")

    def _relative(self, path: str) -> str:
        return nfc(path[len(self.root) :].replace(os.sep, "/"))

    def _find_stem(self, name: str) -> list[str]:
        folder, _, stem = nfc(name).rpartition("/")
        paths = self._groups["stem"].get(stem, [])
        if not paths:
            number = re.sub(r"^(\d+)\.0$", r"\1", stem, flags=re.ASCII)  # a column of numbers with a gap is written so
            if number.isascii() and number.isdigit():  # 139 stands for 000000000139.jpg
                paths = self._groups["number"].get(number.lstrip("0"), [])
        return [path for path in paths if not folder or os.path.dirname(path).endswith(f"/{folder}")]

    def _decide(self, paths: list[str], split: str, folder: str) -> tuple[str, ...]:
        if split:
            own = [path for path in paths if self.split_of(path) == split]
            if own or (self._names_repeat and split in self._splits):
                paths = own or [path for path in paths if not self.split_of(path)]
        below = [path for path in paths if folder and path.startswith(os.path.join(folder, ""))]
        return tuple(below if len(paths) > 1 and below else paths)

    @cached_property
    def _groups(self) -> dict[str, defaultdict[str, list[str]]]:
        """Pictures by "name", "folded" name, "stem", and "number" if the stem is one."""
        groups = {kind: defaultdict[str, list[str]](list) for kind in ("name", "folded", "stem", "number")}
        for path in self.paths:
            name = nfc(os.path.basename(path))
            stem = os.path.splitext(name)[0]
            groups["name"][name].append(path)
            groups["folded"][name.casefold()].append(path)
            groups["stem"][stem].append(path)
            if stem.isascii() and stem.isdigit():
                groups["number"][stem.lstrip("0")].append(path)
        return groups

    @cached_property
    def _splits(self) -> set[str]:
        """The splits that folders are named after."""
        return {self.split_of(path) for path in {os.path.dirname(path): path for path in self.paths}.values()} - {""}

    @cached_property
    def _names_repeat(self) -> bool:
        """Whether pictures of different splits have the same name."""
        return any(len(set(map(self.split_of, paths))) > 1 for paths in self._groups["name"].values() if len(paths) > 1)


def _is_denied(path: str | Path) -> bool:  # a folder around it may not be entered
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError)
    return False


def nfc(name: str) -> str:
    """Normalise a name to NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
