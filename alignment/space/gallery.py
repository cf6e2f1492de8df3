"""The public copy of a gallery: thumbnails, captions and embeddings; no original, no path, no hash of a file.

Place in the flow: `gallery.db -> new gallery.db (here) -> the Space's folder`. The copy is a new database: the free
pages of the original may still hold deleted rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from alignment.gallery.database import KINDS, GalleryDatabase, Kind
from alignment.gallery.items import StoredRecords
from alignment.gallery.records import Caption, FileFingerprint, Picture, rebuild_command
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder
from alignment.space.checks import check_folder, private_paths
from alignment.space.model_source import ModelSource


def copy_gallery(source: Path, target: Path, model: ModelSource) -> list[str]:
    """Write a gallery that may be public.

    Of a picture it keeps the thumbnail, the captions, the credit and the bare name of its file. Its folder, size, date
    and hash are left out, and so is what the gallery was built from.

    Args:
        source: the gallery's folder.
        target: a new folder.
        model: what the Space runs.

    Returns:
        Sentences on what becomes public.

    Raises:
        FileNotFoundError: when there is no gallery.
        ValueError: when another model made it, it is damaged or on a server, thumbnails are missing, or a caption
            contains a secret or the path it was built from.
    """
    database = GalleryDatabase.open(source, model.name)
    metadata = database.metadata
    _check_model(source, metadata.fingerprint, model)
    captions: list[Caption] = list(StoredRecords(database, "caption", database.ids("caption")))
    originals: list[Picture] = list(StoredRecords(database, "picture", database.ids("picture")))
    thumbnails = [_digest_of_thumbnail(database, picture) for picture in originals]
    missing = [picture for picture, digest in zip(originals, thumbnails, strict=True) if not digest]
    if missing:
        raise ValueError(
            f"The gallery in {source} lacks the thumbnails of {len(missing)} pictures. Rebuild it with: "
            f"{rebuild_command(source, metadata.model, metadata)}"
        )
    pictures = [_public(picture, digest) for picture, digest in zip(originals, thumbnails, strict=True)]
    by_id = {picture.id: picture for picture in originals}
    write_gallery(
        target,
        pictures,
        captions,
        {kind: _embeds(database, kind) for kind in KINDS},
        database.embed_dim,
        replace(metadata, model=model.name, source="", options=""),
        database.cohort(),
        lambda picture: database.thumbnail(by_id[picture.id]),
    )
    check_folder(target, private_paths(Path(metadata.source)))
    return _what_is_shown(sum(not picture.package for picture in pictures), len(captions))


def _digest_of_thumbnail(database: GalleryDatabase, picture: Picture) -> str:
    """Hash what is public of a picture, in place of its file; "" if it has no thumbnail."""
    if picture.package:
        return picture.file.sha256 if picture.file else picture.id
    webp = database.thumbnail(picture)
    return hashlib.sha256(picture.id.encode() + webp).hexdigest() if webp else ""


def _public(picture: Picture, digest: str) -> Picture:
    if picture.package:  # the Space has the package as well
        return picture
    name = picture.source.replace("\\", "/").rpartition("/")[2]
    return replace(picture, source=name, root="", file=FileFingerprint(0, 0, digest))


def _embeds(database: GalleryDatabase, kind: Kind) -> Iterator[Tensor]:
    return (embeds for _, embeds in database.batches(kind))


def _what_is_shown(pictures: int, captions: int) -> list[str]:
    return [
        f"Whoever may open the Space sees {pictures} of your pictures as thumbnails, with the names of their files, "
        f"and {captions} captions. The originals, and where they lie, stay on this machine."
    ]


def _check_model(folder: Path, fingerprint: str, model: ModelSource) -> None:
    theirs = DualEncoder.load(model.folder, device="cpu").fingerprint
    if fingerprint != theirs:
        name = model.name if model.revision else str(model.folder)
        raise ValueError(
            f"The gallery in {folder} was not made by {name}{f' at {model.revision[:12]}' if model.revision else ''}. "
            f"Build it anew with: {rebuild_command(folder, name)}"
        )
