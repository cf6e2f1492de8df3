"""Write `gallery.db`, or the file of one share of a build.

Place in the flow: `embeddings and thumbnails as they are made, then records -> gallery.db (here)`. Schema and readers:
`alignment.gallery.database`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, astuple
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from alignment.atomic import atomic_write
from alignment.gallery.database import (
    COHORT,
    DATABASE,
    KINDS,
    PAGE_BYTES,
    SCHEMA,
    VERSION,
    Kind,
    Record,
    connect,
    crc_of,
    crc_of_blob,
    source_to_folder,
    sqlite_errors,
    to_halves,
    wrong_checksums,
)
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, folder_of, item_ids

_SMALL = 64 * 2**20  # bytes up to which a database is always packed at the end of a build
_WASTE = 0.25  # share of free pages from which a large one is packed


class GalleryWriter:
    """Adds embeddings and thumbnails as they come, and replaces the records at the end.

    One process at a time, see `alignment.atomic.exclusive_lock`. What was added but not committed is lost with the
    process; `has` and `has_thumbnail` may be asked from several threads.

    Raises:
        OSError: from every method, when the file cannot be written.
        ValueError: from every method, when its content is damaged beyond repair.
    """

    def __init__(self, path: Path, fingerprint: str, embed_dim: int) -> None:
        """Open or create a file.

        Args:
            path: of the file.
            fingerprint: of the model; the embeddings of other models are left alone until `finish`.
            embed_dim: of the model.
        """
        self.path, self.embed_dim, self._fingerprint = path, embed_dim, fingerprint
        self._lock = threading.RLock()
        with sqlite_errors(path):
            self._connection = connect(path, "rwc")
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        self._connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        self._connection.execute("PRAGMA cache_spill=OFF")  # readers are locked out for the commit only
        if not self._connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'picture_name'").fetchall():
            self._connection.executescript(f"BEGIN; {SCHEMA}; PRAGMA user_version={VERSION}; COMMIT;")

    def close(self) -> None:
        """Close the file; what was not committed is gone."""
        self._connection.close()

    @property
    def _write(self) -> sqlite3.Connection:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def commit(self) -> None:
        """Make what was added survive the end of the process and a power cut."""
        with self._lock, sqlite_errors(self.path):
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")

    # ------------------------------------------------------------ embeddings, thumbnails, files

    def key_of(self, kind: Kind, content: str) -> int:
        """Compute the key of an embedding: 63 bits of a hash of the model, the kind and the content.

        Args:
            kind: of the item.
            content: SHA-256 of a picture's file, or the text of a caption.
        """
        text = f"{self._fingerprint}\0{kind}\0{content}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def has(self, kind: Kind, content: str) -> bool:
        """Whether the embedding of a content is there."""
        return self._any("SELECT 1 FROM embedding WHERE key = ?", self.key_of(kind, content))

    def has_thumbnail(self, sha256: str) -> bool:
        """Whether the thumbnail of a picture's file is there."""
        return self._any("SELECT 1 FROM thumbnail WHERE sha256 = ?", bytes.fromhex(sha256))

    def _any(self, sql: str, value: object) -> bool:
        with self._lock, sqlite_errors(self.path):
            return bool(self._connection.execute(sql, (value,)).fetchall())

    def add(self, kind: Kind, contents: Iterable[str], embeds: Tensor) -> None:
        """Add embeddings, (n, embed_dim); they are stored in half precision."""
        keys = [self.key_of(kind, content) for content in contents]
        data = embeds.half().contiguous().numpy().astype("<f2").tobytes()
        width = 2 * self.embed_dim
        rows = ((key, data[row * width : (row + 1) * width]) for row, key in enumerate(keys))
        with self._lock, sqlite_errors(self.path):
            sql = "INSERT OR IGNORE INTO embedding(key, embeds, crc) VALUES (?, ?, ?)"
            self._write.executemany(sql, ((key, blob, crc_of_blob(key, blob)) for key, blob in rows))

    def add_thumbnail(self, sha256: str, webp: bytes) -> None:
        """Add the thumbnail of a picture's file."""
        key = bytes.fromhex(sha256)
        with self._lock, sqlite_errors(self.path):
            sql = "INSERT OR REPLACE INTO thumbnail(sha256, webp, crc) VALUES (?, ?, ?)"
            self._write.execute(sql, (key, webp, crc_of_blob(key, webp)))

    def add_scanned(self, source: str, file: FileFingerprint) -> None:
        """Note the state of a picture's file until the build is finished: the next one need not read it again."""
        with self._lock, sqlite_errors(self.path):
            self._write.execute(
                "INSERT OR REPLACE INTO scanned VALUES (?, ?, ?, ?)", (os.fsencode(source), *astuple(file))
            )

    def scanned(self) -> dict[str, FileFingerprint]:
        """Return what `add_scanned` noted, by source."""
        with self._lock, sqlite_errors(self.path):
            rows = self._connection.execute("SELECT * FROM scanned").fetchall()
        return {os.fsdecode(source): FileFingerprint(*state) for source, *state in rows}

    def embeds(self, kind: Kind, contents: Sequence[str]) -> Tensor:
        """Fetch embeddings by content, (n, embed_dim) float16; KeyError when one is missing."""
        keys = [self.key_of(kind, content) for content in contents]
        sql = "SELECT key, embeds FROM embedding WHERE key IN (SELECT value FROM json_each(?))"
        with self._lock, sqlite_errors(self.path):
            found = dict(self._connection.execute(sql, (json.dumps(keys),)).fetchall())
        return to_halves([found[key] for key in keys], self.embed_dim)

    def __len__(self) -> int:
        with self._lock, sqlite_errors(self.path):
            return int(self._connection.execute("SELECT count(*) FROM embedding").fetchone()[0])

    def merge(self, share: Path) -> None:
        """Take over the embeddings, thumbnails and files of another database; what is there already stays."""
        tables = {"embedding": "key, embeds, crc", "thumbnail": "sha256, webp, crc", "scanned": "*"}
        with self._lock, sqlite_errors(share):
            self.commit()
            self._connection.execute("ATTACH ? AS share", (f"{share.absolute().as_uri()}?mode=rw",))
            try:
                for table, columns in tables.items():
                    into = table if columns == "*" else f"{table}({columns})"
                    order = "" if columns == "*" else " ORDER BY id"
                    self._write.execute(f"INSERT OR IGNORE INTO {into} SELECT {columns} FROM share.{table}{order}")
                self.commit()
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                self._connection.execute("DETACH share")

    def repair(self) -> list[str]:
        """Delete embeddings and thumbnails whose checksum is wrong, so that they are made again; returns the faults.

        Raises:
            ValueError: when the file is damaged in another way; it has to be deleted.
        """
        with self._lock, sqlite_errors(self.path):
            faults = [text for (text,) in self._connection.execute("PRAGMA integrity_check") if text != "ok"]
            if faults:
                raise ValueError(faults[0])
            faults = list(wrong_checksums(self._connection))
            for table, row in (fault.split(":")[0].split() for fault in faults):
                if table in ("embedding", "thumbnail"):
                    self._write.execute(f"DELETE FROM {table} WHERE id = ?", (int(row),))
            self.commit()
        return faults

    # ------------------------------------------------------------ the end of a build

    def finish(
        self,
        pictures: Sequence[Picture],
        captions: Sequence[Caption],
        metadata: GalleryMetadata,
        cohort: Mapping[str, Tensor],
    ) -> bool:
        """Replace the records in one transaction, and delete embeddings and thumbnails that no record refers to.

        Nothing is written where only the date differs.

        Args:
            pictures: in order of position; embeddings of all were added.
            captions: likewise.
            metadata: of the new gallery; counts are filled in.
            cohort: embeddings by name.

        Returns:
            Whether anything changed.

        Raises:
            KeyError: when an embedding is missing.
        """
        self.commit()
        with self._lock, sqlite_errors(self.path):
            try:
                changed = self._replace(pictures, captions, metadata, cohort)
                self.commit()
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if changed:
                self._pack()
        return changed

    def _replace(
        self,
        pictures: Sequence[Picture],
        captions: Sequence[Caption],
        metadata: GalleryMetadata,
        cohort: Mapping[str, Tensor],
    ) -> bool:
        rows = dict(self._write.execute("SELECT key, id FROM embedding"))
        ids = {"picture": item_ids(pictures), "caption": item_ids(captions)}
        changed = self._replace_records("picture", self._picture_rows(ids["picture"], pictures, rows))
        changed |= self._replace_records("caption", self._caption_rows(ids["caption"], captions, rows))
        used = "SELECT embedding FROM picture UNION ALL SELECT embedding FROM caption"
        self._write.execute(f"DELETE FROM embedding WHERE id NOT IN ({used})")
        self._write.execute("DELETE FROM thumbnail WHERE sha256 NOT IN (SELECT sha256 FROM picture)")
        self._write.execute("DELETE FROM scanned")
        header = asdict(metadata) | {"num_pictures": len(pictures), "num_captions": len(captions)}
        header["source"] = source_to_folder(self.path.parent, metadata.source)
        meta: dict[str, Any] = {kind: ids[kind].numpy().astype("<i8").tobytes() for kind in KINDS}
        meta |= {COHORT + name: part.half().numpy().astype("<f2").tobytes() for name, part in cohort.items()}
        meta |= {"embed_dim": self.embed_dim}
        rows_of_meta = self._connection.execute("SELECT * FROM meta")
        old = {key: value for key, value, crc in rows_of_meta if crc == crc_of((key, value))}
        before = {**json.loads(old.pop("metadata", "{}")), "built": metadata.built}
        build = old.pop("build", None)
        if build and not changed and old == meta and before == json.loads(json.dumps(header)):
            return False
        meta |= {"metadata": json.dumps(header), "build": secrets.token_hex(8)}
        self._write.execute("DELETE FROM meta")
        self._write.executemany("INSERT INTO meta VALUES (?, ?, ?)", ((*row, crc_of(row)) for row in meta.items()))
        return True

    def _replace_records(self, kind: Kind, rows: Iterator[Record]) -> bool:
        """Write the rows that are new or differ; returns whether there were any, or any to delete."""
        new = {row[0]: (*row, crc_of(row)) for row in rows}
        gone = []
        for row in self._connection.execute(f"SELECT * FROM {kind}"):
            if row[0] not in new:
                gone.append((row[0],))
            elif new[row[0]] == row:
                del new[row[0]]
        self._write.executemany(f"DELETE FROM {kind} WHERE id = ?", gone)
        marks = ", ".join("?" * (11 if kind == "picture" else 8))
        self._write.executemany(f"INSERT OR REPLACE INTO {kind} VALUES ({marks})", (new[id] for id in sorted(new)))
        return bool(new or gone)

    def _picture_rows(self, ids: Tensor, pictures: Sequence[Picture], rows: Mapping[int, int]) -> Iterator[Record]:
        for id, picture in zip(ids.tolist(), pictures, strict=True):
            captions = json.dumps(dict(picture.captions), ensure_ascii=False) if picture.captions else ""
            folder, source = (os.fsencode(name) for name in (folder_of(picture.source), picture.source))
            file = picture.file
            state = (file.size, file.mtime_ns, bytes.fromhex(file.sha256)) if file else (0, 0, b"")
            row = rows[self.key_of("picture", content_of(picture))]
            yield id, picture.id, source, folder, captions, picture.credit, *state, row

    def _caption_rows(self, ids: Tensor, captions: Sequence[Caption], rows: Mapping[int, int]) -> Iterator[Record]:
        for id, caption in zip(ids.tolist(), captions, strict=True):
            scene = caption.scene
            name = caption.id.removeprefix(scene) if scene and caption.id.startswith(f"{scene}.") else caption.id
            row = rows[self.key_of("caption", caption.text)]
            yield id, name, caption.text, caption.lang, scene, caption.topic, row

    def _pack(self) -> None:
        """Rewrite the file without free space, where that is quick or worth it; skipped while it is being read."""
        sizes = (self._connection.execute(f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size"))
        pages, free, page_bytes = (size.fetchone()[0] for size in sizes)
        if pages * page_bytes <= _SMALL or free > _WASTE * pages:
            with suppress(sqlite3.OperationalError):  # in use, or no room for the copy; it is complete anyway
                self._connection.execute("VACUUM")


def content_of(item: Picture | Caption) -> str:
    """Return what an item's embedding is keyed by: the SHA-256 of a picture's file, or a caption's text."""
    if isinstance(item, Caption):
        return item.text
    return item.file.sha256 if item.file else item.id


def write_gallery(
    folder: Path,
    pictures: Sequence[Picture],
    captions: Sequence[Caption],
    embeds: Mapping[Kind, Iterable[Tensor]],
    embed_dim: int,
    metadata: GalleryMetadata,
    cohort: Mapping[str, Tensor],
    thumbnail: Callable[[Picture], bytes | None] = lambda picture: None,
) -> None:
    """Write a new `gallery.db` in a folder, and rename it to its place at the end.

    Args:
        folder: new or old; no other process writes to it, see `alignment.atomic.exclusive_lock`.
        pictures: in order of position.
        captions: likewise.
        embeds: kind -> batches in order of position, (n, embed_dim) each.
        embed_dim: of the model.
        metadata: of the gallery.
        cohort: embeddings by name.
        thumbnail: returns the WebP file of a picture, if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(folder / DATABASE) as temp,
        closing(GalleryWriter(temp, metadata.fingerprint, embed_dim)) as writer,
    ):
        items: dict[Kind, Sequence[Picture] | Sequence[Caption]] = {"picture": pictures, "caption": captions}
        for kind, batches in embeds.items():
            contents = map(content_of, items[kind])
            for batch in batches:
                writer.add(kind, list(islice(contents, len(batch))), batch)
        for picture in pictures:
            if picture.file and (webp := thumbnail(picture)):
                writer.add_thumbnail(picture.file.sha256, webp)
        writer.finish(pictures, captions, metadata, cohort)
