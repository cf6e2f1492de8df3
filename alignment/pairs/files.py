"""Where the files of a data set lie, and what their names and first bytes say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
OTHER_PICTURES = {".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw"}
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("dev", "val", "valid", "validation"), "dev")

_SPLIT_IN_NAME = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
# Folders that hold only annotations; the data set, pictures and all, is the folder around them.
_ANNOTATION_FOLDERS = {"annotations", "flickr8k_text", "karpathy", "caption_datasets"}


def canonical(split: str) -> str:
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


def walk(folder: Path) -> Iterator[Path]:
    """List files in alphabetical order, through linked folders too, but each folder once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(parent, name) for name in sorted(files) if not is_hidden(name))


def begins(file: Path) -> str:
    """Read enough of a file to tell one layout from another."""
    with file.open(encoding="utf-8-sig", errors="replace") as handle:
        return handle.read(65536).lstrip()


def split_of(file: Path) -> str:
    """Read the split off a name such as `captions_val2017.json` or `train.csv`; "" if there is none in it."""
    found = _SPLIT_IN_NAME.search(file.stem.lower())
    return found[1] if found else ""
