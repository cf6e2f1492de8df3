"""Write the public copy of a gallery: thumbnails, captions and embeddings; no original, no path, no hash of a file.

Place in the flow: `gallery.db -> new gallery.db (here) -> the Space's folder`. The copy is a new database, as the free
pages of the original may still contain deleted rows.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from alignment.gallery.database import KINDS, GalleryDatabase
from alignment.gallery.records import FileFingerprint, Picture, rebuild_command
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder
from alignment.space.checks import check_folder, private_paths
from alignment.space.model_source import ModelSource


def copy_gallery(source: Path, target: Path, model: ModelSource) -> str:
    """Write a gallery that may be public; returns a sentence that says what becomes public.

    A picture keeps its thumbnail, its captions, its credit and the bare name of its file. Its folder, size, date and
    hash are left out, and so are the source and the options of the build.

    Raises:
        FileNotFoundError: when there is no gallery in `source`.
        ValueError: when another model made it, it is damaged, thumbnails are missing, or a caption contains a secret
            or the path it was built from.
    """
    database = GalleryDatabase.open(source, model.name)
    metadata = database.metadata
    if metadata.fingerprint != DualEncoder.load(model.folder, device="cpu").fingerprint:
        name, commit = (model.name, f" at {model.revision[:12]}") if model.revision else (str(model.folder), "")
        command = rebuild_command(source, name)
        raise ValueError(f"The gallery in {source} was not made by {name}{commit}. Build it anew with: {command}")
    originals, captions = database.records()
    by_id = {picture.id: picture for picture in originals}
    copies = (_public(picture, database.thumbnail(picture)) for picture in originals)
    pictures = [picture for picture in copies if picture]
    if missing := len(originals) - len(pictures):
        command = rebuild_command(source, metadata.model, metadata)
        raise ValueError(
            f"The gallery in {source} lacks the thumbnails of {missing} pictures. Rebuild it with: {command}"
        )
    embeds = {kind: (rows for _, rows in database.batches(kind)) for kind in KINDS}
    public, cohort = replace(metadata, model=model.name, source="", options=""), database.cohort()

    def thumbnail(picture: Picture) -> bytes | None:
        return database.thumbnail(by_id[picture.id])

    write_gallery(target, pictures, captions, embeds, database.embed_dim, public, cohort, thumbnail)
    check_folder(target, private_paths(Path(metadata.source)))
    return (
        f"Whoever may open the Space sees {sum(not picture.package for picture in pictures)} of your pictures as "
        f"thumbnails, with the names of their files, and {len(captions)} captions. The originals, and where they lie, "
        "stay on this machine."
    )


def _public(picture: Picture, webp: bytes | None) -> Picture | None:
    """Reduce a picture to its file name and a hash of its thumbnail; None if it has no thumbnail."""
    if picture.package:  # the Space installs the same package
        return picture
    if not webp:
        return None
    name = picture.source.replace("\\", "/").rpartition("/")[2]
    digest = hashlib.sha256(picture.id.encode() + webp).hexdigest()
    return replace(picture, source=name, root="", file=FileFingerprint(0, 0, digest))
