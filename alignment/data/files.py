"""Find the files of a data set, and the picture that a name in an annotation means.

Names are compared in NFC, since some systems store é as one character and some as two. Of several pictures with a
name, the split of the annotation decides; otherwise the name is ambiguous.
"""

import errno
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from alignment.data.encoding import open_text
from alignment.preprocess import IMAGE_SUFFIXES

# Pictures that are not read.
OTHER_IMAGE_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw")
ARCHIVE_SUFFIXES = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}
TEXT_SUFFIXES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".token", ".caption"}
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("dev", "val", "valid", "validation"), "dev")
UNLISTED = "folders that cannot be listed"
"""Reason to leave out a folder in which there may be pictures."""
_NO_PHOTOS = "folders of thumbnails, waste or galleries"
_PARENT_LINK = "links to a folder around them"
# Folders, in small letters, in which servers and operating systems keep thumbnails, deleted files and snapshots.
_SYSTEM_FOLDERS = {"@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "#snapshot", "@recently-snapshot"}
_SYSTEM_FOLDERS |= {"lost+found", "system volume information"}
_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")


def canonical_split(split: str) -> str:
    """Map the usual names of splits to "train", "dev" and "test"; others are lowered."""
    split = split.strip().lower()
    return SPLITS.get(split, split)


def split_from_name(name: str) -> str:
    """Find a split in a name without its suffix, such as `captions_val2017`; "" if there is none."""
    found = _SPLIT_IN_NAME.search(name.lower())
    return found[1] if found else ""


def split_from_path(file: Path, root: str | os.PathLike[str] = "") -> str:
    """Find a split in the name of an annotation file, or of its folder if that is below `root`; "" if there is none."""
    folder = file.parent.name.lower()
    is_below = bool(root) and os.path.abspath(file.parent).startswith(os.path.join(os.path.abspath(root), ""))
    return split_from_name(file.stem) or (folder if is_below and folder in SPLITS else "")


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """Find files in a folder and the folders directly below it, in alphabetical order."""
    found = {path for pattern in patterns for deep in (pattern, f"*/{pattern}") for path in folder.glob(deep)}
    return sorted(path for path in found if not any(map(is_hidden, path.relative_to(folder).parts)))


def is_hidden(name: str) -> bool:
    """Tell names that a file system keeps for itself."""
    return name.startswith(".") or name == "__MACOSX"


def is_image_name(text: str) -> bool:
    """Tell whether a text looks like the name of a picture; `0.jpg#3` is its fourth caption, as in Flickr8k."""
    if len(text) > 1000 or "\n" in text:
        return False
    return os.path.splitext(re.sub(r"#\d+$", "", text))[1].lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)


def read_head(file: Path) -> str:
    """Read enough of a file to recognise its layout; "" if it is no text or may not be read."""
    try:
        with open_text(file) as handle:
            return handle.read(65536).lstrip()
    except (ValueError, PermissionError):
        return ""


def walk(folder: Path, leave_out: Callable[[str, Path], None] = lambda reason, path: None) -> Iterator[Path]:
    """List files, those of a folder before its folders, in alphabetical order; each folder once, linked ones too.

    Links to a folder around them or to a folder that is listed anyway are not followed. Folders of thumbnails and
    galleries are left out: `leave_out` is called with the reason and the path of each folder that is not listed.

    Raises:
        OSError: when `folder` itself cannot be listed.
    """
    root, seen, waiting = os.path.realpath(folder), set[str](), [folder]
    while waiting:
        parent = waiting.pop()
        if (real := os.path.realpath(parent)) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError:
            if parent is folder:
                raise
            leave_out(UNLISTED, parent)
            continue
        # A gallery of the former format, whose thumbnails are no photos; a `gallery.db` has no such files.
        if parent is not folder and {"gallery.json", "pictures.jsonl"} <= {entry.name for entry in entries}:
            leave_out(_NO_PHOTOS, parent)
            continue
        folders = []
        for entry in entries:
            kind = "" if is_hidden(entry.name) else _classify(entry, root, real)
            if kind == "file":
                yield Path(entry.path)
            elif kind == "folder":
                folders.append(Path(entry.path))
            elif kind:
                leave_out(kind, Path(entry.path))
        waiting += reversed(folders)


def _classify(entry: os.DirEntry[str], root: str, parent: str) -> str:
    """Return "file", "folder", the reason why a folder is not listed, or "" for one that is listed anyway."""
    try:
        is_folder = entry.is_dir()
    except OSError as error:
        return _PARENT_LINK if error.errno == errno.ELOOP else UNLISTED
    if not is_folder:  # a broken link without a suffix is taken for a folder on a disk that is not mounted
        is_lost = entry.is_symlink() and not os.path.splitext(entry.name)[1] and not os.path.exists(entry.path)
        return UNLISTED if is_lost else "file"
    if entry.name.casefold() in _SYSTEM_FOLDERS:
        return _NO_PHOTOS
    if not entry.is_symlink():
        return "folder"
    target = Path(os.path.realpath(entry.path))
    if any(Path(place).is_relative_to(target) for place in (root, parent)):
        return _PARENT_LINK
    is_listed = target.is_relative_to(root) and not any(map(is_hidden, target.relative_to(root).parts))
    return "" if is_listed else "folder"


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

    def find(self, name: str, split: str = "", folder: str = "") -> tuple[tuple[str, ...], bool]:
        """Find the pictures whose path ends in a name, and tell whether they do only if case is ignored.

        The name has forward slashes, its folders as far as they are given, and a picture's suffix or none. Of several
        pictures those of the annotation's `split` (canonical), then those below its `folder` take precedence.
        """
        name = nfc(os.path.normpath(name).replace(os.sep, "/"))
        base = name.rpartition("/")[2]
        same_base = self._groups["folded"].get(base.casefold(), [])
        folded = [path for path in same_base if self._relative(path).casefold().endswith(f"/{name}".casefold())]
        paths = [path for path in folded if self._relative(path).endswith(f"/{name}")]
        if not paths and os.path.splitext(base)[1].lower() not in IMAGE_SUFFIXES:
            paths = self._find_stem(name)
        return self._decide(paths or folded, split, folder), bool(folded and not paths)

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
