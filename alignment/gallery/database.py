"""Read `gallery.db`, the SQLite file that a gallery is.

Place in the flow: `build -> gallery.db (here) -> index, search`. Tables:

- `picture`, `caption`: one record a row; `id` as in every index, `embedding` names a row of that table;
- `embedding`: half-precision vectors by a hash of model and content; `thumbnail`: WebP by the SHA-256 of the picture;
- `meta`: metadata, ids in order of position, cohort; `scanned`: files that an unfinished build has hashed.

Records and metadata are replaced in one transaction, so a reader sees the old gallery or the new one. Every row has a
CRC: SQLite does not notice a flipped bit in a value.
"""

import errno
import json
import os
import sqlite3
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from alignment.atomic import exclusive_lock
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, rebuild_command

Kind: TypeAlias = Literal["picture", "caption"]
Row: TypeAlias = tuple[Any, ...]

DATABASE = "gallery.db"
KINDS: tuple[Kind, Kind] = ("picture", "caption")
SIDES: dict[Kind, str] = {"picture": "image_embeds", "caption": "text_embeds"}  # as their embeddings are called
COHORT = "cohort."
VERSION = 1
COLUMNS = {  # that the checksum of a row is of
    "meta": "key, value",
    "embedding": "key, embeds",
    "thumbnail": "sha256, webp",
    "picture": "id, name, source, folder, captions, credit, size, mtime_ns, sha256, embedding",
    "caption": "id, name, text, lang, scene, topic, embedding",
}
_TIMEOUT_S = 60.0  # to wait for the commit of another process
_CACHE_KB = 16384
_OLD_FORMAT, _IMPORT_TIMEOUT_S = "gallery.json", 600.0
CHOSEN = "(SELECT value FROM json_each(?))"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: of a damaged schema
_ERRNO = dict.fromkeys((sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN), errno.EACCES)
_ERRNO |= {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_BUSY: errno.EAGAIN, sqlite3.SQLITE_IOERR: errno.EIO}


class SQLiteFile:
    """A connection to a database file, which several threads use in turn; the first change begins a transaction.

    Every method raises an OSError that names the file, or a ValueError when its content is damaged.
    """

    def __init__(self, path: Path, mode: Literal["ro", "rw", "rwc"]) -> None:
        """Open a file; what a killed process left half written is undone, which takes write access."""
        self.path, self._lock = path, threading.RLock()
        try:
            self._connect(mode)
        except PermissionError:
            if mode != "ro":
                raise
            self._connect("rw")
            self.close()
            self._connect(mode)

    def _connect(self, mode: str) -> None:
        options: dict[str, Any] = {"isolation_level": "IMMEDIATE", "check_same_thread": False, "uri": True}
        with self._errors():
            self._connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", _TIMEOUT_S, **options)
        try:
            self._connection.create_function("crc_of", -1, _crc_of, deterministic=True)
            self(f"PRAGMA cache_size=-{_CACHE_KB}")
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:  # a connection that has just been opened; it is closed if this fails
        self("SELECT 1 FROM sqlite_schema")

    def close(self) -> None:
        """Close the file; what was not committed is gone."""
        self._connection.close()

    def __call__(self, sql: str, values: Sequence[Any] = (), many: Iterable[Row] | None = None) -> list[Row]:
        """Run a statement, once or with each of `many` rows of values; returns what it finds."""
        run = self._connection
        with self._errors():
            return (run.execute(sql, values) if many is None else run.executemany(sql, many)).fetchall()

    def commit(self) -> None:
        """Make the changes survive the end of the process and a power cut."""
        with self._errors():
            self._connection.commit()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", -1) & 0xFF
            if code in _DAMAGED or "decode" in str(error):  # to text; this has no code
                raise self.damaged(error) from error
            if (number := _ERRNO.get(code)) is None:
                raise
            if self.path.is_dir():
                number = errno.EISDIR
            elif number == errno.EIO:
                number = _write_errno(self.path)
            raise OSError(number, os.strerror(number), str(self.path)) from error

    def damaged(self, what: object) -> ValueError:
        """Make the error that says what is damaged."""
        return ValueError(str(what))

    def faults(self) -> Iterator[str]:
        """Read every byte, and name damaged rows as "table id: ..."."""
        yield from (text for (text,) in self("PRAGMA integrity_check") if text != "ok")
        for table, columns in COLUMNS.items():
            for (row,) in self(f"SELECT rowid FROM {table} WHERE crc IS NOT crc_of({columns})"):
                yield f"{table} {row}: wrong checksum"


def _write_errno(path: Path) -> int:
    """Find out why a file cannot grow, which SQLite does not say: a quota, a limit of its size, ..."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.seek(path.stat().st_size)
            probe.write(bytes(2**16))
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO


def _crc_of(*row: Any) -> int:
    """Compute the checksum of values; signed, as SQLite stores that in four bytes."""
    return zlib.crc32(b"".join([value if isinstance(value, bytes) else repr(value).encode() for value in row])) - 2**31


def to_tensor(blobs: Iterable[bytes], dtype: Literal["<f2", "<i8"]) -> Tensor:
    """Decode halves or ids, (n,)."""
    return torch.from_numpy(np.frombuffer(b"".join(blobs), dtype).astype(dtype[1:]))


class GalleryDatabase(SQLiteFile):
    """A finished gallery, read-only. Methods may be called from several threads."""

    def __init__(self, folder: Path, model: str = "MODEL") -> None:
        """Open the gallery in a folder, whichever model made it; one of the previous format is converted first.

        `model` is the name of the one in use, for the advice in the errors: FileNotFoundError when there is no finished
        gallery, PermissionError when it may not be read, ValueError when it is damaged. All say what to run.
        """
        path = folder / DATABASE
        if not path.exists() and (folder / _OLD_FORMAT).exists():
            from alignment.gallery.old_format import import_gallery

            with exclusive_lock(folder, timeout=_IMPORT_TIMEOUT_S):
                import_gallery(folder)
        self.folder, self.metadata = folder, GalleryMetadata("", model, 1.0, None)  # until it is read
        try:
            with path.open("rb"):  # for the operating system's own errors
                super().__init__(path, "ro")
        except (FileNotFoundError, NotADirectoryError):
            build = rebuild_command(folder, model)
            raise FileNotFoundError(f"There is no gallery in {folder}. Build one: {build}") from None

    def _prepare(self) -> None:
        if (version := self("PRAGMA user_version")[0][0]) > VERSION:
            raise self.damaged(f"it has the format {version} of a later version of this program")
        meta = self._meta("NOT LIKE 'cohort.%'") if self("SELECT 1 FROM sqlite_schema WHERE name = 'meta'") else {}
        if "metadata" not in meta:
            raise FileNotFoundError
        try:
            header = json.loads(meta["metadata"])
            self.metadata = GalleryMetadata(**header | {"source": source_from_folder(self.folder, header["source"])})
            self._ids = {kind: to_tensor([meta[kind]], "<i8") for kind in KINDS}
            self.packaged: list[int] = to_tensor([meta["packaged"]], "<i8").tolist()
            self.embed_dim = int(meta["embed_dim"])
        except (TypeError, KeyError) as error:
            raise self.damaged(error) from error

    def _meta(self, keys: str) -> dict[str, Any]:
        sql = f"SELECT key, value, crc IS crc_of(key, value) FROM meta WHERE key {keys}"
        return {key: value for key, value, _ in self._verified("meta", sql)}

    def _verified(self, what: str, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Fetch rows whose last column says whether the checksum is right; ValueError unless all are."""
        rows = self(sql, values)
        if not all(row[-1] for row in rows):
            raise self.damaged(f"a wrong checksum in {what}")
        return rows

    def damaged(self, what: object) -> ValueError:
        """Make an error that says what is damaged and what to run."""
        command = rebuild_command(self.folder, self.metadata.model, self.metadata)
        return ValueError(f"The gallery in {self.folder} is damaged ({what}). Rebuild it with: {command}")

    def ids(self, kind: Kind, tag: str | None = None) -> Tensor:
        """List ids in order of position, (n,) int64: of all, or of a folder and those below it, or of a language."""
        if tag is None:
            return self._ids[kind]
        try:
            folder = os.fsencode(tag)
        except UnicodeEncodeError:  # a lone surrogate, which no folder's name and no language has
            return self._ids[kind][:0]
        if kind == "caption":
            rows = self("SELECT id FROM caption WHERE lang = ?", (folder.decode("utf-8", "replace"),))
        else:
            values = folder, folder + b"/", folder + b"0"  # "0" follows "/"
            rows = self("SELECT id FROM picture WHERE folder = ? OR (folder > ? AND folder < ?)", values)
        return self._ids[kind][torch.isin(self._ids[kind], torch.tensor([id for (id,) in rows], dtype=torch.int64))]

    def tags(self, kind: Kind) -> dict[str, int]:
        """Count the pictures below each folder, or the captions of each language ("" if unknown)."""
        if kind == "caption":
            return dict(self("SELECT lang, count(*) FROM caption GROUP BY 1"))
        counts: Counter[str] = Counter()
        for folder, count in self("SELECT folder, count(*) FROM picture WHERE folder != x'' GROUP BY 1"):
            names = os.fsdecode(folder).split("/")
            counts.update({"/".join(names[: end + 1]): count for end in range(len(names))})
        return dict(sorted(counts.items()))

    def pictures(self, ids: Sequence[int]) -> list[Picture]:
        """Fetch records, in the order of their ids; KeyError when one is gone, as the gallery was replaced."""
        pictures, records = list[Picture](), self._records("picture", ids)
        captions = json.loads(f"[{','.join(row[4] or '{}' for row in records)}]")  # one call takes half as long
        for (_, name, source, _, _, credit, size, mtime_ns, sha256, *_), texts in zip(records, captions, strict=True):
            file = FileFingerprint(size, mtime_ns, sha256.hex()) if sha256 else None
            pictures.append(Picture(name, os.fsdecode(source), texts, credit, self.metadata.source, file))
        return pictures

    def captions(self, ids: Sequence[int]) -> list[Caption]:
        """Fetch records; as `pictures`."""
        return [
            Caption(scene + name if name.startswith(".") else name, text, lang, scene, topic)  # see `GalleryWriter`
            for _, name, text, lang, scene, topic, *_ in self._records("caption", ids)
        ]

    def records(self) -> tuple[list[Picture], list[Caption]]:
        """Fetch all records, in order of position."""
        return self.pictures(self.ids("picture").tolist()), self.captions(self.ids("caption").tolist())

    def _records(self, kind: Kind, ids: Sequence[int]) -> list[Row]:
        sql = f"SELECT {COLUMNS[kind]}, crc FROM {kind} WHERE id IN {CHOSEN}"
        found = {row[0]: row for row in self(sql, [str(list(map(int, ids)))])}
        if any(_crc_of(*row[:-1]) != row[-1] for row in found.values()):  # sooner than SQLite calls back
            raise self.damaged(f"a wrong checksum in {kind}")
        return [found[id] for id in ids]

    def id_of(self, kind: Kind, name: str) -> int | None:
        """Look an item up by its public name; None if there is none. Captions are searched one by one."""
        short = "" if kind == "picture" else "OR (substr(name, 1, 1) = '.' AND scene || name = ?1)"
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # SQLite takes no lone surrogates, no name has any
            return None
        rows = self(f"SELECT id FROM {kind} WHERE name = ?1 {short} LIMIT 1", (name,))
        return int(rows[0][0]) if rows else None

    def thumbnail(self, picture: Picture) -> bytes | None:
        """Fetch the thumbnail of a picture, WebP; None if there is none, or it is damaged."""
        sha256 = bytes.fromhex(picture.file.sha256) if picture.file else b""
        sql = "SELECT webp FROM thumbnail WHERE sha256 = ? AND crc IS crc_of(sha256, webp)"
        return next((webp for (webp,) in self(sql, (sha256,))), None)

    def embeds(self, kind: Kind, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float16, in the order of the ids; KeyError when an item is gone."""
        wanted = ids.tolist()
        # In the order of the table: pages of 64 kB in random order take ten times as long.
        which = f"WHERE id IN {CHOSEN}" if len(wanted) < len(self._ids[kind]) else "WHERE ? != ''"
        sql = f"WITH c(owner, row) AS MATERIALIZED (SELECT id, embedding FROM {kind} {which} ORDER BY 2)"
        sql += " SELECT owner, embeds, crc IS crc_of(key, embeds) FROM c LEFT JOIN embedding ON embedding.id = row"
        rows = self._verified("embedding", sql, [json.dumps(wanted)])
        places = {owner: place for place, (owner, *_) in enumerate(rows)}
        found = to_tensor((embeds for _, embeds, _ in rows), "<f2").reshape(len(rows), self.embed_dim)
        return found[[places[id] for id in wanted]]

    def batches(self, kind: Kind, size: int = 16_384) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all embeddings in order of position, as (ids, float16 rows)."""
        for ids in filter(len, self.ids(kind).split(size)):
            yield ids, self.embeds(kind, ids)

    def cohort(self) -> dict[str, Tensor]:
        """Fetch the embeddings of the cohort by name, (n, embed_dim) float16; empty if there is none."""
        blobs = self._meta("LIKE 'cohort.%'").items()
        return {key.removeprefix(COHORT): to_tensor([blob], "<f2").reshape(-1, self.embed_dim) for key, blob in blobs}

    def check(self) -> list[str]:
        """Read every byte of the gallery and list the faults; empty if it is sound."""
        try:
            return [*self.faults(), *self._wrong_references()]
        except ValueError as error:
            return [str(error.__cause__ or error)]

    def _wrong_references(self) -> Iterator[str]:
        for kind, count in zip(KINDS, (self.metadata.num_pictures, self.metadata.num_captions), strict=True):
            there: dict[int, int] = dict(self(f"SELECT id, embedding IN (SELECT id FROM embedding) FROM {kind}"))
            if there.keys() != set(self._ids[kind].tolist()) or len(self._ids[kind]) != count:
                yield f"there are {len(there)} records of {kind}s instead of {count}"
            if missing := list(there.values()).count(0):
                yield f"{missing} {kind}s have no embedding"


def source_from_folder(folder: Path, source: str) -> str:
    """Find a source that was stored relative to the gallery, see `alignment.gallery.writer`."""
    return os.path.abspath(folder / source) if source.startswith("./") else source
