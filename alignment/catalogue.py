"""Floor 2, what a gallery holds: records of pictures and captions, where they come from and the folder they end up in.

Place in the flow: `data set or hand-written list -> records (here) -> embeddings (gallery) -> folder (here)`. No
picture is opened and nothing embedded here. A gallery folder holds

- `gallery.json`: the stamp;
- `pictures.jsonl` and `captions.jsonl`: one record a line;
- `embeddings.safetensors`: `image_embeds` and `text_embeds`, float16, a row for each line, and the `background`; of a
  gallery of many items one or both lie elsewhere, see `alignment.gallery.storage`;
- `thumbnails/ID.webp` of the pictures that are the user's own (`gallery` makes them).

The files of a new build are gathered in a folder, `.written`, which counts from the moment it is called so: what is in
it goes before what lies beside it, until all has been moved there. So whoever is killed, at whatever moment, leaves the
old gallery or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignment.atomic import TEMP_PREFIX, fsync_path, fsync_tree
from alignment.preprocess import InputError, clean_caption

Result = TypeVar("Result")

PICTURES, CAPTIONS = "pictures.jsonl", "captions.jsonl"
_STAMP, _EMBEDDINGS = "gallery.json", "embeddings.safetensors"
_READY = ".written"
_TRIES, _PAUSE = 20, 0.05  # while another process puts a build in place
_PACKAGE = "package:"
_BACKGROUND = "background."
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # it names the thumbnail
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
_HAN, _KANA_OR_HANGUL = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")


@dataclass(frozen=True)
class FileState:
    """How a file looked when it was embedded; `mtime_ns` is 0 where it says nothing (a package's own files)."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Picture:
    """One picture to be found.

    Attributes:
        id: names the thumbnail; unique in a gallery.
        source: "relative/path.jpg" below `root`, an absolute path, or "package:NAME/PATH" inside an installed package.
        captions: language -> text, "" for an unknown language; may be empty.
        credit: who made it and under which licence.
        root: the folder that a relative source lies below.
        file: what was embedded; None until then.
    """

    id: str
    source: str
    captions: Mapping[str, str] = field(default_factory=dict, hash=False)
    credit: str = ""
    root: str = field(default="", compare=False)
    file: FileState | None = field(default=None, compare=False, repr=False)

    @property
    def package(self) -> str:
        """Name of the installed package it belongs to; "" for the user's own pictures."""
        return self.source.removeprefix(_PACKAGE).split("/")[0] if self.source.startswith(_PACKAGE) else ""

    @property
    def path(self) -> Path:
        """Where the file lies on this machine; a package is found without importing it.

        Raises:
            FileNotFoundError: when the package is not installed.
        """
        if not self.package:
            return Path(self.root, self.source)
        spec = importlib.util.find_spec(self.package) if self.package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"The package {self.package} is not installed.")
        return Path(spec.submodule_search_locations[0], self.source.partition("/")[2])

    def caption(self, lang: str = "en") -> str:
        """Describe the picture in this language, in any other if there is none, else not at all ("")."""
        return self.captions.get(lang) or next(iter(self.captions.values()), "")


@dataclass(frozen=True)
class Caption:
    """One caption to be found.

    Attributes:
        id: unique in a gallery.
        text: the caption itself.
        lang: "en", "zh", ... or "" for unknown.
        scene: shared by the captions that describe the same, such as the two languages of one scene.
        topic: what kind of scene.
    """

    id: str
    text: str
    lang: str = ""
    scene: str = ""
    topic: str = ""


@dataclass(frozen=True)
class Stamp:
    """Which model made a gallery, from what, and when.

    Attributes:
        fingerprint: of the model's weights.
        model: what the model was loaded from.
        logit_scale: the model's, already exponentiated.
        logit_bias: the model's; None for a softmax model.
        source: the absolute path or the Hub id it was built from.
        options: of the command that built it, beside source, folder and model.
        num_pictures: rows of `image_embeds`.
        num_captions: rows of `text_embeds`.
        built: UTC, ISO 8601.
        calibration: of match probabilities, see `Calibration.to_dict`; None in galleries built without.
        judged_by: what the calibration was fitted on, and against which background.
    """

    fingerprint: str
    model: str
    logit_scale: float
    logit_bias: float | None
    source: str = ""
    options: str = ""
    num_pictures: int = 0
    num_captions: int = 0
    built: str = ""
    calibration: Mapping[str, Any] | None = field(default=None, hash=False)
    judged_by: str = ""


@dataclass(frozen=True)
class Catalogue:
    """All that a gallery folder holds but its thumbnails.

    Attributes:
        pictures: in the order of the rows of `image_embeds`.
        captions: in the order of the rows of `text_embeds`.
        image_embeds: (num_pictures, embed_dim); float16 on disk.
        text_embeds: (num_captions, embed_dim).
        stamp: the model they belong to.
        background: embeddings that tell accidents from matches, see `calibration.Background`; may be empty.
        elsewhere: which of `image_embeds` and `text_embeds` are not kept here, and empty.
    """

    pictures: Sequence[Picture]
    captions: Sequence[Caption]
    image_embeds: Tensor
    text_embeds: Tensor
    stamp: Stamp
    background: Mapping[str, Tensor] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()

    def lines(self) -> dict[str, list[str]]:
        """Lay the records out as the lines of their files."""
        records = {PICTURES: map(_picture_line, self.pictures), CAPTIONS: map(_caption_line, self.captions)}
        return {name: [json.dumps(line, ensure_ascii=False) for line in lines] for name, lines in records.items()}


# ---------------------------------------------------------------- captioned data sets


def read_captioned(images: Iterable[tuple[str, Sequence[str]]], root: str = "") -> tuple[list[Picture], list[Caption]]:
    """List a data set, given as image files with their captions.

    Args:
        images: (absolute path, captions), the captions clean; none for a folder of photos.
        root: pictures below this folder are named relative to it, so that the two may move together.
    """
    pictures: list[Picture] = []
    captions: list[Caption] = []
    for path, texts in images:
        source = os.path.relpath(path, root).replace(os.sep, "/") if root and Path(path).is_relative_to(root) else path
        scene = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        own = [Caption(f"{scene}.{row}", text, language_of(text), scene) for row, text in enumerate(texts)]
        first = {caption.lang: caption.text for caption in reversed(own)}
        pictures.append(Picture(scene, source, first, root=root))
        captions += own
    return pictures, captions


def language_of(text: str) -> str:
    """Tell Chinese ("zh") from what may be anything (""); Han characters next to kana or hangul are not Chinese."""
    return "zh" if _HAN.search(text) and not _KANA_OR_HANGUL.search(text) else ""


# ---------------------------------------------------------------- hand-written lists


def is_hand_written(folder: Path) -> bool:
    """Whether `read_hand_written` reads this folder; `captions.jsonl` may also be the table of a captioned data set."""
    for name, field_of_ours in ((PICTURES, "source"), (CAPTIONS, "topic")):
        if os.path.isfile(folder / name) and field_of_ours in next(_lines(folder / name), ("", {}))[1]:
            return True
    return False


def read_hand_written(folder: Path) -> tuple[list[Picture], list[Caption]]:
    """Read `pictures.jsonl`, `captions.jsonl` or both; the pictures' captions are candidates as well.

    A picture's line: {"id": "cat", "source": "package:skimage/data/chelsea.png", "en": "A tabby cat.", "credit": ""};
    a scene's: {"id": "pets-01", "topic": "pets", "en": "A cat sleeps.", "zh": "..."}. A key that is none of these names
    must be a language; any may be given, none has to be.

    Raises:
        ValueError: naming file and line, when a line is not of this form.
    """
    pictures: list[Picture] = []
    captions: list[Caption] = []
    for where, line in _lines(folder / PICTURES):
        source, credit = _string(line, "source", where), _string(line, "credit", where, "")
        texts = _texts(line, ("id", "source", "credit"), where)
        pictures.append(Picture(_id(line, where), source, texts, credit, root=os.path.abspath(folder)))
    for where, line in _lines(folder / CAPTIONS):
        scene, topic = _id(line, where), _string(line, "topic", where, "")
        captions += _scene(scene, _texts(line, ("id", "topic"), where), topic)
    for picture in pictures:
        captions += _scene(picture.id, picture.captions)
    for ids in ([picture.id for picture in pictures], [caption.id for caption in captions]):
        if twice := [name for name, count in Counter(ids).items() if count > 1]:
            raise ValueError(f"{folder} uses an id more than once: {', '.join(twice[:5])}.")
    return pictures, captions


def _scene(scene: str, texts: Mapping[str, str], topic: str = "") -> list[Caption]:
    return [Caption(f"{scene}.{lang}", text, lang, scene, topic) for lang, text in texts.items()]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file that need not be there, each with its place for complaints."""
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    for number, text in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(line, dict):
            raise ValueError(f'{where} must be an object like {{"id": ...}}.')
        if line:
            yield where, line


def _string(line: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = line.get(key, default)
    if not isinstance(value, str) or (default is None and not value):
        raise ValueError(f'{where} needs a text for "{key}".')
    return value


def _id(line: Mapping[str, Any], where: str) -> str:
    value = _string(line, "id", where)
    if not _ID.fullmatch(value):
        raise ValueError(f"{where}: the id {value!r} may only hold letters, digits, '.', '_' and '-'.")
    return value


def _texts(line: Mapping[str, Any], fields: Sequence[str], where: str) -> dict[str, str]:
    """Read a line's captions: every key that is no field has to be a language."""
    texts = {}
    for key in line:
        if key in fields:
            continue
        if not _LANGUAGE.fullmatch(key):
            raise ValueError(f'{where}: "{key}" is neither {", ".join(fields)} nor a language such as "en".')
        try:
            texts[key] = clean_caption(_string(line, key, where))
        except InputError as error:
            raise ValueError(f'{where}, "{key}": {error}') from error
    return texts


# ---------------------------------------------------------------- the gallery folder


def rebuild_command(folder: Path, model: str, stamp: Stamp | None = None) -> str:
    """Spell out what makes the gallery in a folder fit a model, as far as its stamp tells."""
    source = stamp.source if stamp and stamp.source else "SOURCE"
    if os.path.isabs(source) and Path(source).is_relative_to(Path.cwd()):
        source = os.path.relpath(source)
    words = ["python", "-m", "alignment.gallery", "build", source, "--out", str(folder), "--model", model]
    try:
        return shlex.join(words + shlex.split(stamp.options if stamp else ""))
    except ValueError:  # of a damaged stamp
        return shlex.join(words)


def read_catalogue(folder: Path, model: str) -> Catalogue:
    """Read a gallery folder, whichever model made it.

    Args:
        folder: with `gallery.json`.
        model: name of the one in use, for the advice in the errors.

    Raises:
        FileNotFoundError: when there is no gallery.
        PermissionError: when it may not be read.
        ValueError: when it is damaged, or its files are not of one build.
    """
    stamp = None
    try:
        header = json.loads(_opened(folder, _STAMP, lambda path: path.read_text("utf-8")))
        stamp = Stamp(**{**header, "source": _from_folder(folder, header["source"])})
        lines = {name: _opened(folder, name, _text_lines) for name in (PICTURES, CAPTIONS)}
        metadata, embeds = _opened(folder, _EMBEDDINGS, _tensors)
        build, *sealed = metadata.get("build", "").split() or [""]
        if build != _digest(stamp, lines):
            raise ValueError("its files are not of one build")
        if sealed and sealed[0] != _seal(header, embeds):
            raise ValueError("its content is not what was written")
        pictures = [_read_picture(json.loads(line), stamp.source) for line in lines[PICTURES]]
        captions = [Caption(**json.loads(line)) for line in lines[CAPTIONS]]
        elsewhere = tuple(sealed[1:])
        embeds |= {name: torch.empty(0, 0) for name in elsewhere}
        image_embeds, text_embeds = embeds.pop("image_embeds"), embeds.pop("text_embeds")
        background = {name.removeprefix(_BACKGROUND): part for name, part in embeds.items()}
        return Catalogue(pictures, captions, image_embeds, text_embeds, stamp, background, elsewhere)
    except PermissionError:  # not for a rebuild to mend
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and build_seen(folder) is None:
            raise FileNotFoundError(
                f"There is no gallery in {folder}. Build one: {rebuild_command(folder, model)}"
            ) from None
        raise ValueError(
            f"The gallery in {folder} is damaged ({error}). Rebuild it with: {rebuild_command(folder, model, stamp)}"
        ) from error


def settled(folder: Path, read: Callable[[], Result]) -> Result:
    """Read from a gallery folder; once more if another process put a new build in place meanwhile.

    Raises:
        ValueError: what `read` raises where that is not the reason.
    """
    for tries in reversed(range(_TRIES)):
        before = build_seen(folder)
        try:
            return read()
        except ValueError:
            if not tries or build_seen(folder) == before:
                raise
            time.sleep(_PAUSE)
    raise AssertionError


def build_seen(folder: Path) -> object:
    """Tell one build of a gallery from the next; None where there is none."""
    try:
        state = _opened(folder, _STAMP, Path.stat)
        return state.st_ino, state.st_mtime_ns
    except OSError:
        return None


def place_of(folder: Path, name: str) -> Path:
    """Say where a file of a gallery lies: with the build that is being put in place, else beside it."""
    ready = folder / _READY / name
    return ready if ready.exists() else folder / name


def _opened(folder: Path, name: str, read: Callable[[Path], Result]) -> Result:
    """Read such a file, also if it is moved just now."""
    try:
        return read(folder / _READY / name)
    except (FileNotFoundError, NotADirectoryError):
        return read(folder / name)


def _tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def write_catalogue(folder: Path, catalogue: Catalogue, more: Path | None = None) -> None:
    """Write the four files aside, then let all of them count at one stroke.

    Args:
        folder: new or old; nobody else writes to it, see `alignment.atomic.exclusive_lock`.
        catalogue: what to write.
        more: a folder in `folder`, of files that go with it and have the same places in there; it is moved.

    Raises:
        OSError: when there is no room, something is in the way, or nothing may be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_writing(folder)
    for name in (_EMBEDDINGS, PICTURES, CAPTIONS, _STAMP):
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    lines = catalogue.lines()
    header = {**asdict(catalogue.stamp), "source": _to_folder(folder, catalogue.stamp.source)}
    embeds = {"image_embeds": catalogue.image_embeds, "text_embeds": catalogue.text_embeds}
    embeds = {name: side for name, side in embeds.items() if name not in catalogue.elsewhere}
    embeds |= {_BACKGROUND + name: part for name, part in catalogue.background.items()}
    halves = {key: tensor.half().contiguous() for key, tensor in embeds.items()}
    # In one entry: several are written in any order, and the same gallery would be other bytes.
    metadata = {"build": " ".join((_digest(catalogue.stamp, lines), _seal(header, halves), *catalogue.elsewhere))}
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=folder) as name:
        aside = Path(name, "all")
        if more is None:
            aside.mkdir()
        else:
            os.rename(more, aside)
        for file, texts in {**lines, _STAMP: [json.dumps(header, ensure_ascii=False, indent=2)]}.items():
            # surrogateescape: the name of a file need not be UTF-8
            (aside / file).write_text("".join(f"{text}\n" for text in texts), "utf-8", "surrogateescape", newline="\n")
        (aside / _EMBEDDINGS).write_bytes(save(halves, metadata))
        fsync_tree(aside)
        os.rename(aside, folder / _READY)
    fsync_path(folder)
    finish_writing(folder)


def finish_writing(folder: Path) -> None:
    """Put the files of a build in their places, the stamp last; also those of somebody who was killed meanwhile."""
    ready = folder / _READY
    if not ready.is_dir():
        return
    for path in sorted(ready.rglob("*"), key=lambda path: path.name == _STAMP):
        if path.is_file():
            place = folder / path.relative_to(ready)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
    fsync_path(folder)
    shutil.rmtree(ready)


def _text_lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "surrogateescape").split("\n")[:-1]


def _digest(stamp: Stamp, lines: Mapping[str, Sequence[str]]) -> str:
    """Tie the embeddings to the model and to the lines that their rows belong to."""
    text = "\n\n".join([stamp.fingerprint, *("\n".join(lines[name]) for name in (PICTURES, CAPTIONS))])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _seal(header: Mapping[str, Any], embeds: Mapping[str, Tensor]) -> str:
    """Vouch for the stamp and for every bit of the embeddings."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode("utf-8", "surrogateescape"))
    for name in sorted(embeds):
        digest.update(f"{name} {embeds[name].dtype} {tuple(embeds[name].shape)}\n".encode())
        digest.update(embeds[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_folder(folder: Path, source: str) -> str:
    """Name a source beside, in or around the gallery relative to it: the two may move together."""
    here = Path(os.path.abspath(folder))
    if not os.path.isabs(source) or not Path(source).is_relative_to(here.parent):
        return source  # far away, or a Hub id
    return "./" + os.path.relpath(source, here).replace(os.sep, "/")


def _from_folder(folder: Path, source: str) -> str:
    """Undo `_to_folder`."""
    return os.path.abspath(folder / source) if source.startswith("./") else source


def _picture_line(picture: Picture) -> dict[str, Any]:
    """Lay a picture out as the object of its line; what is empty is left out."""
    captions, file = dict(picture.captions), asdict(picture.file) if picture.file else None
    line = {"id": picture.id, "source": picture.source, "captions": captions, "credit": picture.credit, "file": file}
    return {key: value for key, value in line.items() if value}


def _read_picture(line: Mapping[str, Any], root: str) -> Picture:
    """Undo `_picture_line`."""
    file = FileState(**line["file"]) if "file" in line else None
    return Picture(line["id"], line["source"], line.get("captions", {}), line.get("credit", ""), root, file)


def _caption_line(caption: Caption) -> dict[str, Any]:
    """Lay a caption out as the object of its line; what is empty is left out."""
    return {key: value for key, value in asdict(caption).items() if value}
