"""WebDataset shards: tar files whose members share a key, `0001.jpg` with `0001.txt` or `0001.json`.

A shard is read once from front to back. Its pictures go to the store, under the hash of their bytes; no member's name
ever becomes a path. Beside them a short index says what was in the shard, so that a second read opens no picture.

Source: the file layout of WebDataset, and img2dataset's way of filling it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from glob import glob, has_magic
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

from alignment.atomic import read_json_checksummed, sha256_of, write_json_checksummed
from alignment.pairs.collection import Collection, Row
from alignment.pairs.files import PICTURES, SPLITS, is_hidden, near, split_of
from alignment.pairs.lookup import composed
from alignment.pairs.store import cache_folder, stored
from alignment.pairs.values import TEXT_PARTS, row_of

MAX_PICTURE_BYTES = 128 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_SHARDS = 100_000

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_PROBED = 100  # members of a shard to look at before calling it none
_INDEX_VERSION = 4

_DAMAGED = (tarfile.TarError, EOFError, ValueError, OverflowError)  # what tarfile raises on bytes that are no tar


class Shard(NamedTuple):
    """What was found in a tar file.

    Attributes:
        rows: (file name in the store, captions, split, id), one a sample.
        skipped: (reason, what) for what was left out.
    """

    rows: list[tuple[str, list[str], str, str]]
    skipped: list[tuple[str, str]]


# ---------------------------------------------------------------- finding shards


def find_shards(source: Path) -> list[Path]:
    """Find the shards a path means: one file, those in a folder up to two deep, or those of a pattern.

    A pattern has braces, as in `train-{000..009}.tar`, or wildcards, as in `train-*.tar`, or both.

    Raises:
        FileNotFoundError: when shards of the pattern are missing.
    """
    if source.is_file():
        return [source] if source.suffix.lower() == ".tar" else []
    if source.is_dir():
        shards = near(source, "*.tar")
        return shards if shards and any(map(_holds_samples, shards)) else []
    pattern = os.fspath(source)
    if source.suffix.lower() != ".tar" or not (has_magic(pattern) or "{" in pattern):
        return []
    names = expand_braces(pattern)
    found = {name: sorted(filter(os.path.isfile, glob(name) if has_magic(name) else [name])) for name in names}
    missing = [name for name, shards in found.items() if not shards]
    if missing:
        raise FileNotFoundError(
            f"Of the {len(names)} shards {source}, {len(missing)} are not there (the first is "
            f"{os.path.basename(missing[0])}); check the pattern, or copy them."
        )
    return [Path(shard) for shards in found.values() for shard in shards]


def expand_braces(pattern: str) -> list[str]:
    """List what a pattern stands for: `{000..009}` counts with its leading zeros, `{train,val}` lists.

    Raises:
        ValueError: when that is more than `MAX_SHARDS`, or nothing.
    """
    literals, choices, end = [], [], 0
    for found in _BRACES.finditer(pattern):
        literals.append(pattern[end : found.start()])
        end = found.end()
        if found[3] is not None:
            choices.append(found[3].split(","))
        else:
            numbers = range(int(found[1]), min(int(found[2]), int(found[1]) + MAX_SHARDS) + 1)
            choices.append([str(number).zfill(len(found[1])) for number in numbers])
    names = [
        "".join(part for pair in zip(literals, chosen, strict=True) for part in pair) + pattern[end:]
        for chosen in islice(product(*choices), MAX_SHARDS + 1)
    ]
    if not 1 <= len(names) <= MAX_SHARDS:
        raise ValueError(f"The pattern {pattern} stands for none or more than {MAX_SHARDS:,} shards; mend its numbers.")
    return names


def _holds_samples(shard: Path) -> bool:
    """Tell a shard from a tar file of nothing but pictures, beside which they may lie unpacked."""
    parts: dict[str, set[str]] = {}
    try:
        for _, member in islice(_headers(shard), _PROBED):
            key, part = _key_and_part(member.name)
            parts.setdefault(key, set()).add("picture" if f".{part}" in PICTURES else part)
    except _DAMAGED:
        pass
    return any("picture" in found and found & {"json", *TEXT_PARTS} for found in parts.values())


# ---------------------------------------------------------------- reading one


def read_shard(file: Path, into: Collection) -> Iterator[Row]:
    """Read the samples of a shard; the split is in its name, in its folder's, or in the JSON of a sample."""
    split = split_of(file) or (file.parent.name if file.parent.name.lower() in SPLITS else "")
    if split and not into.wants(split):
        return
    store = cache_folder() / "pictures"
    shard = _indexed(file, store)
    for reason, what in shard.skipped:
        into.skip(reason, what)
    for name, captions, own_split, identity in shard.rows:
        yield Row(store / name, captions, split or own_split, identity)


def _indexed(file: Path, store: Path) -> Shard:
    """Read a shard, or the index of it if the shard has not changed since and its pictures are still there."""
    state = file.stat()
    facts = [_INDEX_VERSION, os.path.abspath(file), state.st_size, state.st_mtime_ns]
    index = cache_folder() / "shards" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"
    try:
        about = read_json_checksummed(index)
        if all(_is_as_written(store / name, size, index.stat()) for name, size in about["sizes"].items()):
            return Shard(**about["shard"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is none, it was written by another version, or something is damaged
    shard = _unpack(file, store)
    sizes = {row[0]: (store / row[0]).stat().st_size for row in shard.rows}
    write_json_checksummed(index, {"shard": shard._asdict(), "sizes": sizes})
    return shard


def _is_as_written(picture: Path, size: int, index: os.stat_result) -> bool:
    """Whether a picture is what its name says; one that nobody wrote to after the index is not read again."""
    state = picture.stat()
    if not picture.is_file() or state.st_size != size:
        return False
    return state.st_mtime_ns <= index.st_mtime_ns or sha256_of(picture) == picture.stem


def _unpack(file: Path, store: Path) -> Shard:
    """Gather the members of a shard by their key, in whatever order they come.

    Where a key comes again, the first of each part counts: which of the others belong together, nobody can tell.
    """
    shard = Shard([], [])
    samples: dict[str, dict[str, Any]] = {}
    for name, data in _members(file, shard):
        key, part = _key_and_part(name)
        sample = samples.setdefault(key, {"__key__": key})
        if f".{part}" in PICTURES and "image" in sample:
            shard.skipped.append(("further pictures of a sample", name))
        elif f".{part}" in PICTURES:
            sample["image"] = stored(data, f".{part}", store).name
        elif part in sample:
            shard.skipped.append(("further captions of a sample", name))
        else:
            sample[part] = _decoded(data, name, shard)
    for key, sample in samples.items():
        if "image" not in sample:
            shard.skipped.append(("samples without a picture", key))
            continue
        row = row_of(sample)
        shard.rows.append((sample["image"], list(row.captions), row.split, row.id))
    return shard


def _members(file: Path, shard: Shard) -> Iterator[tuple[str, bytes]]:
    """Read the members that are parts of a sample: regular files of a sensible size, never links or devices."""
    try:
        for tar, member in _headers(file):
            name = member.name.encode(errors="replace").decode()  # names may be any bytes
            _, part = _key_and_part(name)
            if f".{part}" not in PICTURES and part not in ("json", *TEXT_PARTS):
                if Path(name).suffix.lower() in PICTURES:
                    shard.skipped.append(("pictures that are hidden, or whose name is not KEY.jpg", name))
                continue
            if not member.isreg() or member.issparse():
                shard.skipped.append(("links and other members that are no files", name))
            elif member.size > (MAX_PICTURE_BYTES if f".{part}" in PICTURES else MAX_TEXT_BYTES):
                shard.skipped.append(("members of too many bytes", name))
            elif (content := tar.extractfile(member)) is not None:
                yield name, content.read()
    except _DAMAGED:
        shard.skipped.append(("shards damaged or cut off, read up to there", file.name))


def _headers(file: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Go through a tar file from front to back; it is an error for a member to reach beyond the end of the file."""
    size = file.stat().st_size
    with file.open("rb") as handle, tarfile.open(fileobj=handle, mode="r|", bufsize=2**20) as tar:
        for member in tar:
            if tar.offset - tarfile.BLOCKSIZE >= size:  # else passing over it would take as long as it claims to be
                raise tarfile.ReadError(f"{member.name} ends beyond the file")
            tar.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
            yield tar, member


def _key_and_part(name: str) -> tuple[str, str]:
    """Split `a/0001.jpg` into the key `a/0001` and the part `jpg`; the part of what is hidden or has none is ""."""
    folder, _, base = composed(name).rpartition("/")
    stem, _, part = base.partition(".")
    if not stem or any(map(is_hidden, folder.removeprefix("./").split("/"))):
        return name, ""
    return (f"{folder}/{stem}" if folder else stem).removeprefix("./"), part.lower()


def _decoded(data: bytes, name: str, shard: Shard) -> Any:
    """Read a text part, or a JSON part as what it says."""
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text) if name.lower().endswith(".json") else text
    except (ValueError, RecursionError):
        shard.skipped.append(("unreadable captions", name))
        return None
