"""Read the training data of the compact model: photographs with captions in English and in Chinese.

Place in the flow: the first step of `python -m alignment.compact`. A folder is Flickr8k in its usual layout, or holds
`captions.en.jsonl` and `captions.zh.jsonl` (one row a picture: `file_name`, `split`, `captions`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.data import Pair, read_data

LANGUAGES = ("en", "zh")
TABLES = {language: f"captions.{language}.jsonl" for language in LANGUAGES}
_FLICKR8K_CN = re.compile(r"^(?P<name>\S+?)#zh[a-z]*#\d+\s+(?P<caption>.*\S)\s*$")


@dataclass(frozen=True)
class Photo:
    """One photograph."""

    path: str
    source: str  # name of the folder it was read from
    split: str  # "train", "dev", or "" where the data set names none
    captions: Mapping[str, tuple[str, ...]]  # by language; a language may have none


def read_photos(folders: Iterable[Path], chinese: Path | None = None) -> list[Photo]:
    """Read the captioned photographs of several folders, the test splits left out, sorted by source and file name.

    The captions of `chinese`, in the format of Flickr8k-CN, are joined to the photographs by file name.

    Raises:
        FileNotFoundError: when a folder or file is missing.
        ValueError: when two folders have one name, no caption can be read, or a Chinese caption names no photograph.
    """
    folders = list(folders)
    if len({folder.name for folder in folders}) < len(folders):
        raise ValueError("Two of the data folders have the same name; the name tells the sources apart.")
    photos = [photo for folder in folders for photo in _read_folder(folder)]
    if chinese is not None:
        photos = _join_chinese(photos, read_flickr8k_cn(chinese), chinese)
    usable = [photo for photo in photos if photo.split != "test" and any(photo.captions.values())]
    return sorted(usable, key=lambda photo: (photo.source, Path(photo.path).name))


def _read_folder(folder: Path) -> list[Photo]:
    tables = {language: folder / name for language, name in TABLES.items() if (folder / name).is_file()}
    read = {language: read_data(path).pairs for language, path in (tables or {"en": folder}).items()}
    found: dict[str, dict[str, Pair]] = defaultdict(dict)
    for language, pairs in read.items():
        for pair in pairs:
            found[str(pair.image)][language] = pair
    return [
        Photo(
            path,
            folder.name,
            next(iter(pairs.values())).split,
            {language: tuple(pairs[language].captions) for language in LANGUAGES if language in pairs},
        )
        for path, pairs in found.items()
    ]


def read_flickr8k_cn(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the Chinese captions of Flickr8k (Li, Lan, Dong and Liu, 2016): file name -> captions.

    Raises:
        ValueError: when a line has another format; it is named by its number.
    """
    captions: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if match := _FLICKR8K_CN.match(line):
            captions[match["name"]] += (match["caption"],)
        elif line.strip():
            raise ValueError(f"{path}, line {number}: not of the form NAME#zhc#N caption.")
    return captions


def _join_chinese(photos: Sequence[Photo], chinese: Mapping[str, tuple[str, ...]], path: Path) -> list[Photo]:
    by_stem = {Path(name).stem: captions for name, captions in chinese.items()}
    if not by_stem.keys() & {Path(photo.path).stem for photo in photos}:
        raise ValueError(f"{path} names none of the photographs.")

    def joined(photo: Photo) -> Photo:
        more = photo.captions.get("zh", ()) + by_stem.get(Path(photo.path).stem, ())
        return replace(photo, captions={**photo.captions, "zh": more})

    return [joined(photo) for photo in photos]
