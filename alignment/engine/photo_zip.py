"""Export a visitor's photos as a zip, and add photos from such a zip, without embedding, or from any zip of pictures.

Place in the flow: `photos -> export_zip -> zip`, and `zip -> open_archive -> add_archive -> photos`. The zip holds
JSON, safetensors and WebP files; an uploaded file is never opened as SQLite. `python app.py --gallery FOLDER` opens the
unpacked folder as a gallery of the format before `gallery.db`.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from alignment.engine.core import MAX_PHOTOS, AlignmentEngine, Photos, Skipped, as_webp
from alignment.engine.safe_zip import MAX_PICTURE_MB, SafeZip, open_archive
from alignment.gallery import THUMBNAIL_PIXELS, Picture
from alignment.model import DualEncoder, chunk_size
from alignment.preprocess import InputError, open_image, sanitize_text

ALBUM = "my_photos"  # name of the exported zip and of the folder in it
AT_ONCE = 4  # pictures between two signs of progress

_STAMP, _PICTURES, _EMBEDDINGS = "gallery.json", "pictures.jsonl", "embeddings.safetensors"
_TEXT_MB, _EMBEDDINGS_MB, _THUMBNAIL_MB = 2, 80, 1
_THUMBNAIL_SIDE = 4 * THUMBNAIL_PIXELS
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_NAME = 150  # characters


@dataclass(frozen=True)
class Added:
    """A step of `add_archive`: all photos so far, files that the step left out, and the pictures of the archive."""

    photos: Photos
    skipped: list[Skipped]
    done: int
    total: int


def export_zip(photos: Photos, encoder: DualEncoder) -> bytes:
    """Pack photos into a zip, without any path of this machine."""
    gallery = photos.gallery
    lines = [json.dumps(_line(picture), ensure_ascii=False) for picture in gallery.pictures]
    name = Path(encoder.name).name if Path(encoder.name).is_absolute() else encoder.name
    built = datetime.now(UTC).isoformat(timespec="seconds")
    header = asdict(replace(gallery.metadata, model=name, source="", options="", built=built))
    cohort = gallery.judge.cohort.tensors() if gallery.judge else {}
    tensors = {f"background.{name}": embeds for name, embeds in cohort.items()}
    tensors |= {"image_embeds": gallery.images.embeds, "text_embeds": torch.empty(0, encoder.embed_dim)}
    halves = {name: embeds.half().contiguous() for name, embeds in tensors.items()}
    files: dict[str, str | bytes] = {
        _STAMP: json.dumps(header, ensure_ascii=False, indent=2) + "\n",
        _PICTURES: "".join(f"{line}\n" for line in lines),
        "captions.jsonl": "",
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


def add_archive(engine: AlignmentEngine, photos: Photos, path: Path, *, limit: int = MAX_PHOTOS) -> Iterator[Added]:
    """Add the photos of an exported zip or of any zip of pictures, up to a limit; yields after each few.

    Raises InputError when it cannot be opened, holds no picture, or was exported with another model.
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
    """Read the pictures of an export in a folder of a zip, and their embeddings, (num_pictures, embed_dim)."""
    with _malformed_is_damaged(_STAMP):
        stamp = json.loads(_read(archive, folder + _STAMP, _TEXT_MB))
        fingerprint, model = stamp["fingerprint"], sanitize_text(str(stamp.get("model", "")), _MAX_NAME) or "?"
        if not isinstance(fingerprint, str):
            raise TypeError(fingerprint)
    if fingerprint != encoder.fingerprint:
        message = "These photos were embedded by the model {theirs}, but the one in use here is {ours}."
        raise InputError(message, "album.model", theirs=model, ours=Path(encoder.name).name)
    with _malformed_is_damaged(_PICTURES):
        lines = _read(archive, folder + _PICTURES, _TEXT_MB).splitlines()
        pictures = [_picture(line) for line in lines[: MAX_PHOTOS + 1]]
        if len(pictures) > MAX_PHOTOS:
            raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=MAX_PHOTOS)
        if not pictures or len({picture.id for picture in pictures}) < len(pictures):
            raise ValueError("no pictures, or one of them twice")
    with _malformed_is_damaged(_EMBEDDINGS):
        embeds = load(_read(archive, folder + _EMBEDDINGS, _EMBEDDINGS_MB))["image_embeds"]
        if not embeds.is_floating_point() or tuple(embeds.shape) != (len(pictures), encoder.embed_dim):
            raise ValueError(f"embeddings of the type {embeds.dtype} and the shape {tuple(embeds.shape)}")
        lengths = embeds.float().norm(dim=-1)
        if not ((lengths > 0.9) & (lengths < 1.1)).all():  # NaN is neither
            raise ValueError("embeddings that are not of unit norm")
    return pictures, embeds.float()


def _read(archive: SafeZip, name: str, limit_mb: float) -> bytes:
    if name not in archive.members:
        message = "The album lacks the file {file}; take the zip as it was downloaded."
        raise InputError(message, "album.missing", file=name.rpartition("/")[2])
    return archive.read(name, limit_mb)


def _picture(line: bytes) -> Picture:
    record = json.loads(line)
    id, source = record["id"], record["source"]
    if not _ID.fullmatch(id) or not isinstance(source, str):
        raise ValueError(record)
    return Picture(id, _plain(sanitize_text(source, _MAX_NAME)))


def _thumbnail(archive: SafeZip, name: str) -> bytes:
    """Read a thumbnail as an untrusted upload, and encode its pixels anew."""
    data = _read(archive, name, _THUMBNAIL_MB)
    with _malformed_is_damaged("thumbnails"), Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        if max(image.size) > _THUMBNAIL_SIDE:
            raise ValueError(f"a thumbnail of {image.size} pixels")
    return as_webp(open_image(data))


@contextmanager
def _malformed_is_damaged(file: str) -> Iterator[None]:
    """Turn any exception of a parser, of which hostile bytes cause all kinds, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = "The album is damaged or not one of ours ({file}); take the zip as it was downloaded."
        raise InputError(message, "album.damaged", file=file) from error
