"""The public copy of a gallery: thumbnails, captions and embeddings; nothing of the originals, nor of where they lie.

Place in the flow: `gallery folder -> public copy (here) -> the Space's folder`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from alignment.catalogue import Picture, read_catalogue, rebuild_command
from alignment.gallery.search import THUMBNAILS
from alignment.gallery.storage import open_gallery, write_gallery
from alignment.model import DualEncoder
from alignment.space.checks import check_folder, private_paths
from alignment.space.choice import Choice


def copy_gallery(source: Path, target: Path, model: Choice) -> list[str]:
    """Write a gallery that may be shown to everybody.

    Of a picture it keeps the thumbnail, the captions, the credit and the bare name of its file. Its folder, size, date
    and hash stay here, and so does what the gallery was built from.

    Args:
        source: the gallery's folder.
        target: a new folder.
        model: what the Space runs.

    Returns:
        Sentences on what becomes public.

    Raises:
        FileNotFoundError: when there is no gallery.
        ValueError: when another model made it, it is damaged or lies on a server, thumbnails are missing, or a caption
            says where it was built from.
    """
    catalogue = read_catalogue(source, model.name)
    _check_model(source, catalogue.stamp.fingerprint, model)
    if any(not any(source.glob(f"{name}-*")) for name in catalogue.elsewhere):
        raise ValueError(
            f"The embeddings of the gallery in {source} are not in its folder. If they lie on a Milvus server, fetch "
            f"them, and publish again: python -m alignment.gallery pull {source} --index URI"
        )
    own = [picture for picture in catalogue.pictures if not picture.package]
    missing = [picture.id for picture in own if not _thumbnail(source, picture).is_file()]
    if missing:
        raise ValueError(
            f"The gallery in {source} lacks the thumbnails of {len(missing)} pictures. Rebuild it with: "
            f"{rebuild_command(source, catalogue.stamp.model, catalogue.stamp)}"
        )
    _, *sides = open_gallery(source, model.name)
    stamp = replace(catalogue.stamp, model=model.name, source="", options="")
    pictures = [_public(picture) for picture in catalogue.pictures]
    write_gallery(target, replace(catalogue, pictures=pictures, stamp=stamp), (sides[0], sides[1]))
    check_folder(target, private_paths(Path(catalogue.stamp.source)))
    for picture in own:
        (target / THUMBNAILS).mkdir(exist_ok=True)
        shutil.copyfile(_thumbnail(source, picture), _thumbnail(target, picture))
    return _what_is_shown(len(own), len(catalogue.captions))


def _public(picture: Picture) -> Picture:
    if picture.package:  # lies in a package that the Space has as well
        return picture
    return replace(picture, source=picture.source.replace("\\", "/").rpartition("/")[2], root="", file=None)


def _thumbnail(folder: Path, picture: Picture) -> Path:
    return folder / THUMBNAILS / f"{picture.id}.webp"


def _what_is_shown(pictures: int, captions: int) -> list[str]:
    return [
        f"Whoever may open the Space sees {pictures} of your pictures as thumbnails, with the names of their files, "
        f"and {captions} captions. The originals, and where they lie, stay on this machine."
    ]


def _check_model(folder: Path, fingerprint: str, model: Choice) -> None:
    theirs = DualEncoder.load(model.folder, device="cpu").fingerprint
    if fingerprint != theirs:
        name = model.name if model.revision else str(model.folder)
        raise ValueError(
            f"The gallery in {folder} was not made by {name}{f' at {model.revision[:12]}' if model.revision else ''}. "
            f"Build it anew with: {rebuild_command(folder, name)}"
        )
