"""Read pictures out of WebDataset shards, parquet tables and Hub data sets.

They are written to disk once, named after the hash of their bytes; a name inside a shard never becomes a path. Shards
are tar files whose members share a key, `0001.jpg` with `0001.txt` or `0001.json`. A shard is read once, from start to
end, and an index of it is kept, so that a second read opens no shard.

Source: the file layout of WebDataset, and img2dataset's use of it.
"""

import hashlib
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from glob import glob, has_magic
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

from alignment.atomic import write_file
from alignment.checksum import read_json_checksummed, sha256_of, write_json_checksummed
from alignment.data.collector import Collector, RawAnnotation
from alignment.data.encoding import decode_text
from alignment.data.files import canonical_split, find_files, is_hidden, nfc, split_from_path
from alignment.data.records import TEXT_PARTS, UnreadableTable, find_columns, read_record
from alignment.preprocess import IMAGE_SUFFIXES, join_first

MAX_PICTURE_BYTES = 128 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_NUM_PROBED = 100  # members in which the first sample of a shard is looked for
_INDEX_VERSION = 5
_CAPTION_PARTS = ("json", *TEXT_PARTS)
_DAMAGED = (tarfile.TarError, EOFError, ValueError, OverflowError)  # what tarfile raises on bytes that are no tar


def cache_folder() -> Path:
    """Return $ALIGNMENT_CACHE, else `~/.cache/alignment`."""
    return Path(os.path.abspath(Path(os.environ.get("ALIGNMENT_CACHE") or "~/.cache/alignment").expanduser()))


def store_image(data: bytes, suffix: str, folder: Path) -> Path:
    """Write a picture unless it is there, so that one repeated for each caption is one file."""
    file = folder / f"{hashlib.sha256(data).hexdigest()}{suffix.lower() or '.jpg'}"
    try:
        is_whole = file.stat().st_size == len(data) and file.read_bytes() == data
    except OSError:
        is_whole = False
    if not is_whole:
        write_file(file, data, fsync=False)  # not synced: a file cut off by a crash is found here
    return file


def _has_bytes(cell: object) -> bool:
    return isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes)


def _store_cell(cell: Mapping[str, Any], folder: Path) -> str | Path:
    """Return the path of a cell's picture, whose bytes are written to `folder`; "" if there is none."""
    path = Path(cell.get("path") or "")
    if _has_bytes(cell):
        return store_image(cell["bytes"], path.suffix, folder)
    return path if path.is_file() else ""


def read_parquet(file: Path, collector: Collector) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read the records of a parquet file; pictures in it are written to the image store."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        message = "reading parquet takes pyarrow: pip install '.[hub]', or save it as CSV"
        raise UnreadableTable(message) from error
    if not collector.trusted:
        raise UnreadableTable("parquet is not read here; save it as CSV")
    folder = cache_folder() / "pictures"
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                cells = {name: cell for name, cell in record.items() if _has_bytes(cell)}
                yield file.name, record | {name: _store_cell(cell, folder) for name, cell in cells.items()}
    except ArrowException as error:
        raise UnreadableTable(f"it is damaged: {error}") from error


def read_hub(source: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read a data set of the Hub; its pictures are written to a folder in the library's own cache."""
    name, _, revision = source.as_posix().partition("@")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"There is no {name} here, so it is taken for a data set on the Hugging Face Hub; reading one needs the "
            "library `datasets`: install this project with its extra `hub` (pip install '.[hub]')."
        ) from error
    try:
        splits = datasets.get_dataset_split_names(name, revision=revision or None)
        splits = [split for split in splits if canonical_split(split) == collector.split] or splits
        tables = {split: datasets.load_dataset(name, revision=revision or None, split=split) for split in splits}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no {name} here, and the Hugging Face Hub did not provide a data set of that name "
            f"({type(error).__name__}: {error}); check the spelling and the network."
        ) from error
    folder = Path(datasets.config.HF_DATASETS_CACHE, "alignment", name.replace("/", "___"))
    for split, table in tables.items():
        column = find_columns(tuple(table.column_names)).image
        if column is None:
            raise ValueError(f"None of the columns of {name} ({join_first(table.column_names, 9)}) names an image.")
        for record in table.cast_column(column, datasets.Image(decode=False)):
            row, image = read_record(record), _store_cell(record[column] or {}, folder)
            yield row._replace(image=image, split=row.split or split, id=row.id or Path(image).stem)


class Shard(NamedTuple):
    """The content of a tar file."""

    rows: list[tuple[str, list[str], str, str]]  # file name in the image store, captions, split, id
    skipped: list[tuple[str, str]]  # reason, what
    repaired: list[tuple[str, str]]


def find_shards(source: Path) -> list[Path]:
    """Find the shards of a path: one file, those in a folder or directly below it, or all those of a pattern.

    A pattern has braces, as in `train-{000..009}.tar`, or wildcards, as in `train-*.tar`, or both.
    """
    if source.is_file():
        return [source] if source.suffix.lower() == ".tar" else []
    if source.is_dir():
        shards = find_files(source, "*.tar")
        return shards if any(map(_has_samples, shards)) else []
    pattern = os.fspath(source)
    if source.suffix.lower() != ".tar" or not (has_magic(pattern) or "{" in pattern):
        return []
    names = expand_braces(pattern)
    found = {name: sorted(filter(os.path.isfile, glob(name) if has_magic(name) else [name])) for name in names}
    if missing := [name for name, shards in found.items() if not shards]:
        raise FileNotFoundError(
            f"Of the {len(names)} shards {source}, {len(missing)} are not there (the first is "
            f"{os.path.basename(missing[0])}); check the pattern, or copy them."
        )
    return [Path(shard) for shards in found.values() for shard in shards]


def expand_braces(pattern: str) -> list[str]:
    """List the at most `MAX_SHARDS` names of a pattern: `{000..009}` counts with leading zeros, `{train,val}` lists."""
    choices, end = list[list[str]](), 0
    for found in _BRACES.finditer(pattern):
        choices.append([pattern[end : found.start()]])
        end = found.end()
        if found[3] is not None:
            choices.append(found[3].split(","))
        else:
            numbers = range(int(found[1]), min(int(found[2]), int(found[1]) + MAX_SHARDS) + 1)
            choices.append([str(number).zfill(len(found[1])) for number in numbers])
    names = ["".join(parts) + pattern[end:] for parts in islice(product(*choices), MAX_SHARDS + 1)]
    if not 1 <= len(names) <= MAX_SHARDS:
        raise ValueError(f"The pattern {pattern} stands for none or more than {MAX_SHARDS:,} shards; mend its numbers.")
    return names


def _has_samples(shard: Path) -> bool:
    """Distinguish a shard from a tar file of pictures only, which may be there unpacked too."""
    parts = defaultdict[str, set[str]](set)
    with suppress(*_DAMAGED):
        for _, member in islice(_headers(shard), _NUM_PROBED):
            key, part = _key_and_part(member.name)
            parts[key].add("picture" if _is_image(part) else part)
    return any("picture" in found and found & {*_CAPTION_PARTS} for found in parts.values())


def read_shard(file: Path, collector: Collector) -> Iterator[RawAnnotation]:
    """Read the samples of a shard; the split is in its name, that of its folder, or the JSON of a sample."""
    split = split_from_path(file, file.parent.parent)
    if split and not collector.wants(split):
        return
    store = cache_folder() / "pictures"
    shard = _read_indexed(file, store)
    for reason, what in shard.skipped:
        collector.skip(reason, what)
    for reason, what in shard.repaired:
        collector.repair(reason, what)
    for name, captions, own_split, identity in shard.rows:
        yield RawAnnotation(store / name, captions, split or own_split, identity)


def _read_indexed(file: Path, store: Path) -> Shard:
    """Read the index of a shard, or the shard if it has changed since or pictures are missing from the store."""
    state = file.stat()
    identity = [_INDEX_VERSION, os.path.abspath(file), state.st_size, state.st_mtime_ns]
    index = cache_folder() / "shards" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):  # without an index, or where something is damaged
        content = read_json_checksummed(index)
        if all(_is_unchanged(store / name, size, index.stat()) for name, size in content["sizes"].items()):
            return Shard(**content["shard"])
    shard = _unpack(file, store)
    sizes = {name: (store / name).stat().st_size for name, *_ in shard.rows}
    write_json_checksummed(index, {"shard": shard._asdict(), "sizes": sizes})
    return shard


def _is_unchanged(picture: Path, size: int, index: os.stat_result) -> bool:
    """Compare a picture with its name, which is its hash; one that is older than the index is not read."""
    state = picture.stat()
    is_known = picture.is_file() and state.st_size == size
    return is_known and (state.st_mtime_ns <= index.st_mtime_ns or sha256_of(picture) == picture.stem)


def _unpack(file: Path, store: Path) -> Shard:
    """Group the members of a shard by their key, in any order; of a repeated key the first of each part is kept."""
    shard = Shard([], [], [])
    samples: dict[str, dict[str, Any]] = {}
    for name, data in _members(file, shard):
        key, part = _key_and_part(name)
        sample = samples.setdefault(key, {"__key__": key})
        field = "image" if _is_image(part) else part
        if field in sample:
            kind = "pictures" if field == "image" else "captions"
            shard.skipped.append((f"further {kind} of a sample", name))
        elif field == "image":
            sample["image"] = store_image(data, f".{part}", store).name
        else:
            sample[part] = _read_captions(data, name, shard)
    for key, sample in samples.items():
        if "image" in sample:
            row = read_record(sample)
            shard.rows.append((sample["image"], list(row.captions), row.split, row.id))
        else:
            shard.skipped.append(("samples without a picture", key))
    return shard


def _read_captions(data: bytes, name: str, shard: Shard) -> Any:
    """Decode a text part, and parse a JSON part."""
    try:
        text, encoding = decode_text(data)
        content = json.loads(text) if name.lower().endswith(".json") else text
    except (ValueError, RecursionError):
        shard.skipped.append(("unreadable captions", name))
        return None
    if not encoding.is_utf8:
        shard.repaired.append(("files not in UTF-8", f"{name} as {encoding.name}"))
    return content


def _members(file: Path, shard: Shard) -> Iterator[tuple[str, bytes]]:
    """Read the members that are parts of a sample: regular files up to a size, never links or devices."""
    try:
        for tar, member in _headers(file):
            name = member.name.encode(errors="replace").decode()  # names may be any bytes
            _, part = _key_and_part(name)
            if not _is_image(part) and part not in _CAPTION_PARTS:
                if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    shard.skipped.append(("pictures that are hidden, or whose name is not KEY.jpg", name))
            elif not member.isreg() or member.issparse():
                shard.skipped.append(("links and other members that are no files", name))
            elif member.size > (MAX_PICTURE_BYTES if _is_image(part) else MAX_TEXT_BYTES):
                shard.skipped.append(("members of too many bytes", name))
            elif (content := tar.extractfile(member)) is not None:
                yield name, content.read()
    except _DAMAGED:
        shard.skipped.append(("shards damaged or cut off, read up to there", file.name))


def _headers(file: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Read a tar file from start to end; a member that ends beyond the end of the file is an error."""
    size = file.stat().st_size
    with file.open("rb") as handle, tarfile.open(fileobj=handle, mode="r|", bufsize=2**20) as tar:
        for member in tar:
            if tar.offset - tarfile.BLOCKSIZE >= size:  # skipping it would take as long as its declared size
                raise tarfile.ReadError(f"{member.name} ends beyond the file")
            tar.members = []  # type: ignore[attr-defined]  # otherwise all headers stay in memory
            yield tar, member


def _key_and_part(name: str) -> tuple[str, str]:
    """Split `a/0001.jpg` into the key `a/0001` and the part `jpg`; the part of hidden files or those without is ""."""
    folder, _, base = nfc(name).rpartition("/")
    stem, _, part = base.partition(".")
    if not stem or any(map(is_hidden, folder.removeprefix("./").split("/"))):
        return name, ""
    return (f"{folder}/{stem}" if folder else stem).removeprefix("./"), part.lower()


def _is_image(part: str) -> bool:
    return f".{part}" in IMAGE_SUFFIXES
