"""The published layouts: how to recognise Karpathy, COCO and Flickr annotations, and how to read them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from alignment.pairs.collection import Collection, Row
from alignment.pairs.files import begins, split_of

_SPLIT_LIST = re.compile(r"(?:flickr_?\d+k[._])?(train|dev|val|test)(?:images)?\.txt", re.IGNORECASE)


def is_karpathy(file: Path) -> bool:
    """Tell one of the `dataset_*.json` by its sentences."""
    return file.suffix.lower() == ".json" and begins(file).startswith("{") and '"sentences"' in begins(file)


def is_coco(file: Path) -> bool:
    """Tell captions of COCO by their tables."""
    return file.suffix.lower() == ".json" and bool(re.match(r"\{.*\"(images|annotations)\"", begins(file), re.DOTALL))


def is_flickr8k(file: Path) -> bool:
    """Tell the captions among the token files."""
    return file.name == "Flickr8k.token.txt"


def is_flickr30k(file: Path) -> bool:
    """Tell the token file, and the table parted by bars."""
    return file.suffix == ".token" or (file.suffix == ".csv" and begins(file).startswith("image_name|"))


def read_karpathy(file: Path, into: Collection) -> Iterator[Row]:
    """Read images, each with its sentences."""
    for image in json.loads(file.read_text(encoding="utf-8-sig"))["images"]:
        name = "/".join(filter(None, [image.get("filepath"), image["filename"]]))
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield Row(name, captions, image.get("split", ""), str(image.get("cocoid", image.get("imgid", ""))))


def read_coco(file: Path, into: Collection) -> Iterator[Row]:
    """Read images, and the annotations that name them by number."""
    data = json.loads(file.read_text(encoding="utf-8-sig"))
    captions = defaultdict(list)
    for annotation in data["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in data["images"]:
        yield Row(image["file_name"], captions[image["id"]], split_of(file), str(image["id"]))


def read_flickr(file: Path, into: Collection) -> Iterator[Row]:
    """Read `name#number<tab>caption` lines."""
    splits = _split_lists(file.parent)
    for line in file.read_text(encoding="utf-8-sig").split("\n"):
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
    for line in file.read_text(encoding="utf-8-sig").split("\n")[1:]:
        # One line of the published file lacks the second bar: "2199200615.jpg| 4   A dog runs ...".
        if found := re.fullmatch(r"([^|]+)\|\s*\d+(?:\s*\||\s)(.*)", line):
            yield Row(found[1], [found[2]], splits.get(Path(found[1]).stem, ""), found[1])
        elif line.strip():
            into.skip("unreadable lines", line[:40])


def _split_lists(folder: Path) -> dict[str, str]:
    """Map the pictures listed in files such as `Flickr_8k.devImages.txt`, without their endings, to the split."""
    lists = ((file, _SPLIT_LIST.fullmatch(file.name)) for file in sorted(folder.glob("*.txt")))
    return {
        name.removesuffix(".jpg"): listed[1]
        for file, listed in lists
        if listed
        for name in file.read_text(encoding="utf-8-sig").split()
    }
