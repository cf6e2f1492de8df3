"""Write the public copy of a gallery: thumbnails, captions and embeddings; no original, no path, no hash of a file.

Place in the flow: `gallery.db -> new gallery.db (here) -> the Space's folder`. The copy is a new database, as the free
pages of the original may still contain deleted rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from alignment.gallery.database import KINDS, GalleryDatabase
from alignment.gallery.items import StoredRecords
from alignment.gallery.records import Caption, FileFingerprint, Picture, rebuild_command
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder
from alignment.space.checks import check_folder, private_paths
from alignment.space.model_source import ModelSource


def copy_gallery(source: Path, target: Path, model: ModelSource) -> str:
    """Write a gallery that may be public.

    A picture keeps its thumbnail, its captions, its credit and the bare name of its file. Its folder, size, date and
    hash are left out, and so are the source and the options of the build.

    Returns:
        A sentence that says what becomes public.

    Raises:
        FileNotFoundError: when there is no gallery in `source`.
        ValueError: when another model made it, it is damaged, thumbnails are missing, or a caption contains a secret
            or the path it was built from.
    """
    database = GalleryDatabase.open(source, model.name)
    metadata = database.metadata
    _check_model(source, metadata.fingerprint, model)
    captions: list[Caption] = list(StoredRecords(database, "caption", database.ids("caption")))
    originals: list[Picture] = list(StoredRecords(database, "picture", database.ids("picture")))
    digests = [_digest_of_thumbnail(database, picture) for picture in originals]
    if missing := digests.count(""):
        raise ValueError(
            f"The gallery in {source} lacks the thumbnails of {missing} pictures. Rebuild it with: "
            f"{rebuild_command(source, metadata.model, metadata)}"
        )
    pictures = [_public(picture, digest) for picture, digest in zip(originals, digests, strict=True)]
    by_id = {picture.id: picture for picture in originals}
    write_gallery(
        target,
        pictures,
        captions,
        {kind: (embeds for _, embeds in database.batches(kind)) for kind in KINDS},
        database.embed_dim,
        replace(metadata, model=model.name, source="", options=""),
        database.cohort(),
        lambda picture: database.thumbnail(by_id[picture.id]),
    )
    check_folder(target, private_paths(Path(metadata.source)))
    return (
        f"Whoever may open the Space sees {sum(not picture.package for picture in pictures)} of your pictures as "
        f"thumbnails, with the names of their files, and {len(captions)} captions. The originals, and where they lie, "
        "stay on this machine."
    )


def _digest_of_thumbnail(database: GalleryDatabase, picture: Picture) -> str:
    """Hash the thumbnail of a picture, in place of its file; "" if it has none."""
    if picture.package:
        return picture.file.sha256 if picture.file else picture.id
    webp = database.thumbnail(picture)
    return hashlib.sha256(picture.id.encode() + webp).hexdigest() if webp else ""


def _public(picture: Picture, digest: str) -> Picture:
    if picture.package:  # the Space installs the same package
        return picture
    name = picture.source.replace("\\", "/").rpartition("/")[2]
    return replace(picture, source=name, root="", file=FileFingerprint(0, 0, digest))


def _check_model(folder: Path, fingerprint: str, model: ModelSource) -> None:
    if fingerprint != DualEncoder.load(model.folder, device="cpu").fingerprint:
        name = model.name if model.revision else str(model.folder)
        raise ValueError(
            f"The gallery in {folder} was not made by {name}{f' at {model.revision[:12]}' if model.revision else ''}. "
            f"Build it anew with: {rebuild_command(folder, name)}"
        )
