"""Export a visitor's photos as a zip, and add photos from such a zip, without embedding, or from any zip of pictures.

Place in the flow: `photos -> export_zip -> zip`, and `zip -> open_archive -> add_archive -> photos`. The zip holds
JSON, safetensors and WebP files; an uploaded file is never opened as SQLite. `python app.py --gallery FOLDER` opens the
unpacked folder as a gallery of the format before `gallery.db`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from alignment.engine.core import AlignmentEngine
from alignment.engine.photos import MAX_PHOTOS, Photos, Skipped, as_webp
from alignment.engine.safe_zip import MAX_PICTURE_MB, SafeZip, open_archive
from alignment.gallery import THUMBNAIL_PIXELS, Picture
from alignment.model import DualEncoder, chunk_size
from alignment.preprocess import InputError, open_image, sanitize_text

ALBUM = "my_photos"
"""Name of the exported zip and of the folder in it."""

AT_ONCE = 4  # pictures between two signs of progress

_STAMP, _PICTURES, _CAPTIONS = "gallery.json", "pictures.jsonl", "captions.jsonl"
_EMBEDDINGS = "embeddings.safetensors"
_TEXT_MB, _EMBEDDINGS_MB, _THUMBNAIL_MB = 2, 80, 1
_THUMBNAIL_SIDE = 4 * THUMBNAIL_PIXELS
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_NAME = 150  # characters


@dataclass(frozen=True)
class Added:
    """A step of `add_archive`.

    Attributes:
        photos: all so far.
        skipped: files that the step left out.
        done, total: number of pictures in the archive.
    """

    photos: Photos
    skipped: list[Skipped]
    done: int
    total: int


# ---------------------------------------------------------------- export


def export_zip(photos: Photos, encoder: DualEncoder) -> bytes:
    """Pack photos into a zip, without any path of this machine."""
    gallery = photos.gallery
    lines = [json.dumps(_line(picture), ensure_ascii=False) for picture in gallery.pictures]
    name = Path(encoder.name).name if Path(encoder.name).is_absolute() else encoder.name
    built = datetime.now(UTC).isoformat(timespec="seconds")
    header = asdict(replace(gallery.metadata, model=name, source="", options="", built=built))
    cohort = gallery.judge.cohort.tensors() if gallery.judge else {}
    tensors = {f"background.{name}": embeds for name, embeds in cohort.items()}
    tensors |= {"image_embeds": gallery.image_embeds, "text_embeds": torch.empty(0, encoder.embed_dim)}
    halves = {name: embeds.half().contiguous() for name, embeds in tensors.items()}
    files: dict[str, str | bytes] = {
        _STAMP: json.dumps(header, ensure_ascii=False, indent=2) + "\n",
        _PICTURES: "".join(f"{line}\n" for line in lines),
        _CAPTIONS: "",
        _EMBEDDINGS: save(halves, {"build": _checksums(header, lines, halves)}),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in files.items():
            file.writestr(f"{ALBUM}/{name}", data, zipfile.ZIP_DEFLATED)
        for picture in gallery.pictures:  # stored: WebP does not shrink
            file.writestr(f"{ALBUM}/thumbnails/{picture.id}.webp", photos.thumbnails[picture.id])
    return buffer.getvalue()


def _line(picture: Picture) -> dict[str, Any]:
    """Return the JSON object of a picture; its source becomes a plain file name, empty values are left out."""
    line = {"id": picture.id, "source": _plain(picture.source), "captions": dict(picture.captions)}
    return {key: value for key, value in (line | {"credit": picture.credit}).items() if value}


def _checksums(header: Mapping[str, Any], lines: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """Hash the records, and the metadata with every bit of the embeddings, as readers of the file format expect."""
    records = "\n\n".join([header["fingerprint"], "\n".join(lines), ""])
    content = hashlib.sha256(json.dumps(header, sort_keys=True).encode("utf-8", "surrogateescape"))
    for name, embeds in sorted(tensors.items()):
        content.update(f"{name} {embeds.dtype} {tuple(embeds.shape)}\n".encode())
        content.update(embeds.view(torch.uint8).numpy().data)
    return f"{hashlib.sha256(records.encode('utf-8', 'surrogateescape')).hexdigest()} {content.hexdigest()}"


def _plain(name: str) -> str:
    """Reduce the name of an uploaded file to a file name without folders."""
    name = name.replace("\\", "/").rpartition("/")[2].replace(":", "_")
    return name[:_MAX_NAME] or "?"


# ---------------------------------------------------------------- import


def add_archive(engine: AlignmentEngine, photos: Photos, path: Path, *, limit: int = MAX_PHOTOS) -> Iterator[Added]:
    """Add the photos of an exported zip or of any zip of pictures, up to a limit; yields after each few.

    Raises:
        InputError: when it cannot be opened, holds no picture, or was exported with another model.
    """
    with open_archive(path) as archive:
        found = [name for name in archive.members if name.rpartition("/")[2] == _STAMP and name.count("/") <= 1]
        if len(found) == 1:
            yield from _add_album(engine, photos, archive, found[0].removesuffix(_STAMP), limit)
        else:
            yield from _add_pictures(engine, photos, archive, limit)


def _add_pictures(engine: AlignmentEngine, photos: Photos, archive: SafeZip, limit: int) -> Iterator[Added]:
    names, step = archive.pictures(), chunk_size(AT_ONCE)
    for start in range(0, len(names), step):
        files: list[tuple[str, bytes]] = []
        skipped: list[Skipped] = []
        for name in names[start : start + step]:
            try:
                files.append((_plain(name), archive.read(name, MAX_PICTURE_MB)))
            except InputError as error:
                skipped.append(Skipped(name, error))
        photos, bad = engine.add_photos(photos, files, limit=limit)
        yield Added(photos, skipped + bad, min(start + step, len(names)), len(names))


def _add_album(engine: AlignmentEngine, photos: Photos, archive: SafeZip, folder: str, limit: int) -> Iterator[Added]:
    pictures, embeds = _read_album(archive, folder, engine.encoder)
    step = 4 * AT_ONCE  # reading thumbnails is fast
    for start in range(0, len(pictures), step):
        rows: list[int] = []
        thumbnails: dict[str, bytes] = {}
        skipped: list[Skipped] = []
        for row, picture in enumerate(pictures[start : start + step], start):
            try:
                photos.check_room(picture.id, thumbnails, limit)
                thumbnails[picture.id] = _thumbnail(archive, f"{folder}thumbnails/{picture.id}.webp")
                rows.append(row)
            except InputError as error:
                skipped.append(Skipped(picture.source, error))
        if rows:
            photos = engine.add_embedded(photos, [pictures[row] for row in rows], embeds[rows], thumbnails)
        yield Added(photos, skipped, min(start + step, len(pictures)), len(pictures))


def _read_album(archive: SafeZip, folder: str, encoder: DualEncoder) -> tuple[list[Picture], Tensor]:
    """Read the pictures of an exported zip, with plain file names, and their embeddings, (num_pictures, embed_dim).

    Args:
        archive: the open zip.
        folder: of the export in it, "" or "name/".
        encoder: the model in use; embeddings of another model are refused.

    Raises:
        InputError: when a file is missing, malformed, or made by another model.
    """
    stamp = _json(_read(archive, folder + _STAMP, _TEXT_MB))
    if not isinstance(stamp, dict) or not isinstance(stamp.get("fingerprint"), str):
        raise _corrupt(_STAMP)
    if stamp["fingerprint"] != encoder.fingerprint:
        theirs = sanitize_text(str(stamp.get("model", "")), _MAX_NAME) or "?"
        message = "These photos were embedded by the model {theirs}, but the one in use here is {ours}."
        raise InputError(message, "album.model", theirs=theirs, ours=Path(encoder.name).name)
    lines = _read(archive, folder + _PICTURES, _TEXT_MB).splitlines()
    pictures = [_picture(_json(line)) for line in lines[: MAX_PHOTOS + 1]]
    if len(pictures) > MAX_PHOTOS:
        raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=MAX_PHOTOS)
    if not pictures or len({picture.id for picture in pictures}) < len(pictures):
        raise _corrupt(_PICTURES)
    return pictures, _embeddings(_read(archive, folder + _EMBEDDINGS, _EMBEDDINGS_MB), len(pictures), encoder)


def _read(archive: SafeZip, name: str, limit_mb: float) -> bytes:
    if name not in archive.members:
        message = "The album lacks the file {file}; take the zip as it was downloaded."
        raise InputError(message, "album.missing", file=name.rpartition("/")[2])
    return archive.read(name, limit_mb)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _corrupt("JSON") from error


def _picture(line: Any) -> Picture:
    """Read the id and the file name of a picture."""
    id, source = (line.get("id"), line.get("source")) if isinstance(line, dict) else (None, None)
    if not isinstance(id, str) or not _ID.fullmatch(id) or not isinstance(source, str):
        raise _corrupt(_PICTURES)
    return Picture(id, _plain(sanitize_text(source, _MAX_NAME)))


def _embeddings(data: bytes, count: int, encoder: DualEncoder) -> Tensor:
    try:
        embeds = load(data)["image_embeds"]
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _corrupt(_EMBEDDINGS) from error
    if not embeds.is_floating_point() or tuple(embeds.shape) != (count, encoder.embed_dim):
        raise _corrupt(_EMBEDDINGS)
    lengths = embeds.float().norm(dim=-1)
    if not ((lengths > 0.9) & (lengths < 1.1)).all():  # no NaN passes
        raise _corrupt(_EMBEDDINGS)
    return embeds.float()


def _thumbnail(archive: SafeZip, name: str) -> bytes:
    """Read a thumbnail as an untrusted upload, and encode its pixels anew."""
    data = _read(archive, name, _THUMBNAIL_MB)
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            is_large = max(image.size) > _THUMBNAIL_SIDE
    except Exception as error:  # decoders raise any exception on malformed bytes
        raise _corrupt("thumbnails") from error
    if is_large:
        raise _corrupt("thumbnails")
    return as_webp(open_image(data))


def _corrupt(file: str) -> InputError:
    message = "The album is damaged or not one of ours ({file}); take the zip as it was downloaded."
    return InputError(message, "album.damaged", file=file)
