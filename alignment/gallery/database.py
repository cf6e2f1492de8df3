"""Read and write `gallery.db`, the SQLite file that a gallery is.

Place in the flow: `build -> gallery.db (here) -> index, search`. Tables:

- `picture`, `caption`: one record a row; `id` as in every index, `embedding` names a row of that table;
- `embedding`: half-precision vectors by a hash of model and content; `thumbnail`: WebP by the SHA-256 of the picture;
- `meta`: metadata, ids in order of position, cohort; `scanned`: files that an unfinished build has hashed.

Embeddings and thumbnails are committed as they are made. Records and metadata are replaced in one transaction, so a
reader sees the old gallery or the new one. Every row has a CRC: SQLite does not notice a flipped bit in a value.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, rebuild_command

Kind: TypeAlias = Literal["picture", "caption"]
Record: TypeAlias = tuple[Any, ...]

DATABASE = "gallery.db"
KINDS: tuple[Kind, Kind] = ("picture", "caption")
SCHEMA = """
CREATE TABLE meta(key TEXT, value, crc INTEGER);
CREATE TABLE embedding(id INTEGER PRIMARY KEY, key INTEGER UNIQUE, embeds BLOB, crc INTEGER);
CREATE TABLE thumbnail(id INTEGER PRIMARY KEY, sha256 BLOB UNIQUE, webp BLOB, crc INTEGER);
CREATE TABLE picture(id INTEGER PRIMARY KEY, name TEXT, source BLOB, folder BLOB, captions TEXT,
    credit TEXT, size INTEGER, mtime_ns INTEGER, sha256 BLOB, embedding INTEGER, crc INTEGER);
CREATE TABLE caption(id INTEGER PRIMARY KEY, name TEXT, text TEXT, lang TEXT, scene TEXT, topic TEXT,
    embedding INTEGER, crc INTEGER);
CREATE TABLE scanned(source BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT) WITHOUT ROWID;
CREATE INDEX picture_name ON picture(name);
"""
VERSION = 1
PAGE_BYTES = 65536  # 31 rows of 1,024 halves; a row of 2 kB wastes half of a page of 4,096
_CACHE_KB = 16384
_TIMEOUT_S = 60.0  # to wait for the commit of another process
COHORT = "cohort."
_TAGS_CACHED = 16  # eight bytes for each item
_LIST = "(SELECT value FROM json_each(?))"
_TAG = {"picture": "folder", "caption": "lang"}
_NO_ROOM = 16 * 2**20
_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EAGAIN,
}


def connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
    """Open a database file; transactions are begun explicitly. The caller serialises the use by threads."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, _TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True)
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KB}")
    return connection


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into an `OSError` that names the file, or a `ValueError` if its content is damaged."""
    try:
        yield
    except sqlite3.Error as error:
        number = _ERRNO.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if number is None:
            raise ValueError(str(error)) from error
        if number == errno.EIO and shutil.disk_usage(path.parent).free < _NO_ROOM:
            number = errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


def crc_of(row: Record) -> int:
    """Compute the checksum of a record's values, its `crc` left out."""
    return zlib.crc32(repr(row).encode("utf-8", "surrogatepass")) - 2**31  # signed: four bytes in SQLite


def crc_of_blob(key: object, blob: bytes) -> int:
    """Compute the checksum of a blob and of the key that it belongs to."""
    return zlib.crc32(blob, zlib.crc32(repr(key).encode())) - 2**31


def to_halves(blobs: Sequence[bytes], embed_dim: int) -> Tensor:
    """Decode embeddings: (n, embed_dim) float16."""
    data = np.frombuffer(b"".join(blobs), "<f2").astype(np.float16)
    return torch.from_numpy(data.reshape(len(blobs), embed_dim))


class GalleryDatabase:
    """A finished gallery, read-only. Methods may be called from several threads.

    Attributes:
        folder: the gallery's.
        metadata: which model made it, from what.
        embed_dim: width of its embeddings.
        build: a token that changes with every finished build.
    """

    def __init__(self, folder: Path, model: str = "MODEL") -> None:
        """Open a gallery; see `open`."""
        self.folder, self._path = folder, folder / DATABASE
        self.metadata = GalleryMetadata("", model, 1.0, None)  # until it is read
        self._lock = threading.Lock()
        self._tagged = lru_cache(_TAGS_CACHED)(self._select_tagged)
        try:
            with sqlite_errors(self._path):
                self._connection = _connect_recovered(self._path)
        except ValueError as error:
            raise self._damaged(error) from error
        try:
            self._read_meta()
        except (TypeError, KeyError) as error:
            self.close()
            raise self._damaged(error) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path, model: str = "MODEL") -> GalleryDatabase:
        """Open the gallery in a folder, whichever model made it.

        Args:
            folder: with `gallery.db`.
            model: name of the one in use, for the advice in the errors.

        Raises:
            FileNotFoundError: when there is no finished gallery.
            PermissionError: when it may not be read.
            ValueError: when it is damaged. All say what to run.
        """
        try:
            with (folder / DATABASE).open("rb"):  # for the operating system's own errors
                return cls(folder, model)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"There is no gallery in {folder}. Build one: {rebuild_command(folder, model)}"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _read_meta(self) -> None:
        if (version := self._query("PRAGMA user_version")[0][0]) > VERSION:
            raise self._damaged(f"it has the format {version} of a later version of this program")
        tables = self._query("SELECT 1 FROM sqlite_schema WHERE name = 'meta'")
        meta = self._meta("key NOT LIKE 'cohort.%'") if tables else {}
        if "metadata" not in meta:
            raise FileNotFoundError(errno.ENOENT, "no finished gallery", str(self._path))
        header = json.loads(meta["metadata"])
        self.metadata = GalleryMetadata(**{**header, "source": source_from_folder(self.folder, header["source"])})
        self.embed_dim, self.build = int(meta["embed_dim"]), str(meta["build"])
        self._ids = {kind: torch.from_numpy(np.frombuffer(meta[kind], "<i8").astype(np.int64)) for kind in KINDS}

    def _meta(self, where: str) -> dict[str, Any]:
        rows = self._query(f"SELECT key, value, crc FROM meta WHERE {where}")
        for key, value, crc in rows:
            if crc != crc_of((key, value)):
                raise self._damaged(f"the checksum of {key} is wrong")
        return {key: value for key, value, _ in rows}

    @contextmanager
    def _reading(self) -> Iterator[Callable[..., list[Record]]]:
        """Yield a function that runs queries, all of which see the same state of the file."""
        try:
            with self._lock, sqlite_errors(self._path):
                self._connection.execute("BEGIN")
                try:
                    yield lambda sql, values=(): self._connection.execute(sql, values).fetchall()
                finally:
                    self._connection.execute("ROLLBACK")
        except ValueError as error:
            raise self._damaged(error) from error

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[Record]:
        with self._reading() as read:
            return read(sql, values)

    def _damaged(self, what: object) -> ValueError:
        command = rebuild_command(self.folder, self.metadata.model, self.metadata)
        return ValueError(f"The gallery in {self.folder} is damaged ({what}). Rebuild it with: {command}")

    # ------------------------------------------------------------ records

    def ids(self, kind: Kind, tag: str | None = None) -> Tensor:
        """List ids in order of position, (n,) int64.

        Args:
            kind: of the items.
            tag: only pictures below this folder, however deep, or captions of this language.
        """
        return self._ids[kind] if tag is None else self._tagged(kind, tag)

    def _select_tagged(self, kind: Kind, tag: str) -> Tensor:
        if kind == "caption":
            rows = self._query("SELECT id FROM caption WHERE lang = ?", (tag,))
        else:
            folder = os.fsencode(tag)
            values = folder, folder + b"/", folder + b"0"  # "0" follows "/"
            rows = self._query("SELECT id FROM picture WHERE folder = ? OR (folder > ? AND folder < ?)", values)
        found = torch.tensor([id for (id,) in rows], dtype=torch.int64)
        return self._ids[kind][torch.isin(self._ids[kind], found)]

    def tags(self, kind: Kind) -> dict[str, int]:
        """Count the pictures below each folder, or the captions of each language ("" if unknown)."""
        counts: Counter[str] = Counter()
        for tag, count in self._query(f"SELECT {_TAG[kind]}, count(*) FROM {kind} GROUP BY 1"):
            if kind == "caption":
                counts[tag] += count
                continue
            names = os.fsdecode(tag).split("/")
            counts.update({"/".join(names[:end]): count for end in range(1, len(names) + 1) if names[0]})
        return dict(sorted(counts.items()))

    def pictures(self, ids: Sequence[int]) -> list[Picture]:
        """Fetch records, in the order of their ids.

        Raises:
            KeyError: when one is gone, as the gallery was replaced meanwhile.
            ValueError: when one is damaged.
        """
        root = self.metadata.source
        return [picture_from(row, root) for row in self._records("picture", ids)]

    def captions(self, ids: Sequence[int]) -> list[Caption]:
        """Fetch records; as `pictures`."""
        return [caption_from(row) for row in self._records("caption", ids)]

    def _records(self, kind: Kind, ids: Sequence[int]) -> list[Record]:
        if len(ids) == 1:
            rows = self._query(f"SELECT * FROM {kind} WHERE id = ?", (int(ids[0]),))
        else:
            rows = self._query(f"SELECT * FROM {kind} WHERE id IN {_LIST}", (json.dumps([int(id) for id in ids]),))
        for row in rows:
            if row[-1] != crc_of(row[:-1]):
                raise self._damaged(f"the checksum of {kind} {row[0]} is wrong")
        found = {row[0]: row for row in rows}
        return [found[int(id)] for id in ids]

    def id_of(self, kind: Kind, name: str) -> int | None:
        """Look an item up by its public name; the first if there are several, None if there is none."""
        short = "" if kind == "picture" else "OR (substr(name, 1, 1) = '.' AND scene || name = ?1)"
        rows = self._query(f"SELECT id FROM {kind} WHERE name = ?1 {short} LIMIT 1", (name,))
        return int(rows[0][0]) if rows else None

    def thumbnail(self, picture: Picture) -> bytes | None:
        """Fetch the thumbnail of a picture, WebP; None if there is none, as for pictures of installed packages.

        Raises:
            ValueError: when it is damaged.
        """
        sha256 = bytes.fromhex(picture.file.sha256) if picture.file else b""
        rows = self._query("SELECT webp, crc FROM thumbnail WHERE sha256 = ?", (sha256,))
        if rows and rows[0][1] != crc_of_blob(sha256, rows[0][0]):
            raise self._damaged(f"the checksum of the thumbnail of {picture.id} is wrong")
        return rows[0][0] if rows else None

    # ------------------------------------------------------------ embeddings

    def embeds(self, kind: Kind, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float16, in the order of the ids.

        Raises:
            KeyError: when an item is gone, as the gallery was replaced meanwhile.
            ValueError: when a row is damaged.
        """
        wanted = ids.tolist()
        chosen = "" if len(wanted) == len(self._ids[kind]) else f"WHERE id IN {_LIST}"
        with self._reading() as read:
            rows = dict(read(f"SELECT id, embedding FROM {kind} {chosen}", (json.dumps(wanted),) if chosen else ()))
            numbers = [rows[id] for id in wanted]
            # In the order of the table: pages of 64 kB in random order take ten times as long.
            found = read(f"SELECT id, key, embeds, crc FROM embedding WHERE id IN {_LIST}", (json.dumps(numbers),))
        if any(crc != crc_of_blob(key, embeds) for _, key, embeds, crc in found) or len(found) < len(set(numbers)):
            raise self._damaged("the checksum of an embedding is wrong, or it is missing")
        places = {row[0]: place for place, row in enumerate(found)}
        return to_halves([row[2] for row in found], self.embed_dim)[[places[number] for number in numbers]]

    def batches(self, kind: Kind, size: int = 16384) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all embeddings in order of position, as (ids, float16 rows)."""
        for ids in filter(len, self.ids(kind).split(size)):
            yield ids, self.embeds(kind, ids)

    def cohort(self) -> dict[str, Tensor]:
        """Fetch the embeddings of the cohort by name, (n, embed_dim) float16; empty if there is none."""
        blobs = self._meta("key LIKE 'cohort.%'")
        return {
            key.removeprefix(COHORT): to_halves([blob], len(blob) // 2).view(-1, self.embed_dim)
            for key, blob in blobs.items()
        }

    # ------------------------------------------------------------ check

    def check(self) -> list[str]:
        """Read every byte of the gallery and list the faults; empty if it is sound."""
        try:
            faults = [text for (text,) in self._query("PRAGMA integrity_check") if text != "ok"]
            faults += self._wrong_checksums()
            faults += self._wrong_references()
        except ValueError as error:
            return [str(error)]
        return faults

    def _wrong_checksums(self) -> Iterator[str]:
        with self._lock, sqlite_errors(self._path):
            yield from wrong_checksums(self._connection)

    def _wrong_references(self) -> Iterator[str]:
        for kind, count in zip(KINDS, (self.metadata.num_pictures, self.metadata.num_captions), strict=True):
            there = {id for (id,) in self._query(f"SELECT id FROM {kind}")}
            if there != set(self._ids[kind].tolist()) or len(there) != count or len(self._ids[kind]) != count:
                yield f"there are {len(there)} records of {kind}s instead of {count}"
            sql = f"SELECT count(*) FROM {kind} WHERE embedding NOT IN (SELECT id FROM embedding)"
            if missing := self._query(sql)[0][0]:
                yield f"{missing} {kind}s have no embedding"


def wrong_checksums(connection: sqlite3.Connection) -> Iterator[str]:
    """Verify every row, and name those that are damaged as "table id"."""
    for table in ("meta", *KINDS):
        for row in connection.execute(f"SELECT {'rowid, *' if table == 'meta' else 'id, *'} FROM {table}"):
            if row[-1] != crc_of(row[1:-1]):
                yield f"{table} {row[0]}: wrong checksum"
    for table in ("embedding", "thumbnail"):
        for id, key, blob, crc in connection.execute(f"SELECT * FROM {table}"):
            if not isinstance(blob, bytes) or crc != crc_of_blob(key, blob):
                yield f"{table} {id}: wrong checksum"


def picture_from(row: Record, root: str) -> Picture:
    """Make a picture of its row."""
    _, name, source, _, captions, credit, size, mtime_ns, sha256, *_ = row
    file = FileFingerprint(size, mtime_ns, sha256.hex()) if sha256 else None
    return Picture(name, os.fsdecode(source), json.loads(captions) if captions else {}, credit, root, file)


def caption_from(row: Record) -> Caption:
    """Make a caption of its row, whose name lacks a scene that it begins with."""
    _, name, text, lang, scene, topic, *_ = row
    return Caption(scene + name if name.startswith(".") else name, text, lang, scene, topic)


def source_to_folder(folder: Path, source: str) -> str:
    """Name a source in, beside or around the gallery relative to it: the two may move together."""
    here = Path(os.path.abspath(folder))
    if not os.path.isabs(source) or not Path(source).is_relative_to(here.parent):
        return source  # elsewhere, or a Hub id
    return "./" + os.path.relpath(source, here).replace(os.sep, "/")


def source_from_folder(folder: Path, source: str) -> str:
    """Undo `source_to_folder`."""
    return os.path.abspath(folder / source) if source.startswith("./") else source


def _connect_recovered(path: Path) -> sqlite3.Connection:
    """Open a file read-only; roll back the transaction of a killed process first, which takes write access."""
    try:
        return _connect_read_only(path)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise
    with closing(connect(path, "rw")) as writer:
        writer.execute("SELECT 1 FROM sqlite_schema").fetchall()
    return _connect_read_only(path)


def _connect_read_only(path: Path) -> sqlite3.Connection:
    connection = connect(path, "ro")
    try:
        connection.execute("SELECT 1 FROM sqlite_schema").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection
