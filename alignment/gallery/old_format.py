"""Convert galleries of the previous format, JSON lines and safetensors in a folder, to `gallery.db`.

Place in the flow: `old gallery folder -> gallery.db (here)`. To be removed one release after the conversion came.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignment.checksum import sha256_of
from alignment.gallery.database import DATABASE, KINDS, SIDES, Kind, source_from_folder
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, item_ids
from alignment.gallery.writer import write_gallery

logger = logging.getLogger(__name__)

_FILES = ("gallery.json", "pictures.jsonl", "captions.jsonl", "embeddings.safetensors")
_FOLDERS = ("thumbnails", "image_embeds-*", "text_embeds-*", ".building", ".written")
_BACKGROUND = "background."


def import_gallery(folder: Path, fetch: Callable[[Kind, str, Tensor], Tensor] | None = None) -> None:
    """Convert the gallery in a folder, if it has the previous format, and delete the old files.

    The caller holds `alignment.atomic.exclusive_lock`. `fetch` returns embeddings from a server, by kind, fingerprint
    and ids. A damaged gallery stays as it is, with a warning in the log. OSError if the new one cannot be written.
    """
    if not _place(folder, "gallery.json").is_file():
        return
    if not (folder / DATABASE).exists():
        logger.warning("The gallery in %s has the format of an earlier version: it is converted to gallery.db.", folder)
        try:
            _convert(folder, fetch)
        except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError, SafetensorError) as error:
            pull = f" If it is on a Milvus server, run: python -m alignment.gallery pull {folder} --index URI"
            hint = pull if isinstance(error, FileNotFoundError) else ""
            logger.warning("The gallery in %s cannot be converted, it is damaged (%s).%s", folder, error, hint)
            return
    for path in (found for pattern in (*_FOLDERS, *_FILES) for found in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _place(folder: Path, name: str) -> Path:
    """Find a file of the gallery; a build that was killed at its end left the new ones in a folder beside the old."""
    ready = folder / ".written" / name
    return ready if ready.exists() else folder / name


def _convert(folder: Path, fetch: Callable[[Kind, str, Tensor], Tensor] | None) -> None:
    texts = [_place(folder, name).read_text("utf-8", "surrogateescape") for name in _FILES[:3]]
    header, lines = json.loads(texts[0]), [text.split("\n")[:-1] for text in texts[1:]]
    metadata = GalleryMetadata(**{**header, "source": source_from_folder(folder, header["source"])})
    with safe_open(_place(folder, "embeddings.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        build, *seal = file.metadata()["build"].split()
    content = "\n\n".join([metadata.fingerprint, *map("\n".join, lines)])
    if build != hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest():
        raise ValueError("its files are not of one build")
    if seal and seal[0] != _seal(header, tensors):
        raise ValueError("its content is not what was written")
    pictures = [_picture(json.loads(line), metadata.source) for line in lines[0]]
    captions = [Caption(**json.loads(line)) for line in lines[1]]
    embeds: dict[Kind, list[Tensor]] = {}
    lists: tuple[Sequence[Picture | Caption], ...] = (pictures, captions)
    for kind, name, items in zip(KINDS, SIDES.values(), lists, strict=True):
        place = folder / f"{name}-{metadata.fingerprint[:12]}"
        if name not in tensors and fetch and not place.exists():
            tensors[name] = fetch(kind, metadata.fingerprint, item_ids(items))
        embeds[kind] = [tensors[name] if name in tensors else _read_index(place, items)]
        if len(embeds[kind][0]) != len(items):
            raise ValueError(f"{len(items)} items have {len(embeds[kind][0])} {name}")
    cohort = {name.removeprefix(_BACKGROUND): part for name, part in tensors.items() if name.startswith(_BACKGROUND)}
    width = max((rows.shape[-1] for [rows] in embeds.values() if len(rows)), default=0)
    pictures = [_with_file(folder, picture) for picture in pictures]
    write_gallery(folder, pictures, captions, embeds, width, metadata, cohort, partial(_thumbnail, folder))


def _seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute the checksum that the old format has of metadata and tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode("utf-8", "surrogateescape"))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_index(folder: Path, items: Sequence[Picture | Caption]) -> Tensor:
    """Read the embeddings of many items, which lie in segments that may hold others."""
    rows: dict[int, Tensor] = {}
    for entry in json.loads((folder / "index.json").read_text("utf-8"))["entries"]:
        path = folder / entry["rows"]["name"]
        if sha256_of(path) != entry["rows"]["sha256"]:
            raise ValueError(f"the content of {path} is not what was written")
        with safe_open(path, "pt") as file:
            rows |= zip(file.get_tensor("ids").tolist(), file.get_tensor("rows"), strict=True)
    return torch.stack([rows[id] for id in item_ids(items).tolist()])


def _picture(line: Mapping[str, Any], root: str) -> Picture:
    file = FileFingerprint(**line["file"]) if "file" in line else None
    return Picture(line["id"], line["source"], line.get("captions", {}), line.get("credit", ""), root, file)


def _with_file(folder: Path, picture: Picture) -> Picture:
    """Make up the hash that a thumbnail is stored by: public copies do not state the file of a picture."""
    if picture.file or not (webp := _thumbnail(folder, picture)):
        return picture
    return replace(picture, file=FileFingerprint(0, 0, hashlib.sha256(picture.id.encode() + webp).hexdigest()))


def _thumbnail(folder: Path, picture: Picture) -> bytes | None:
    path = _place(folder, f"thumbnails/{picture.id}.webp")
    return path.read_bytes() if path.is_file() and not picture.package else None
