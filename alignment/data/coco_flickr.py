"""The published layouts: how to recognise Karpathy, COCO and Flickr annotations, and how to read them."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alignment.data.collector import Collection, Row
from alignment.data.encoding import read_text
from alignment.data.files import begins, split_of
from alignment.data.records import texts_of
from alignment.data.tables import read_table
from alignment.preprocess import join_first, sanitize_text

_SPLIT_LIST = re.compile(r"(?:flickr_?\d+k[._])?(train|dev|val|test)(?:images)?\.txt", re.IGNORECASE)

_END = 2**16  # bytes in which captions show


def is_karpathy(file: Path) -> bool:
    """Tell one of the `dataset_*.json` by its sentences."""
    return file.suffix.lower() == ".json" and begins(file).startswith("{") and '"sentences"' in begins(file)


def is_coco(file: Path) -> bool:
    """Tell annotations of COCO by their tables."""
    return file.suffix.lower() == ".json" and bool(re.match(r"\{.*\"(images|annotations)\"", begins(file), re.DOTALL))


def is_coco_captions(file: Path) -> bool:
    """Tell captions among COCO's annotations, whatever their name: they come last, but in short files."""
    if not is_coco(file):
        return False
    with file.open("rb") as handle:
        start = handle.read(_END)
        handle.seek(max(0, file.stat().st_size - _END))
        return b'"caption"' in start or b'"caption"' in handle.read()


def is_flickr8k(file: Path) -> bool:
    """Tell the captions among the token files."""
    return file.name == "Flickr8k.token.txt"


def is_flickr30k(file: Path) -> bool:
    """Tell the token file, and the table parted by bars."""
    return file.suffix == ".token" or (file.suffix == ".csv" and begins(file).startswith("image_name|"))


def read_karpathy(file: Path, into: Collection) -> Iterator[Row]:
    """Read images, each with its sentences."""
    for number, image in enumerate(json.loads(read_text(file))["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            into.skip("unreadable lines", f"{file.name}: image {number}")
            continue
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if isinstance(part, str) and part)
        split, identity = image.get("split"), image.get("cocoid", image.get("imgid", ""))
        yield Row(name, texts_of(image.get("sentences")), split if isinstance(split, str) else "", str(identity))


def read_coco(file: Path, into: Collection) -> Iterator[Row]:
    """Read images, and the annotations that name them by number.

    Raises:
        ValueError: when one number stands for several images.
    """
    data = json.loads(read_text(file))
    if "images" not in data or ("annotations" not in data and b'"caption' in file.read_bytes()):  # one list says all
        yield from read_table(file, into)
        return
    images, captions = _entries(data["images"], "image", file, into), defaultdict[str, list[str]](list)
    annotations = _entries(data["annotations"], "annotation", file, into)
    asked = {str(annotation.get("image_id")) for annotation in annotations}
    # Some write 1 in one table and "1" or "0001" in the other.
    key = str if asked <= {str(image.get("id")) for image in images} else _plain_id
    names = defaultdict[str, dict[str, None]](dict)
    for image in images:
        names[key(image.get("id"))][str(image.get("file_name"))] = None
    ids = {str(image.get("file_name")): key(image.get("id")) for image in images}  # some write names for numbers
    if not any(key(annotation.get("image_id")) in names for annotation in annotations):  # or names without ending
        ids = {_stem(name): identity for name, identity in ids.items()} | ids
    for annotation in annotations:
        identity = key(annotation.get("image_id"))
        identity = identity if identity in names else ids.get(identity, identity)
        if identity in names:
            captions[identity] += texts_of(annotation.get("caption"))
        else:
            into.skip("captions of images that are not listed", f"{file.name}: {annotation.get('image_id')}")
    if annotations and not captions:
        into.refuse(file, f"none of its {len(annotations)} annotations belongs to an image that it lists")
    if several := [identity for identity in captions if len(names[identity]) > 1]:
        meant = join_first(list(names[several[0]]))
        raise ValueError(
            f"{file}: the id {sanitize_text(several[0], 40)} stands for several images ({meant})"
            f"{f', and so do {len(several) - 1} more' if len(several) > 1 else ''}; give each image an id of its own."
        )
    for image in images:
        name, identity = image.get("file_name"), key(image.get("id"))
        yield Row(
            name if isinstance(name, str) else "",
            captions.pop(identity, []),
            split_of(file, into.root),
            identity,
            file.parent,
        )


def _entries(table: Iterable[object], kind: str, file: Path, into: Collection) -> list[dict[str, Any]]:
    """Keep the entries of a table that are objects."""
    entries = []
    for number, entry in enumerate(table):
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            into.skip("unreadable lines", f"{file.name}: {kind} {number}")
    return entries


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _plain_id(value: object) -> str:
    text = re.sub(r"^(\d+)\.0+$", r"\1", str(value).strip())
    return str(int(text)) if text.isascii() and text.isdigit() else text


def read_flickr(file: Path, into: Collection) -> Iterator[Row]:
    """Read `name#number<tab>caption` lines."""
    splits = _split_lists(file.parent)
    for line in read_text(file).split("\n"):
        if found := re.fullmatch(r"(.+?)(?:#\d+)?\t(.*)", line):
            yield Row(found[1], [found[2]], splits.get(Path(found[1]).stem, ""), found[1])
        elif line.strip():
            into.skip("unreadable lines", line[:40])


def read_flickr30k(file: Path, into: Collection) -> Iterator[Row]:
    """Read the token file, or `name| number| caption` lines below a header."""
    if file.suffix == ".token":
        yield from read_flickr(file, into)
        return
    splits = _split_lists(file.parent)
    for line in read_text(file).split("\n")[1:]:
        # One line of the published file lacks the second bar: "2199200615.jpg| 4   A dog runs ...".
        if found := re.fullmatch(r"([^|]+)\|\s*\d+(?:\s*\||\s)(.*)", line):
            yield Row(found[1], [found[2]], splits.get(Path(found[1]).stem, ""), found[1])
        elif line.strip():
            into.skip("unreadable lines", line[:40])


def _split_lists(folder: Path) -> dict[str, str]:
    """Map the pictures listed in files such as `Flickr_8k.devImages.txt`, without their endings, to the split."""
    lists = ((file, _SPLIT_LIST.fullmatch(file.name)) for file in sorted(folder.glob("*.txt")))
    return {
        name.removesuffix(".jpg"): listed[1] for file, listed in lists if listed for name in read_text(file).split()
    }
