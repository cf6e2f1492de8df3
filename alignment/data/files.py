"""Find the files of a data set, and read what their names and first bytes say."""

import errno
import os
import re
from collections.abc import Callable, Iterator
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
# Folders of annotations; the pictures are elsewhere below the folder around them.
_ANNOTATION_FOLDERS = {"annotations", "flickr8k_text", "karpathy", "caption_datasets"}


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


def dataset_root(source: Path) -> Path:
    """Return the data set's folder: that of an annotation file, or the one around a folder of annotations."""
    folder = Path(os.path.abspath(source if source.is_dir() else source.parent))
    return folder.parent if folder.name.lower() in _ANNOTATION_FOLDERS else folder


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
        if parent is not folder and _is_gallery({entry.name for entry in entries}):
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


def _is_gallery(names: set[str]) -> bool:
    """Recognise a gallery of this project, or one of its former format, whose thumbnails are no photos."""
    return "gallery.db" in names or {"gallery.json", "pictures.jsonl"} <= names
