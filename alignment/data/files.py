"""Where the files of a data set lie, and what their names and first bytes say."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignment.data.encoding import open_text

OTHER_PICTURES = {".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw"}
ARCHIVES = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}
TEXTS = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".token", ".caption"}
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("dev", "val", "valid", "validation"), "dev")

UNLISTED = "folders that cannot be listed"
"""Reason to leave out a folder in which there may be pictures."""

_NO_PHOTOS = "folders of thumbnails, waste or galleries"
_AROUND = "links to a folder around them"
# Names, in small letters, that storage servers and systems give: thumbnails, waste, snapshots.
_OF_OTHER_PROGRAMS = {"@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "#snapshot", "@recently-snapshot"}
_OF_OTHER_PROGRAMS |= {"lost+found", "system volume information"}

_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
# Folders that hold only annotations; the data set, pictures and all, is the folder around them.
_ANNOTATION_FOLDERS = {"annotations", "flickr8k_text", "karpathy", "caption_datasets"}


def canonical_split(split: str) -> str:
    """Bring the names of the usual splits together: train, dev and test."""
    split = split.strip().lower()
    return SPLITS.get(split, split)


def root_of(source: Path) -> Path:
    """Find the data set's folder: around an annotation file, and around a folder of nothing but annotations."""
    folder = Path(os.path.abspath(source if source.is_dir() else source.parent))
    return folder.parent if folder.name.lower() in _ANNOTATION_FOLDERS else folder


def near(folder: Path, *patterns: str) -> list[Path]:
    """Find files (or, by a pattern that ends in a slash, folders) up to two deep, in alphabetical order."""
    found = {path for pattern in patterns for deep in (pattern, f"*/{pattern}") for path in folder.glob(deep)}
    return sorted(path for path in found if not any(map(is_hidden, path.relative_to(folder).parts)))


def is_hidden(name: str) -> bool:
    """Tell what a file system keeps for itself."""
    return name.startswith(".") or name == "__MACOSX"


def walk(folder: Path, leave_out: Callable[[str, Path], None] = lambda reason, path: None) -> Iterator[Path]:
    """List files, those of a folder before its folders, in alphabetical order; each folder once, linked ones too.

    A link to a folder around it is not followed, nor one to what is listed anyway. Folders of thumbnails, and galleries
    of ours, are left out.

    Args:
        folder: where to begin.
        leave_out: called with reason and path of each folder that is not gone into; `UNLISTED` is one of the reasons.

    Raises:
        OSError: when `folder` itself cannot be listed.
    """
    source, seen, waiting = os.path.realpath(folder), set[str](), [folder]
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
        if parent is not folder and _is_gallery(entries):
            leave_out(_NO_PHOTOS, parent)
            continue
        shown = [entry for entry in entries if not is_hidden(entry.name)]
        kinds = [_kind_of(entry, source, real) for entry in shown]
        for entry, kind in zip(shown, kinds, strict=True):
            if kind == "file":
                yield Path(entry.path)
            elif kind not in ("folder", ""):
                leave_out(kind, Path(entry.path))
        waiting += [Path(e.path) for e, kind in zip(reversed(shown), reversed(kinds), strict=True) if kind == "folder"]


def _kind_of(entry: os.DirEntry[str], source: str, parent: str) -> str:
    """Tell what a name in a folder is: "file", "folder", the reason why it is not gone into, or "" for a double."""
    try:
        is_folder = entry.is_dir()
    except OSError as error:
        return _AROUND if error.errno == errno.ELOOP else UNLISTED
    if not is_folder:  # a link to a folder that is not there now, as of a disk that is not mounted, has no ending
        is_lost = entry.is_symlink() and not os.path.splitext(entry.name)[1] and not os.path.exists(entry.path)
        return UNLISTED if is_lost else "file"
    if entry.name.casefold() in _OF_OTHER_PROGRAMS:
        return _NO_PHOTOS
    if not entry.is_symlink():
        return "folder"
    target = os.path.realpath(entry.path)
    if any(Path(place).is_relative_to(target) for place in (source, parent)):
        return _AROUND
    inside = Path(target).is_relative_to(source) and not any(map(is_hidden, Path(target).relative_to(source).parts))
    return "" if inside else "folder"


def _is_gallery(entries: Sequence[os.DirEntry[str]]) -> bool:
    """Tell a gallery that `alignment.gallery` built, whose thumbnails are no photos."""
    return {"gallery.json", "pictures.jsonl"} <= {entry.name for entry in entries}


def begins(file: Path) -> str:
    """Read enough of a file to tell one layout from another; "" if it is no text or may not be read."""
    try:
        with open_text(file) as handle:
            return handle.read(65536).lstrip()
    except (ValueError, PermissionError):
        return ""


def split_of(file: Path, root: str | os.PathLike[str] = "") -> str:
    """Read the split off a name such as `captions_val2017.json` or `train.csv`; "" if there is none in it.

    Args:
        file: the annotations.
        root: the data set's folder; a folder below it that is named like a split says it too.
    """
    folder = file.parent.name.lower()
    is_below = bool(root) and os.path.abspath(file.parent).startswith(os.path.join(os.path.abspath(root), ""))
    return split_of_name(file.stem) or (folder if is_below and folder in SPLITS else "")


def split_of_name(name: str) -> str:
    """Read the split off a name without its ending; "" if there is none in it."""
    found = _SPLIT_IN_NAME.search(name.lower())
    return found[1] if found else ""
