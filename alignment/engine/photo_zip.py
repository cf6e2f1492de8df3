"""A visitor's photos as a zip: written, and read again without being embedded; or a zip of pictures.

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
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from alignment.engine.photos import MAX_PHOTOS, Photos, Skipped, as_webp
from alignment.engine.safe_zip import SafeZip, open_archive
from alignment.gallery import THUMBNAIL_PIXELS, Picture
from alignment.model import DualEncoder, chunk_size
from alignment.preprocess import InputError, open_image, sanitize_text

ALBUM = "my_photos"
"""Name of the zip and of the folder in it."""

MAX_PICTURE_MB = 30
AT_ONCE = 4  # pictures between two signs of progress

_STAMP, _PICTURES, _CAPTIONS = "gallery.json", "pictures.jsonl", "captions.jsonl"
_EMBEDDINGS = "embeddings.safetensors"
_TEXT_MB, _EMBEDDINGS_MB, _THUMBNAIL_MB = 2, 80, 1
_THUMBNAIL_SIDE = 4 * THUMBNAIL_PIXELS
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_WORDS = 150  # characters of a name


class Embedder(Protocol):
    """What is needed of `AlignmentEngine`."""

    encoder: DualEncoder

    def add_photos(
        self, photos: Photos, files: list[tuple[str, bytes]], *, limit: int = MAX_PHOTOS
    ) -> tuple[Photos, list[Skipped]]:
        """Embed more photos."""

    def add_embedded(
        self, photos: Photos, pictures: list[Picture], embeds: Tensor, thumbnails: Mapping[str, bytes]
    ) -> Photos:
        """Add photos that are embedded already."""


@dataclass(frozen=True)
class Added:
    """A step of `add_archive`.

    Attributes:
        photos: all so far.
        skipped: what the step left out.
        done: files of the archive that have been dealt with.
        total: files of the archive that concern us.
    """

    photos: Photos
    skipped: list[Skipped]
    done: int
    total: int


# ---------------------------------------------------------------- out


def export_zip(photos: Photos, encoder: DualEncoder) -> bytes:
    """Pack photos into a zip; nothing in it says where a file lies on this machine."""
    old, dim = photos.gallery, encoder.embed_dim
    lines = [json.dumps(_line(picture), ensure_ascii=False) for picture in old.pictures]
    metadata = replace(
        old.metadata,
        model=Path(encoder.name).name if Path(encoder.name).is_absolute() else encoder.name,
        source="",
        options="",
        built=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    header = asdict(metadata)
    cohort = old.judge.cohort.tensors() if old.judge else {}
    tensors = {f"background.{name}": embeds for name, embeds in cohort.items()}
    tensors |= {"image_embeds": old.image_embeds, "text_embeds": torch.empty(0, dim)}
    halves = {name: embeds.half().contiguous() for name, embeds in tensors.items()}
    build = f"{_digest_of_records(metadata.fingerprint, lines)} {_digest_of_content(header, halves)}"
    files: dict[str, str | bytes] = {
        _STAMP: json.dumps(header, ensure_ascii=False, indent=2) + "\n",
        _PICTURES: "".join(f"{line}\n" for line in lines),
        _CAPTIONS: "",
        _EMBEDDINGS: save(halves, {"build": build}),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(f"{ALBUM}/{name}", data, zipfile.ZIP_DEFLATED)
        for picture in old.pictures:
            thumbnail = zipfile.ZipInfo(f"{ALBUM}/thumbnails/{picture.id}.webp")  # stored: WebP does not shrink
            file.writestr(thumbnail, photos.thumbnails[picture.id])
    return buffer.getvalue()


def _line(picture: Picture) -> dict[str, Any]:
    """Lay a picture out as the object of its line; its source becomes a plain file name, empty values are left out."""
    line = {"id": picture.id, "source": _plain(picture.source), "captions": dict(picture.captions)}
    return {key: value for key, value in (line | {"credit": picture.credit}).items() if value}


def _digest_of_records(fingerprint: str, lines: Sequence[str]) -> str:
    """Hash the model's fingerprint and the pictures, as readers of the file format expect it."""
    return hashlib.sha256(
        "\n\n".join([fingerprint, "\n".join(lines), ""]).encode("utf-8", "surrogateescape")
    ).hexdigest()


def _digest_of_content(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash the metadata and every bit of the embeddings, as readers of the file format expect it."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode("utf-8", "surrogateescape"))
    for name, embeds in sorted(tensors.items()):
        digest.update(f"{name} {embeds.dtype} {tuple(embeds.shape)}\n".encode())
        digest.update(embeds.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(name: str) -> str:
    """Reduce what a page called a file to a name that leads nowhere."""
    name = name.replace("\\", "/").rpartition("/")[2].replace(":", "_")
    return name[:_MAX_WORDS] or "?"


# ---------------------------------------------------------------- in


def add_archive(engine: Embedder, photos: Photos, path: Path, *, limit: int = MAX_PHOTOS) -> Iterator[Added]:
    """Add the photos of a zip: an album that was downloaded here, or any zip of pictures.

    Yields:
        The photos after each few.

    Raises:
        InputError: when it cannot be opened, holds no picture, or is the album of another model.
    """
    with open_archive(path) as archive:
        folder = _album_folder(archive)
        if folder is None:
            yield from _add_pictures(engine, photos, archive, limit)
        else:
            yield from _add_album(engine, photos, archive, folder, limit)


def _add_pictures(engine: Embedder, photos: Photos, archive: SafeZip, limit: int) -> Iterator[Added]:
    names = archive.pictures()
    if not names:
        raise InputError("There is no picture in the zip file.", "zip.no_pictures")
    step = chunk_size(AT_ONCE)
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


def _add_album(engine: Embedder, photos: Photos, archive: SafeZip, folder: str, limit: int) -> Iterator[Added]:
    pictures, embeds = read_album(archive, folder, engine.encoder)
    step = 4 * AT_ONCE  # thumbnails are quick
    for start in range(0, len(pictures), step):
        rows: list[int] = []
        thumbnails: dict[str, bytes] = {}
        skipped: list[Skipped] = []
        for row, picture in enumerate(pictures[start : start + step], start):
            try:
                if picture.id in photos.thumbnails:
                    raise InputError("This picture is there already.", "photo.duplicate")
                if len(photos) + len(rows) >= limit:
                    raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=limit)
                thumbnails[picture.id] = _thumbnail(archive, f"{folder}thumbnails/{picture.id}.webp")
                rows.append(row)
            except InputError as error:
                skipped.append(Skipped(picture.source, error))
        if rows:
            photos = engine.add_embedded(photos, [pictures[row] for row in rows], embeds[rows], thumbnails)
        yield Added(photos, skipped, min(start + step, len(pictures)), len(pictures))


def _album_folder(archive: SafeZip) -> str | None:
    """Find the gallery in an archive: at its top, or in the one folder there."""
    found = [name for name in archive.members if name.rpartition("/")[2] == _STAMP and name.count("/") <= 1]
    return found[0].removesuffix(_STAMP) if len(found) == 1 else None


def read_album(archive: SafeZip, folder: str, encoder: DualEncoder) -> tuple[list[Picture], Tensor]:
    """Read the pictures of an album and their embeddings; thumbnails and everything else stay packed.

    Args:
        archive: the open zip.
        folder: where the album lies in it, "" or "name/".
        encoder: the model in use; no other model's embeddings are taken.

    Returns:
        The pictures, each named by a plain file name, and (num_pictures, embed_dim) float32.

    Raises:
        InputError: when a file is missing, not of this form, or made by another model.
    """
    stamp = _json(_read(archive, folder + _STAMP, _TEXT_MB))
    if not isinstance(stamp, dict) or not isinstance(stamp.get("fingerprint"), str):
        raise _corrupt(_STAMP)
    if stamp["fingerprint"] != encoder.fingerprint:
        theirs = sanitize_text(str(stamp.get("model", "")), _MAX_WORDS) or "?"
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
    """Take of a picture's line what a visitor's photo has: its id and the name of its file."""
    if not isinstance(line, dict):
        raise _corrupt(_PICTURES)
    id, source = line.get("id"), line.get("source")
    if not isinstance(id, str) or not _ID.fullmatch(id) or not isinstance(source, str):
        raise _corrupt(_PICTURES)
    return Picture(id, _plain(sanitize_text(source, _MAX_WORDS)))


def _embeddings(data: bytes, count: int, encoder: DualEncoder) -> Tensor:
    try:
        embeds = load(data)["image_embeds"]
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _corrupt(_EMBEDDINGS) from error
    if not embeds.is_floating_point() or tuple(embeds.shape) != (count, encoder.embed_dim):
        raise _corrupt(_EMBEDDINGS)
    embeds = embeds.float()
    lengths = embeds.norm(dim=-1)
    if not lengths.isfinite().all() or not ((lengths > 0.9) & (lengths < 1.1)).all():
        raise _corrupt(_EMBEDDINGS)
    return embeds


def _thumbnail(archive: SafeZip, name: str) -> bytes:
    """Read a thumbnail as if it were any upload, and encode what is seen of it anew."""
    data = _read(archive, name, _THUMBNAIL_MB)
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            large = max(image.size) > _THUMBNAIL_SIDE
    except Exception as error:  # hostile bytes make decoders raise anything
        raise _corrupt("thumbnails") from error
    if large:
        raise _corrupt("thumbnails")
    return as_webp(open_image(data))


def _corrupt(file: str) -> InputError:
    message = "The album is damaged or not one of ours ({file}); take the zip as it was downloaded."
    return InputError(message, "album.damaged", file=file)
