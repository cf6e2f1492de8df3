"""Recognise and read the published annotations of COCO, Flickr8k and Flickr30k, and Karpathy's splits of them."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.data.collector import Collector, RawAnnotation
from alignment.data.encoding import read_text
from alignment.data.files import read_head, split_from_path
from alignment.data.records import read_captions
from alignment.data.tables import read_table
from alignment.preprocess import join_first, sanitize_text

_SPLIT_LIST = re.compile(r"(?:flickr_?\d+k[._])?(train|dev|val|test)(?:images)?\.txt", re.IGNORECASE)
_TOKEN_LINE = re.compile(r"(.+?)(?:#\d+)?\t(.*)")
_BAR_HEADER = "image_name|"
# One line of the published file lacks the second bar: "2199200615.jpg| 4   A dog runs ...".
_BAR_LINE = re.compile(r"([^|]+)\|\s*\d+(?:\s*\||\s)(.*)")
_COCO_TABLE = re.compile(r'\{.*"(images|annotations)"', re.DOTALL)
_END_BYTES = 2**16  # at either end of a file of COCO; captions are in one of them, after the images or before


def is_karpathy(file: Path) -> bool:
    """Recognise Karpathy's `dataset_*.json` by its sentences."""
    return file.suffix.lower() == ".json" and (head := read_head(file)).startswith("{") and '"sentences"' in head


def is_coco(file: Path) -> bool:
    """Recognise annotations of COCO, of captions or of anything else, by their tables."""
    return file.suffix.lower() == ".json" and bool(_COCO_TABLE.match(read_head(file)))


def is_coco_captions(file: Path) -> bool:
    """Recognise captions of COCO."""
    if not is_coco(file):
        return False
    with file.open("rb") as handle:
        start = handle.read(_END_BYTES)
        handle.seek(max(0, file.stat().st_size - _END_BYTES))
        return b'"caption"' in start or b'"caption"' in handle.read()


def is_flickr30k(file: Path) -> bool:
    """Recognise the token file of Flickr30k, and its table with bars between the columns."""
    return file.suffix == ".token" or (file.suffix == ".csv" and read_head(file).startswith(_BAR_HEADER))


def read_flickr(file: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read `name#number<tab>caption` lines, or `name| number| caption` lines below a header.

    The splits are in lists of pictures beside the file.
    """
    lists = [(path, _SPLIT_LIST.fullmatch(path.name)) for path in sorted(file.parent.glob("*.txt"))]
    splits = {name.removesuffix(".jpg"): found[1] for path, found in lists if found for name in read_text(path).split()}
    lines = read_text(file).lstrip().split("\n")
    has_bars = lines[0].startswith(_BAR_HEADER)
    for line in lines[has_bars:]:
        if found := (_BAR_LINE if has_bars else _TOKEN_LINE).fullmatch(line):
            yield RawAnnotation(found[1], [found[2]], splits.get(Path(found[1]).stem, ""), found[1])
        elif line.strip():
            collector.skip("unreadable lines", line[:40])


def read_karpathy(file: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read images, each with its sentences."""
    for image in _objects(json.loads(read_text(file))["images"], "image", file, collector, needed="filename"):
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if isinstance(part, str) and part)
        split, identity = image.get("split"), image.get("cocoid", image.get("imgid", ""))
        captions = read_captions(image.get("sentences"))
        yield RawAnnotation(name, captions, split if isinstance(split, str) else "", str(identity))


def _objects(
    table: Iterable[object], kind: str, file: Path, collector: Collector, needed: str | None = None
) -> Iterator[dict[str, Any]]:
    """Keep the entries of a table that are objects and have the text that is needed."""
    for number, entry in enumerate(table):
        if isinstance(entry, dict) and (needed is None or isinstance(entry.get(needed), str)):
            yield entry
        else:
            collector.skip("unreadable lines", f"{file.name}: {kind} {number}")


def read_coco(file: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read images, and the annotations that refer to them by id.

    Raises:
        ValueError: when an id belongs to several images.
    """
    data = json.loads(read_text(file))
    if "images" not in data or ("annotations" not in data and b'"caption' in file.read_bytes()):
        yield from read_table(file, collector)  # one list of images with their captions
        return
    images, annotations = ([*_objects(data[f"{kind}s"], kind, file, collector)] for kind in ("image", "annotation"))
    listed = {str(image.get("id")) for image in images}
    is_exact = all(str(annotation.get("image_id")) in listed for annotation in annotations)
    key: Callable[[object], str] = str if is_exact else _plain_id
    names = defaultdict[str, dict[str, None]](dict)
    for image in images:
        names[key(image.get("id"))][str(image.get("file_name"))] = None
    captions = defaultdict[str, list[str]](list)
    for identity, annotation in _join(annotations, names, key):
        if identity in names:
            captions[identity] += read_captions(annotation.get("caption"))
        else:
            where = f"{file.name}: {annotation.get('image_id')}"
            collector.skip("captions of images that are not listed", where)
    if annotations and not captions:
        collector.refuse(file, f"none of its {len(annotations)} annotations belongs to an image that it lists")
    if repeated := [identity for identity in captions if len(names[identity]) > 1]:
        first = f"{sanitize_text(repeated[0], 40)} stands for several images ({join_first(list(names[repeated[0]]))})"
        more = f", and so do {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise ValueError(f"{file}: the id {first}{more}; give each image an id of its own.")
    split = split_from_path(file, collector.root)
    for image in images:
        name, identity = image.get("file_name"), key(image.get("id"))
        name = name if isinstance(name, str) else ""
        yield RawAnnotation(name, captions.pop(identity, []), split, identity, file.parent)


def _plain_id(value: object) -> str:
    """Write an id; some files have 1 in one table and "1", "0001" or 1.0 in the other."""
    text = re.sub(r"^(\d+)\.0+$", r"\1", str(value).strip())
    return str(int(text)) if text.isascii() and text.isdigit() else text


def _join(
    annotations: Sequence[dict[str, Any]], names: dict[str, dict[str, None]], key: Callable[[object], str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each annotation with the id of its image; some files have names of pictures for ids, or their stems."""
    by_name = {name: identity for identity, found in names.items() for name in found}
    ids = [key(annotation.get("image_id")) for annotation in annotations]
    if not any(identity in names for identity in ids):
        by_name = {os.path.splitext(os.path.basename(name))[0]: found for name, found in by_name.items()} | by_name
    for identity, annotation in zip(ids, annotations, strict=True):
        yield identity if identity in names else by_name.get(identity, identity), annotation
