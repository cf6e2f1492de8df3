"""An index's folder: files that are never changed, and a list of them that is replaced at one stroke.

| file                | what it holds |
|---------------------|---------------|
| `index.json`        | the list: which segments there are, of which files, with sizes and hashes |
| `HASH.safetensors`  | a segment: `ids`, `rows` (float16) and tags, see `alignment.index.tags` |
| `HASH.codes`        | its codes, as faiss writes them; small segments have none |
| `HASH.dead`         | positions of its rows that are dead, int32; missing where none is |

A file is called by the hash of its content, is written under another name first, and is on the disk before the list
names it; what the list does not name is no part of the index. So whoever is killed, at whatever moment, leaves the old
index or the new one. One writer at a time; readers need not know of it.

Opening reads the list, and of each file its size and its first 4096 bytes: the same work for any number of rows. Rot
further on is found by `verify`, which reads everything.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.atomic import TEMP_PREFIX, fsync_path, wrap_write_errors, write_file
from alignment.index.codes import Codes, StoredCodes
from alignment.index.exact import Positions
from alignment.index.segment import Segment
from alignment.index.tags import ENDS, NAMES, ROWS, Tags

LIST = "index.json"
_FORMAT = 1
_HEAD = 4096
_CHUNK = 1 << 20
_OURS = re.compile(r"[0-9a-f]{16}\.(safetensors|codes|dead)")
_KINDS = {"I64": np.int64, "I32": np.int32, "F16": np.float16, "U8": np.uint8}


@dataclass(frozen=True)
class File:
    """A file that the list names.

    Attributes:
        name: of the file.
        size: in bytes.
        sha256: of all of it.
        head: sha256 of its first 4096 bytes.
    """

    name: str
    size: int
    sha256: str
    head: str


@dataclass(frozen=True)
class Entry:
    """A segment that the list names.

    Attributes:
        num_rows: dead ones too.
        rows: its file of rows.
        codes: its file of codes, if it has one.
        dead: its file of dead rows, if it has one.
    """

    num_rows: int
    rows: File
    codes: File | None = None
    dead: File | None = None

    @property
    def files(self) -> tuple[File, ...]:
        """All of them."""
        return tuple(file for file in (self.rows, self.codes, self.dead) if file is not None)


@dataclass(frozen=True)
class Listing:
    """What `index.json` says.

    Attributes:
        embed_dim: width of the rows.
        entries: the segments.
        about: whatever the owner wants to be told.
    """

    embed_dim: int
    entries: tuple[Entry, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- the list


def read_listing(folder: Path) -> Listing:
    """Read what a folder holds.

    Raises:
        FileNotFoundError: when there is no index.
        ValueError: when the list is damaged.
    """
    try:
        content = json.loads((folder / LIST).read_text("utf-8"))
        seal = content.pop("sha256")
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version reads {_FORMAT}")
        if seal != _seal(content):
            raise ValueError("it was changed")
        entries = tuple(
            Entry(entry["num_rows"], *(File(**entry[part]) if entry[part] else None for part in _PARTS))  # type: ignore[arg-type]
            for entry in content["entries"]
        )
        return Listing(int(content["embed_dim"]), entries, content["about"])
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no index in {folder}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The index in {folder} is damaged: of {LIST} {error!r}.") from error


_PARTS = ("rows", "codes", "dead")


def write_listing(folder: Path, listing: Listing) -> None:
    """Put a new list in the place of the old one; the index is the new one from here on."""
    content = {"format": _FORMAT, **asdict(listing)}
    content = json.loads(json.dumps(content))  # tuples become lists, as they will be read
    text = json.dumps({**content, "sha256": _seal(content)}, ensure_ascii=False, indent=1)
    write_file(folder / LIST, text.encode("utf-8", "surrogatepass"))


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sweep(folder: Path, listing: Listing) -> None:
    """Delete files of ours that the list does not name; one that cannot be deleted yet stays until the next time."""
    named = {file.name for entry in listing.entries for file in entry.files}
    for path in folder.iterdir():
        if (_OURS.fullmatch(path.name) and path.name not in named) or path.name.startswith(TEMP_PREFIX):
            try:
                path.unlink()
            except OSError:  # Windows: somebody has it mapped
                continue


# ---------------------------------------------------------------- writing


def write_segment(folder: Path, ids: Positions, blocks: Iterable[NDArray[np.float16]], width: int, tags: Tags) -> Entry:
    """Write a segment; the rows come in blocks, in the order of the ids."""
    parts: list[tuple[str, str, Sequence[int], Iterable[NDArray]]] = [
        ("ids", "I64", (len(ids),), [ids]),
        (ENDS, "I64", tags.arrays[ENDS].shape, [tags.arrays[ENDS]]),
        (ROWS, "I32", tags.arrays[ROWS].shape, [tags.arrays[ROWS]]),
        ("rows", "F16", (len(ids), width), blocks),
        (NAMES, "U8", tags.arrays[NAMES].shape, [tags.arrays[NAMES]]),
    ]
    header, end = {}, 0
    for name, kind, shape, _ in parts:
        start, end = end, end + int(np.prod(shape)) * np.dtype(_KINDS[kind]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # the data begin at a multiple of 64

    def write(path: Path) -> None:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, kind, _, arrays in parts:
                for array in arrays:
                    file.write(np.ascontiguousarray(array, _KINDS[kind]).data)

    return Entry(len(ids), _written(folder, ".safetensors", write))


def write_codes(folder: Path, codes: Codes) -> File:
    """Write a segment's codes."""
    return _written(folder, ".codes", codes.write)


def write_dead(folder: Path, dead: Positions) -> File:
    """Write which rows of a segment are dead."""
    return _written(folder, ".dead", lambda path: path.write_bytes(dead.astype(np.int32).data))


def _written(folder: Path, suffix: str, write: Callable[[Path], object]) -> File:
    """Have a file written under a name that nobody reads, and call it by its content."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / (TEMP_PREFIX + secrets.token_hex(8))
    try:
        with wrap_write_errors(fresh):  # faiss has its own
            write(fresh)
        fsync_path(fresh)
        file = _describe(fresh, suffix)
        os.replace(fresh, folder / file.name)
    finally:
        fresh.unlink(missing_ok=True)
    return file


def _describe(path: Path, suffix: str) -> File:
    with path.open("rb") as file:
        head = file.read(_HEAD)
        whole = hashlib.sha256(head)
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return File(
        whole.hexdigest()[:16] + suffix, path.stat().st_size, whole.hexdigest(), hashlib.sha256(head).hexdigest()
    )


# ---------------------------------------------------------------- reading


def map_segment(folder: Path, entry: Entry, embed_dim: int) -> Segment:
    """Map a segment into memory, whatever its size.

    Raises:
        FileNotFoundError: when a file is gone.
        ValueError: when one is damaged.
    """
    data = _mapped(folder, entry.rows)
    try:
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        arrays = {name: _array(data, 8 + length, part) for name, part in header.items()}
        rows = arrays.pop("rows")
        if rows.shape != (entry.num_rows, embed_dim) or arrays["ids"].shape != (entry.num_rows,):
            raise ValueError(f"it holds rows of shape {rows.shape}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The index file {folder / entry.rows.name} is damaged: {error}.") from error
    dead = np.empty(0, np.int64)
    if entry.dead:
        dead = _mapped(folder, entry.dead).view(np.int32).astype(np.int64)
    codes = None
    if entry.codes:
        path = folder / entry.codes.name
        codes = StoredCodes(_mapped(folder, entry.codes), entry.num_rows, str(path))
    return Segment(arrays.pop("ids"), rows, Tags(arrays), codes, dead)


def _array(data: NDArray[np.uint8], start: int, part: Mapping[str, Any]) -> NDArray:
    begin, end = (start + offset for offset in part["data_offsets"])
    return data[begin:end].view(_KINDS[part["dtype"]]).reshape(part["shape"])


def _mapped(folder: Path, file: File) -> NDArray[np.uint8]:
    """Map a file after a look at its size and its first bytes."""
    path = folder / file.name
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size != file.size:
            raise ValueError(f"The index file {path} is damaged: it has {size} bytes instead of {file.size}.")
        data = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    if hashlib.sha256(data[:_HEAD].tobytes()).hexdigest() != file.head:
        raise ValueError(f"The index file {path} is damaged: its first bytes are not what was written.")
    return data


def verify(folder: Path, listing: Listing) -> None:
    """Read every byte and compare it with what was written.

    Raises:
        FileNotFoundError: when a file is gone.
        ValueError: naming the file that has changed.
    """
    for file in (file for entry in listing.entries for file in entry.files):
        path = folder / file.name
        if _describe(path, path.suffix) != file:
            raise ValueError(f"The index file {path} is damaged: its content is not what was written.")
