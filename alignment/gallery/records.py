"""Records of a gallery: pictures, captions, the metadata of the build, and how they are listed from a source.

Place in the flow: `data set or hand-written list -> records (here) -> embeddings (build) -> gallery.db (database)`.
"""

import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.bundled import PACKAGE, installed_file
from alignment.preprocess import InputError, clean_caption

PICTURES, CAPTIONS = "pictures.jsonl", "captions.jsonl"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
_HAN, _KANA_OR_HANGUL = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")


@dataclass(frozen=True)
class FileFingerprint:
    """State of a file when it was embedded; `mtime_ns` is 0 for files of an installed package."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Picture:
    """A picture that can be found."""

    id: str  # its public name, unique in a gallery
    source: str  # "relative/path.jpg" below `root`, an absolute path, or "package:NAME/PATH" in an installed package
    captions: Mapping[str, str] = field(default_factory=dict, hash=False)  # language -> text, "" for an unknown one
    credit: str = ""  # author and licence
    root: str = field(default="", compare=False)
    file: FileFingerprint | None = field(default=None, compare=False, repr=False)  # as it was embedded; None before

    @property
    def package(self) -> str:
        """Name of the installed package it belongs to; "" for the user's own pictures."""
        return self.source.removeprefix(PACKAGE).split("/")[0] if self.source.startswith(PACKAGE) else ""

    @property
    def path(self) -> Path:
        """Path of the file on this machine; FileNotFoundError when its package is not installed."""
        return installed_file(self.source) if self.package else Path(self.root, self.source)

    @property
    def exists(self) -> bool:
        """Whether the file is on this machine."""
        with suppress(FileNotFoundError):  # its package is not installed
            return self.path.is_file()
        return False

    def caption(self, lang: str = "en") -> str:
        """Return its caption in this language, else in any other, else ""."""
        return self.captions.get(lang) or next(iter(self.captions.values()), "")


@dataclass(frozen=True)
class Caption:
    """A caption that can be found."""

    id: str  # its public name, unique in a gallery
    text: str
    lang: str = ""  # "en", "zh", ... or "" for unknown
    scene: str = ""  # shared by captions of the same scene, such as its two languages; the picture's id if there is one
    topic: str = ""  # category of the scene
    # texts of the scene in all its languages, whose mean embedding it has; empty where the text is embedded alone
    translations: tuple[str, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class GalleryMetadata:
    """Which model made a gallery, from what, and when."""

    fingerprint: str  # of the model's weights
    model: str  # folder or Hub id that the model was loaded from
    logit_scale: float  # already exponentiated
    logit_bias: float | None  # None for a softmax model
    source: str = ""  # the absolute path or the Hub id it was built from
    options: str = ""  # of the command that built it, beside source, folder and model
    num_pictures: int = 0
    num_captions: int = 0
    built: str = ""  # UTC, ISO 8601
    calibration: Mapping[str, Any] | None = field(default=None, hash=False)  # see `Calibration.to_dict`
    judged_by: str = ""  # what the calibration was fitted on, and the name of its cohort


def rebuild_command(folder: Path, model: str, metadata: GalleryMetadata | None = None) -> str:
    """Return the command that rebuilds the gallery in a folder for a model, as far as its metadata says."""
    source, options = (metadata.source or "SOURCE", shlex.split(metadata.options)) if metadata else ("SOURCE", [])
    if os.path.isabs(source) and Path(source).is_relative_to(Path.cwd()):
        source = os.path.relpath(source)
    words = ["python", "-m", "alignment.gallery", "build", source, "--out", str(folder), "--model", model]
    return shlex.join(words + options)


def item_ids(items: Iterable[Picture | Caption]) -> Tensor:
    """Compute the ids of items in indexes: (n,) int64, not negative, one for each item, from names and content.

    The chance of a collision among a million items is one in twenty million.
    """
    seen, ids = Counter[str](), list[int]()
    for item in items:
        about = item.lang if isinstance(item, Caption) else item.source
        content = item.text if isinstance(item, Caption) else item.file.sha256 if item.file else ""
        text = f"{item.id}\0{about}\0{content}"
        seen[text] += 1
        digest = hashlib.blake2b(f"{seen[text]}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        ids.append(int.from_bytes(digest, "big") >> 1)
    return torch.tensor(ids, dtype=torch.int64)


def folder_of(source: str) -> str:
    """Return the folder of a picture, relative to the source of the gallery; "" for packages and absolute paths."""
    return "" if os.path.isabs(source) or source.startswith(PACKAGE) else source.rpartition("/")[0]


def tags_of(item: Picture | Caption) -> list[str]:
    """List the folders around a picture, "a" and "a/b" of "a/b/c.jpg", or the language of a caption."""
    if isinstance(item, Caption):
        return [item.lang]
    names = folder_of(item.source).split("/")
    return ["/".join(names[:end]) for end in range(1, len(names) + 1) if names[0]]


def read_captioned(images: Iterable[tuple[str, Sequence[str]]], root: str = "") -> tuple[list[Picture], list[Caption]]:
    """List a data set, given as (absolute path of an image, its captions).

    Pictures below the folder `root` are named relative to it, so that the two may move together.
    """
    pictures, captions = list[Picture](), list[Caption]()
    for path, texts in images:
        source = os.path.relpath(path, root).replace(os.sep, "/") if root and Path(path).is_relative_to(root) else path
        scene = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        own = [Caption(f"{scene}.{row}", text, language_of(text), scene) for row, text in enumerate(texts)]
        first = {caption.lang: caption.text for caption in reversed(own)}
        pictures.append(Picture(scene, source, first, root=root))
        captions += own
    return pictures, captions


def language_of(text: str) -> str:
    """Return "zh" for Chinese and "" for anything else; Han characters beside kana or hangul are not Chinese."""
    return "zh" if _HAN.search(text) and not _KANA_OR_HANGUL.search(text) else ""


def is_hand_written(folder: Path) -> bool:
    """Whether `read_hand_written` reads this folder; `captions.jsonl` may also be the table of a captioned data set."""
    own = ((PICTURES, "source"), (CAPTIONS, "topic"))
    return any(key in next(_lines(folder / name), ("", {}))[1] for name, key in own)


def read_hand_written(folder: Path) -> tuple[list[Picture], list[Caption]]:
    """Read `pictures.jsonl`, `captions.jsonl` or both; the pictures' captions are candidates as well.

    A scene in several languages has one embedding, so that a picture finds the same scenes in each of them; pictures'
    captions, which evaluate a language, have their own.

    A picture's line: {"id": "cat", "source": "package:skimage/data/chelsea.png", "en": "A tabby cat.", "credit": ""};
    a scene's: {"id": "pets-01", "topic": "pets", "en": "A cat sleeps.", "zh": "..."}. Every other key is a language.

    Raises:
        ValueError: naming file and line, when a line is not of this form.
    """
    listed = _entries(folder / PICTURES, "id", "source", "credit")
    pictures = [Picture(id, source, own, credit, os.path.abspath(folder)) for (id, source, credit), own in listed]
    entries = _entries(folder / CAPTIONS, "id", "topic")
    scenes = [(id, topic, own, tuple(own.values())) for (id, topic), own in entries]
    scenes += [(picture.id, "", dict(picture.captions), ()) for picture in pictures]
    captions = [
        Caption(f"{scene}.{lang}", text, lang, scene, topic, translations)
        for scene, topic, texts, translations in scenes
        for lang, text in texts.items()
    ]
    for ids in ([picture.id for picture in pictures], [caption.id for caption in captions]):
        if twice := [name for name, count in Counter(ids).items() if count > 1]:
            raise ValueError(f"{folder} uses an id more than once: {', '.join(twice[:5])}.")
    return pictures, captions


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file, which may be missing, each with its place for error messages."""
    for number, text in enumerate(path.read_text("utf-8").split("\n") if os.path.isfile(path) else [], 1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(line, dict):
            raise ValueError(f'{where} must be an object like {{"id": ...}}.')
        if line:
            yield where, line


def _entries(path: Path, *fields: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield of each line the values of these fields and the captions: every other key has to be a language."""
    for where, line in _lines(path):
        values, texts = [line.pop(key, "") for key in fields], dict[str, str]()
        for key, value in [*zip(fields, values, strict=True), *line.items()]:
            if not isinstance(value, str) or (not value and key in ("id", "source")):
                raise ValueError(f'{where} needs a text for "{key}".')
        if not _ID.fullmatch(values[0]):
            raise ValueError(f"{where}: the id {values[0]!r} may only hold letters, digits, '.', '_' and '-'.")
        for key, text in line.items():
            if not _LANGUAGE.fullmatch(key):
                raise ValueError(f'{where}: "{key}" is neither {", ".join(fields)} nor a language such as "en".')
            try:
                texts[key] = clean_caption(text)
            except InputError as error:
                raise ValueError(f'{where}, "{key}": {error}') from error
        yield values, texts
