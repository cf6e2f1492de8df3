"""Convert galleries of the previous format, JSON lines and safetensors in a folder, to `gallery.db`.

Place in the flow: `old gallery folder -> gallery.db (here)`. To be removed one release after the conversion came.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignment.atomic import sha256_of
from alignment.gallery.database import DATABASE, Kind, source_from_folder
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, item_ids
from alignment.gallery.writer import write_gallery

logger = logging.getLogger(__name__)

_FILES = ("gallery.json", "pictures.jsonl", "captions.jsonl", "embeddings.safetensors")
_FOLDERS = ("thumbnails", "image_embeds-*", "text_embeds-*", ".building", ".written")
_BACKGROUND = "background."


def import_gallery(folder: Path, fetch: Callable[[Kind, str, Tensor], Tensor] | None = None) -> bool:
    """Convert the gallery in a folder, if it has the previous format, and delete the old files.

    The caller holds `alignment.atomic.exclusive_lock`.

    Args:
        folder: the gallery's.
        fetch: returns embeddings that are not in the folder but on a server, by kind, fingerprint and ids.

    Returns:
        Whether there was one; a damaged one stays as it is, with a warning in the log. OSError if it cannot be written.
    """
    paths = {name: _place(folder, name) for name in _FILES}
    if not paths["gallery.json"].is_file():
        return False
    if not (folder / DATABASE).exists():
        logger.warning("The gallery in %s has the format of an earlier version: it is converted to gallery.db.", folder)
        try:
            _convert(folder, paths, fetch)
        except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, SafetensorError) as error:
            pull = f" If it is on a Milvus server, run: python -m alignment.gallery pull {folder} --index URI"
            hint = pull if isinstance(error, FileNotFoundError) else ""
            logger.warning("The gallery in %s cannot be converted, it is damaged (%s).%s", folder, error, hint)
            return False
    for path in (found for pattern in (*_FOLDERS, *_FILES) for found in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def _place(folder: Path, name: str) -> Path:
    """Find a file of the gallery; a build that was killed at its end left the new ones in a folder beside the old."""
    ready = folder / ".written" / name
    return ready if ready.exists() else folder / name


def _convert(
    folder: Path, paths: Mapping[str, Path], fetch: Callable[[Kind, str, Tensor], Tensor] | None
) -> None:  # fmt: skip
    header = json.loads(paths["gallery.json"].read_text("utf-8"))
    metadata = GalleryMetadata(**{**header, "source": source_from_folder(folder, header["source"])})
    lines = {name: paths[name].read_text("utf-8", "surrogateescape").split("\n")[:-1] for name in _FILES[1:3]}
    with safe_open(paths["embeddings.safetensors"], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        build, seal = f"{file.metadata()['build']} {'-' * 64}".split()[:2]
    _verify(header, metadata, lines, tensors, build, seal)
    pictures = [_picture(json.loads(line), metadata.source) for line in lines["pictures.jsonl"]]
    captions = [Caption(**json.loads(line)) for line in lines["captions.jsonl"]]
    embeds: dict[Kind, list[Tensor]] = {}
    sides: dict[Kind, tuple[str, Sequence[Picture | Caption]]]
    sides = {"picture": ("image_embeds", pictures), "caption": ("text_embeds", captions)}
    for kind, (name, items) in sides.items():
        place = f"{name}-{metadata.fingerprint[:12]}"
        if name not in tensors and fetch and not (folder / place).exists():
            rows = fetch(kind, metadata.fingerprint, item_ids(items))
        else:
            rows = tensors[name] if name in tensors else _read_index(folder, place, items)
        if len(rows) != len(items):
            raise ValueError(f"{len(items)} items have {len(rows)} {name}")
        embeds[kind] = [rows]
    cohort = {name.removeprefix(_BACKGROUND): part for name, part in tensors.items() if name.startswith(_BACKGROUND)}
    width = max((rows.shape[-1] for [rows] in embeds.values() if len(rows)), default=0)

    def thumbnail(picture: Picture) -> bytes | None:
        path = _place(folder, f"thumbnails/{picture.id}.webp")
        return path.read_bytes() if path.is_file() and not picture.package else None

    # Public copies do not state the file of a picture; thumbnails are stored by its hash.
    for row, picture in enumerate(pictures):
        if picture.file is None and (webp := thumbnail(picture)):
            digest = hashlib.sha256(picture.id.encode() + webp).hexdigest()
            pictures[row] = replace(picture, file=FileFingerprint(0, 0, digest))
    write_gallery(folder, pictures, captions, embeds, width, metadata, cohort, thumbnail)


def _verify(
    header: Mapping[str, Any], metadata: GalleryMetadata, lines: Mapping[str, list[str]],
    tensors: Mapping[str, Tensor], build: str, seal: str,
) -> None:  # fmt: skip
    """Compare with the checksums that the old format has of everything but thumbnails."""
    text = "\n\n".join([metadata.fingerprint, *("\n".join(part) for part in lines.values())])
    if build != hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest():
        raise ValueError("its files are not of one build")
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode("utf-8", "surrogateescape"))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    if seal != "-" * 64 and seal != digest.hexdigest():
        raise ValueError("its content is not what was written")


def _read_index(folder: Path, name: str, items: Sequence[Picture | Caption]) -> Tensor:
    """Read the embeddings of many items, which lie in segments that may hold others."""
    rows: dict[int, Tensor] = {}
    for entry in json.loads((folder / name / "index.json").read_text("utf-8"))["entries"]:
        path = folder / name / entry["rows"]["name"]
        if sha256_of(path) != entry["rows"]["sha256"]:
            raise ValueError(f"the content of {path} is not what was written")
        with safe_open(path, "pt") as file:
            rows |= zip(file.get_tensor("ids").tolist(), file.get_tensor("rows"), strict=True)
    return torch.stack([rows[id] for id in item_ids(items).tolist()])


def _picture(line: Mapping[str, Any], root: str) -> Picture:
    file = FileFingerprint(**line["file"]) if "file" in line else None
    return Picture(line["id"], line["source"], line.get("captions", {}), line.get("credit", ""), root, file)
