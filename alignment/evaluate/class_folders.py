"""Pictures in class folders, class names and templates, read from files.

Place in the flow: `folder of class folders -> read_class_folders (here) -> zero_shot`.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.data.files import UNLISTED, walk
from alignment.preprocess import IMAGE_SUFFIXES


@dataclass(frozen=True)
class LabelledImages:
    """Paths of pictures, the index of each one's class, and all names of each class."""

    images: Sequence[str]
    labels: Sequence[int]
    class_names: Sequence[Sequence[str]]


def read_class_folders(folder: Path, class_names: Path | None = None) -> LabelledImages:
    """Read a folder that holds a folder of pictures for each class.

    Args:
        folder: a folder in it is named like its class, with underscores for spaces.
        class_names: file with other names, see `read_class_names`; its classes are the candidates, also those without
            pictures, and every folder must be among them.

    Raises:
        FileNotFoundError: when there is no such folder or file.
        PermissionError: when a folder cannot be listed; accuracy on a part of a class would mislead.
        ValueError: when no class folder holds a picture, or the file does not name one of them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to classify.")
    found: dict[str, list[str]] = {}
    for path in walk(folder, _raise_unlisted):
        name, *below = path.relative_to(folder).parts
        if below and path.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(name, []).append(str(path))
    if not found:
        raise ValueError(f"{folder} has no folder with pictures in it; zero-shot classification needs one per class.")
    names = read_class_names(class_names) if class_names else {name: [name.replace("_", " ")] for name in found}
    unnamed = [name for name in found if name not in names]
    if unnamed:
        raise ValueError(f"{class_names} has no name for the folder {unnamed[0]} (and {len(unnamed) - 1} more).")
    images = [picture for pictures in found.values() for picture in pictures]
    index = {name: label for label, name in enumerate(names)}
    labels = [index[name] for name, pictures in found.items() for _ in pictures]
    return LabelledImages(images, labels, list(names.values()))


def _raise_unlisted(reason: str, folder: Path) -> None:
    if reason == UNLISTED:
        raise PermissionError(errno.EACCES, "its pictures cannot be listed", str(folder))


def read_class_names(file: Path) -> dict[str, list[str]]:
    """Read class names: JSON {folder: name or [names]}, or lines of folder and names separated by tabs.

    Raises FileNotFoundError, and ValueError when the file cannot be parsed or a class has no name.
    """
    text = _read(file)
    if file.suffix.lower() == ".json":
        try:
            content = json.loads(text)
            names = {folder: [name] if isinstance(name, str) else list(name) for folder, name in content.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is not a JSON object of class names by folder ({error}).") from error
    else:
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        names = {row[0].strip(): [name.strip() for name in row[1:] if name.strip()] for row in rows}
    for folder, given in names.items():
        if not given or not all(isinstance(name, str) and name.strip() for name in given):
            raise ValueError(f"{file} has no name for the class {folder!r}; write folder, tab, name.")
    return names


def read_templates(file: Path) -> list[str]:
    """Read templates, one per line; raises FileNotFoundError, and ValueError unless each has {} once for the name."""
    templates = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"{file} must hold a template a line, with {{}} once where the class name goes.")
    return templates


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text.") from error
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read ({error.strerror}).") from error
