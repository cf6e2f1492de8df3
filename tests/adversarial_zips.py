"""Hostile zip files, made up from a seed as in `hostile`, and what becomes of one on the ways that a zip may take."""

import io
import json
import random
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from adversarial_images import BOMBS, MB, MUTATIONS, check_said, png, saved, scene

from alignment.engine import AlignmentEngine
from alignment.engine.dataset_eval import EvalResult, measure_archive
from alignment.engine.photo_zip import add_archive
from alignment.engine.safe_zip import open_archive
from alignment.preprocess import InputError


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Pack a zip of names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # as it is, null bytes and all
            entry.compress_type = method
            if name.startswith("link"):
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(entry, data)
    return buffer.getvalue()


SLIPS = (
    "../up.png",
    "/etc/up.png",
    "a/../../up.png",
    "..\\up.png",
    "C:\\up.png",
    "a//b.png",
    "link.png",
    "a\x01.png",
)


@cache
def archives() -> dict[str, bytes]:
    """Make sound zips: of pictures, of captioned pictures in every form, with names that lead away, nested."""
    pictures = {f"{row}.png": saved(scene().rotate(90 * row).resize((30 + row, 30)), "PNG") for row in range(3)}
    captions = ["two cats", "pasta ${alert(1)}", "一只狗在海滩上奔跑"]
    rows = list(zip(pictures, captions, strict=True))
    table = "image,caption\n" + "".join(f"{name},{text}\n" for name, text in rows)
    lines = "".join(json.dumps({"file_name": name, "caption": text}) + "\n" for name, text in rows)
    coco = {
        "images": [{"id": row, "file_name": name} for row, (name, _) in enumerate(rows)],
        "annotations": [{"image_id": row, "caption": text} for row, (_, text) in enumerate(rows)],
    }
    karpathy = {"images": [{"filename": name, "sentences": [{"raw": text}]} for name, text in rows]}
    inner = zipped(pictures)
    return {
        "pictures": zipped(pictures),
        "stored": zipped(pictures, zipfile.ZIP_STORED),
        "table": zipped({**pictures, "captions.csv": table.encode()}),
        "lines": zipped({**pictures, "metadata.jsonl": lines.encode()}, zipfile.ZIP_STORED),
        "COCO": zipped({**pictures, "captions_val.json": json.dumps(coco).encode()}, zipfile.ZIP_STORED),
        "Karpathy": zipped({**pictures, "dataset_x.json": json.dumps(karpathy).encode()}, zipfile.ZIP_STORED),
        "token": zipped({**pictures, "Flickr8k.token.txt": "".join(f"{n}#0\t{t}\n" for n, t in rows).encode()}),
        "slips": zipped({**dict.fromkeys(SLIPS, pictures["0.png"]), **pictures, "captions.csv": table.encode()}),
        "nested": zipped({"inner.zip": inner, "inner.png": inner, **pictures, "captions.csv": table.encode()}),
    }


def archive(name: str, more: dict[str, bytes] | None = None) -> bytes:
    """Make the mutated zip of a name: `table/7/flip`, or `table/7/inner flip` for one that is whole but for a file.

    Args:
        name: of it.
        more: sound zips beside those of `archives`.
    """
    kind, _, mutation = name.split("/")
    whole, dice = {**archives(), **(more or {})}[kind], random.Random(name)
    change = MUTATIONS[mutation.removeprefix("inner ")]
    if not mutation.startswith("inner "):
        data = bytearray(whole)
        change(data, dice)
        return bytes(data)
    members = unpacked(whole)
    chosen = dice.choice(list(members))
    data = bytearray(members[chosen] or b"\0")
    change(data, dice)
    return zipped({**members, chosen: bytes(data)}, zipfile.ZIP_STORED)


def unpacked(data: bytes) -> dict[str, bytes]:
    """Unpack a sound zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def archive_names(seed: int, count: int, kinds: tuple[str, ...] = ()) -> Iterator[str]:
    """List mutations of every kind of zip in turn, of every other one from within."""
    chosen, changes = kinds or tuple(archives()), list(MUTATIONS)
    for row in range(count):
        inner = "inner " * (row // len(chosen) % 2)
        mutation = changes[row // (2 * len(chosen)) % len(changes)]
        yield f"{chosen[row % len(chosen)]}/{seed * 1_000_000 + row}/{inner}{mutation}"


def _overlapping() -> bytes:
    """Let many names share one content."""
    data = bytearray(zipped({f"{row:04}.png": bytes(30 * MB) if row == 0 else b"x" for row in range(1000)}))
    start, first = data.find(b"PK\1\2"), None
    while start >= 0:
        first = first or bytes(data[start + 16 : start + 28])
        data[start + 16 : start + 28] = first  # checksum and sizes
        data[start + 42 : start + 46] = bytes(4)  # where it lies
        start = data.find(b"PK\1\2", start + 46)
    return bytes(data)


ZIP_BOMBS: dict[str, Callable[[], bytes]] = {
    "ratio": lambda: zipped({"a.png": bytes(50 * MB)}),
    "members": lambda: zipped({f"{row}.png": b"" for row in range(5000)}),
    "overlapping": _overlapping,
    "pictures that are bombs": lambda: zipped(
        {
            name + ".png": make()
            for name, make in BOMBS.items()
            if name in ("EXIF, PNG", "pixels, PNG", "text, PNG zTXt")
        }
    ),
    "captions": lambda: zipped(
        {"a.png": png(8, 8), "b.png": png(9, 9), "captions.csv": b"image,caption\n" + b"a.png,x\n" * 1_000_000}
    ),
    "one caption": lambda: zipped(
        {
            "a.png": png(8, 8),
            "b.png": png(9, 9),
            "captions.csv": b"image,caption\na.png," + b"x" * 9 * MB + b"\nb.png,y\n",
        }
    ),
    "brackets": lambda: zipped(
        {"a.png": png(8, 8), "b.png": png(9, 9), "data.jsonl": b'{"image": "a.png", "caption": ' + b"[" * MB}
    ),
}


# ---------------------------------------------------------------- the ways of a zip


def as_photos(engine: AlignmentEngine, path: Path) -> str:
    """Add it to photos: "decoded" if any came of it, or the code of what is said; skipped files need a sentence too."""
    try:
        steps = list(add_archive(engine, engine.no_photos(), path))
    except InputError as error:
        check_said(error)
        return error.code
    for step in steps:
        for skip in step.skipped:
            check_said(skip.error)
    return "decoded" if len(steps[-1].photos) else steps[-1].skipped[0].error.code


def as_trial(engine: AlignmentEngine, path: Path) -> str:
    """Measure it, likewise."""
    try:
        *_, last = measure_archive(engine, path)
    except InputError as error:
        check_said(error)
        return error.code
    assert isinstance(last, EvalResult)
    return "decoded"


def opened(path: Path) -> str:
    """Read all that is in it, likewise."""
    try:
        with open_archive(path) as archive:
            for name in archive.members:
                try:
                    archive.read(name, 30)
                except InputError as error:
                    check_said(error)
        return "decoded"
    except InputError as error:
        check_said(error)
        return error.code


WAYS = (as_photos, as_trial)
