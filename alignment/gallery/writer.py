"""Write `gallery.db`, or the file of one share of a build.

Place in the flow: `embeddings and thumbnails as they are made, then records -> gallery.db (here)`. The schema is in
`alignment.gallery.database`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    SCHEMA,
    VERSION,
    Kind,
    Row,
    SQLiteFile,
    crc_of,
    open_recovered,
    source_to_folder,
    to_tensor,
)
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, folder_of, item_ids

_PAGE_BYTES = 65536  # 31 rows of 1,024 halves; a row of 2 kB wastes half of a page of 4,096
_SPILL_PAGES = 4096  # of changes in memory
_BATCH = 4096  # rows of one transaction
_SMALL = 64 * 2**20  # bytes up to which a database is always packed at the end of a build
_WASTE = 0.25  # share of free pages from which a large one is packed
_USED = "(SELECT embedding FROM picture UNION ALL SELECT embedding FROM caption)"
_SCANNED = "TABLE IF NOT EXISTS scanned(source BLOB PRIMARY KEY, size, mtime_ns, sha256) WITHOUT ROWID"


class GalleryWriter:
    """Adds embeddings and thumbnails as they come, and replaces the records at the end.

    One process at a time, see `alignment.atomic.exclusive_lock`. What is not committed is lost with the process. `has`
    and `has_thumbnail` may be called from several threads. Errors are those of `SQLiteFile`.
    """

    def __init__(self, path: Path, fingerprint: str, embed_dim: int, base: Path | None = None) -> None:
        """Open or create a file.

        Args:
            path: of the file.
            fingerprint: of the model; the embeddings of other models stay until `finish`.
            embed_dim: of the model.
            base: a gallery whose embeddings and thumbnails count as there, if it exists.
        """
        self.path, self.embed_dim, self._fingerprint = path, embed_dim, fingerprint
        self._file = SQLiteFile(path, "rwc")
        self._files = [self._file]
        self._file(f"PRAGMA page_size={_PAGE_BYTES}")
        self._file(f"PRAGMA cache_spill={_SPILL_PAGES}")  # up to that, readers are locked out for the commit only
        if not self._file("SELECT 1 FROM sqlite_schema WHERE name = 'picture_name'"):
            for statement in ("BEGIN", *SCHEMA.split(";")[:-1], f"PRAGMA user_version={VERSION}", "COMMIT"):
                self._file(statement)
        if base is not None:
            with suppress(OSError, ValueError):  # there is none, or it is damaged
                self._files.append(open_recovered(base))

    def close(self) -> None:
        """Close the file; what was not committed is gone."""
        for file in self._files:
            file.close()

    def _write(self, sql: str, values: Sequence[Any] = (), many: Iterable[Row] | None = None) -> None:
        with self._file.lock:  # threads of the scan ask at the same time
            if not self._file.in_transaction:
                self._file("BEGIN IMMEDIATE")
            for _ in self._file.each(sql, values, many):
                pass

    def commit(self) -> None:
        """Make what was added survive the end of the process and a power cut."""
        if self._file.in_transaction:
            self._file("COMMIT")

    # ------------------------------------------------------------ embeddings, thumbnails, files

    def _key(self, kind: Kind, content: str) -> int:
        text = f"{self._fingerprint}\0{kind}\0{content}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def has(self, kind: Kind, content: str) -> bool:
        """Whether there is an embedding of a picture's file, by its SHA-256, or of a caption, by its text."""
        key = (self._key(kind, content),)
        return any(file("SELECT 1 FROM embedding WHERE key = ?", key) for file in self._files)

    def has_thumbnail(self, sha256: str) -> bool:
        """Whether there is a thumbnail of a picture's file."""
        key = (bytes.fromhex(sha256),)
        return any(file("SELECT 1 FROM thumbnail WHERE sha256 = ?", key) for file in self._files)

    def add(self, kind: Kind, contents: Iterable[str], embeds: Tensor) -> None:
        """Add embeddings, (n, embed_dim), in half precision; contents as for `has`."""
        keys, blobs = (self._key(kind, content) for content in contents), _blobs(embeds)
        rows = ((key, blob, crc_of((key, blob))) for key, blob in zip(keys, blobs, strict=True))
        self._write("INSERT OR IGNORE INTO embedding(key, embeds, crc) VALUES (?, ?, ?)", many=rows)

    def embeds(self, kind: Kind, contents: Sequence[str]) -> Tensor:
        """Fetch embeddings by content, (n, embed_dim) float16; KeyError when one is missing."""
        keys = [self._key(kind, content) for content in contents]
        sql = "SELECT key, embeds FROM embedding WHERE key IN (SELECT value FROM json_each(?))"
        found: dict[int, bytes] = dict(self._file(sql, (json.dumps(keys),)))
        return to_tensor([found[key] for key in keys], "<f2", len(keys), self.embed_dim)

    def add_thumbnail(self, sha256: str, webp: bytes) -> None:
        """Add the thumbnail of a picture's file."""
        row = bytes.fromhex(sha256), webp, crc_of((bytes.fromhex(sha256), webp))
        self._write("INSERT OR REPLACE INTO thumbnail(sha256, webp, crc) VALUES (?, ?, ?)", row)

    def add_scanned(self, source: str, file: FileFingerprint) -> None:
        """Note the state of a picture's file until the build is finished: the next one need not read it again."""
        self._write(f"CREATE {_SCANNED}")
        self._write("INSERT OR REPLACE INTO scanned VALUES (?, ?, ?, ?)", (os.fsencode(source), *astuple(file)))

    def scanned(self) -> dict[str, FileFingerprint]:
        """Return what `add_scanned` noted, by source."""
        there = self._file("SELECT 1 FROM sqlite_schema WHERE name = 'scanned'")
        rows = self._file("SELECT * FROM scanned") if there else []
        return {os.fsdecode(source): FileFingerprint(*state) for source, *state in rows}

    def count_unused(self) -> int:
        """Count the embeddings that no record refers to, which an unfinished build left."""
        return int(self._file(f"SELECT count(*) FROM embedding WHERE id NOT IN {_USED}")[0][0])

    def is_empty(self) -> bool:
        """Whether there is neither a finished gallery nor an embedding."""
        return not self._file("SELECT 1 FROM meta UNION ALL SELECT 1 FROM embedding LIMIT 1")

    def merge(self, share: Path) -> None:
        """Take over the embeddings, thumbnails and files of another database; what is there already stays."""
        self.commit()
        with closing(GalleryWriter(share, "", 0)) as other:  # recovers and verifies it
            other.repair()
            scanned = other.scanned()
        self._file("ATTACH ? AS share", (f"{share.absolute().as_uri()}?mode=rw",))
        try:
            for table, columns in (("embedding", "key, embeds, crc"), ("thumbnail", "sha256, webp, crc")):
                last = self._file(f"SELECT max(id) FROM share.{table}")[0][0] or 0
                for start in range(0, last, _BATCH):
                    rows = f"SELECT {columns} FROM share.{table} WHERE id > {start} AND id <= {start + _BATCH}"
                    self._write(f"INSERT OR IGNORE INTO {table}({columns}) {rows} ORDER BY id")
                    self.commit()
            for source, file in scanned.items():
                self.add_scanned(source, file)
            self.commit()
        finally:
            self._undo()
            self._file("DETACH share")

    def _undo(self) -> None:
        if self._file.in_transaction:
            self._file("ROLLBACK")

    def repair(self) -> list[str]:
        """Delete embeddings and thumbnails whose checksum is wrong, so that they are made again; returns the faults.

        Raises:
            ValueError: when the file is damaged in another way; it has to be deleted.
        """
        faults = list(self._file.faults())
        for fault in faults:
            table, _, row = fault.partition(":")[0].partition(" ")
            if table not in ("meta", *KINDS, "embedding", "thumbnail"):
                raise ValueError(fault)
            if table not in KINDS and table != "meta":  # records are replaced anyway
                self._write(f"DELETE FROM {table} WHERE id = ?", (int(row),))
        self.commit()
        return faults

    # ------------------------------------------------------------ the end of a build

    def finish(
        self, pictures: Sequence[Picture], captions: Sequence[Caption], metadata: GalleryMetadata,
        cohort: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Replace the records in one transaction, and delete embeddings and thumbnails that no record refers to.

        Nothing is written where only the date differs.

        Args:
            pictures: in order of position; embeddings of all were added, else KeyError.
            captions: likewise.
            metadata: of the new gallery; counts are filled in.
            cohort: embeddings by name.
        """
        self.commit()
        try:
            ids = {"picture": item_ids(pictures), "caption": item_ids(captions)}
            rows: dict[int, int] = dict(self._file("SELECT key, id FROM embedding"))
            changed = [self._replace("picture", pictures, ids["picture"], rows)]
            changed += [self._replace("caption", captions, ids["caption"], rows)]
            self._write(f"DELETE FROM embedding WHERE id NOT IN {_USED}")
            self._write("DELETE FROM thumbnail WHERE sha256 NOT IN (SELECT sha256 FROM picture)")
            self._write("DROP TABLE IF EXISTS scanned")
            header = asdict(metadata) | {"num_pictures": len(pictures), "num_captions": len(captions)}
            header["source"] = source_to_folder(self.path.parent, metadata.source)
            packaged = [place for place, picture in enumerate(pictures) if picture.package]
            meta: dict[str, Any] = {kind: ids[kind].numpy().astype("<i8").tobytes() for kind in KINDS}
            meta["packaged"] = ids["picture"][packaged].numpy().astype("<i8").tobytes()
            meta |= {COHORT + name: b"".join(_blobs(part)) for name, part in cohort.items()}
            meta |= {"metadata": json.dumps(header), "embed_dim": self.embed_dim}
            changed.append(self._replace_meta(meta))
            self.commit()
        finally:
            self._undo()
        pages, free = (self._file(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count"))
        if any(changed) and (pages * _PAGE_BYTES <= _SMALL or free > _WASTE * pages):
            with suppress(OSError):  # in use, or no room for the copy; it is complete anyway
                self._file("VACUUM")

    def _replace(
        self, kind: Kind, items: Sequence[Picture] | Sequence[Caption], ids: Tensor, rows: Mapping[int, int]
    ) -> bool:  # fmt: skip
        """Write the records that are new or differ; returns whether there were any, or any to delete."""
        embeddings = (rows[self._key(kind, content_of(item))] for item in items)
        values = (
            (id, *columns, row) for id, columns, row in zip(ids.tolist(), map(_columns, items), embeddings, strict=True)
        )
        new, gone = {row[0]: (*row, crc_of(row)) for row in values}, []
        for row in self._file.each(f"SELECT * FROM {kind}"):
            if row[0] not in new:
                gone.append((row[0],))
            elif new[row[0]] == row:
                del new[row[0]]
        marks = ", ".join("?" * (11 if kind == "picture" else 8))
        self._write(f"DELETE FROM {kind} WHERE id = ?", many=gone)
        self._write(f"INSERT OR REPLACE INTO {kind} VALUES ({marks})", many=[new[id] for id in sorted(new)])
        if new or gone:
            self._write("DELETE FROM meta WHERE key = 'build'")
        return bool(new or gone)

    def _replace_meta(self, meta: Mapping[str, Any]) -> bool:
        """Write metadata, ids and cohort, unless only the date differs from a gallery of the same records."""
        old = {key: value for key, value, crc in self._file("SELECT * FROM meta") if crc == crc_of((key, value))}
        undated = [{**each, "metadata": _undated(each.get("metadata", "{}"))} for each in (old, meta)]
        if undated[0].pop("build", "") and undated[0] == undated[1]:
            return False
        rows = [*meta.items(), ("build", secrets.token_hex(8))]
        self._write("DELETE FROM meta")
        self._write("INSERT INTO meta VALUES (?, ?, ?)", many=[(*row, crc_of(row)) for row in rows])
        return True


def _undated(header: str) -> dict[str, Any]:
    return {**json.loads(header), "built": ""}


def _blobs(embeds: Tensor) -> list[bytes]:
    return [row.tobytes() for row in embeds.numpy().astype("<f2")]


def _columns(item: Picture | Caption) -> Row:
    """Lay a record out as its row, without id, embedding and checksum."""
    if isinstance(item, Caption):
        name, text, lang, scene, topic = astuple(item)
        # Nearly every name begins with the scene: that is a tenth of the row.
        return name.removeprefix(scene) if scene and name.startswith(f"{scene}.") else name, text, lang, scene, topic
    captions = json.dumps(dict(item.captions), ensure_ascii=False) if item.captions else ""
    source, folder = os.fsencode(item.source), os.fsencode(folder_of(item.source))
    file = item.file or FileFingerprint(0, 0, "")
    return item.id, source, folder, captions, item.credit, file.size, file.mtime_ns, bytes.fromhex(file.sha256)


def content_of(item: Picture | Caption) -> str:
    """Return what an item's embedding is stored by: the SHA-256 of a picture's file, or a caption's text."""
    if isinstance(item, Caption):
        return item.text
    return item.file.sha256 if item.file else item.id


def write_gallery(
    folder: Path, pictures: Sequence[Picture], captions: Sequence[Caption], embeds: Mapping[Kind, Iterable[Tensor]],
    embed_dim: int, metadata: GalleryMetadata, cohort: Mapping[str, Tensor],
    thumbnail: Callable[[Picture], bytes | None] = lambda picture: None,
) -> None:  # fmt: skip
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
    fingerprint = metadata.fingerprint
    with atomic_write(folder / DATABASE) as temp, closing(GalleryWriter(temp, fingerprint, embed_dim)) as writer:
        items: dict[Kind, Sequence[Picture] | Sequence[Caption]] = {"picture": pictures, "caption": captions}
        for kind, batches in embeds.items():
            contents = map(content_of, items[kind])
            for batch in batches:
                writer.add(kind, islice(contents, len(batch)), batch)
                writer.commit()
        for row, picture in enumerate(pictures):
            if picture.file and (webp := thumbnail(picture)):
                writer.add_thumbnail(picture.file.sha256, webp)
            if row % _BATCH == 0:
                writer.commit()
        writer.finish(pictures, captions, metadata, cohort)
