"""Write `gallery.db`, or the file of one share of a build; `alignment.gallery.database` explains the tables.

Place in the flow: `embeddings and thumbnails as they are made, then records -> gallery.db (here)`.
"""

import hashlib
import json
import logging
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
from alignment.gallery.database import CHOSEN, COHORT, COLUMNS, DATABASE, VERSION, Kind, Row, SQLiteFile, to_tensor
from alignment.gallery.records import Caption, FileFingerprint, GalleryMetadata, Picture, folder_of, item_ids

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(key TEXT, value, crc INTEGER);
CREATE TABLE IF NOT EXISTS embedding(id INTEGER PRIMARY KEY, key INTEGER UNIQUE, embeds BLOB, crc INTEGER);
CREATE TABLE IF NOT EXISTS thumbnail(id INTEGER PRIMARY KEY, sha256 BLOB UNIQUE, webp BLOB, crc INTEGER);
CREATE TABLE IF NOT EXISTS picture(id INTEGER PRIMARY KEY, name TEXT, source BLOB, folder BLOB, captions TEXT,
    credit TEXT, size INTEGER, mtime_ns INTEGER, sha256 BLOB, embedding INTEGER, crc INTEGER);
CREATE TABLE IF NOT EXISTS caption(id INTEGER PRIMARY KEY, name TEXT, text TEXT, lang TEXT, scene TEXT, topic TEXT,
    embedding INTEGER, crc INTEGER);
CREATE INDEX IF NOT EXISTS picture_name ON picture(name);
CREATE TABLE IF NOT EXISTS scanned(source BLOB PRIMARY KEY, size, mtime_ns, sha256) WITHOUT ROWID;
"""
_CONTENT = ("embedding", "thumbnail")  # tables of what is stored by its content
_PAGE_BYTES = 65536  # 31 rows of 1,024 halves; a row of 2 kB wastes half of a page of 4,096
_SPILL_PAGES = 4096  # of changes in memory
_BATCH = 4096  # rows of one transaction
_SMALL = 64 * 2**20  # bytes up to which a database is always packed at the end of a build
_WASTE = 0.25  # share of free pages from which a large one is packed
_USED = "(SELECT embedding FROM picture UNION ALL SELECT embedding FROM caption)"


class GalleryWriter(SQLiteFile):
    """Adds embeddings and thumbnails as they come, and replaces the records at the end.

    One process at a time, see `alignment.atomic.exclusive_lock`. Several threads may call `has` and `has_thumbnail`.
    """

    def __init__(self, path: Path, fingerprint: str, embed_dim: int, base: Path | None = None) -> None:
        """Open or create a file, and delete damaged embeddings and thumbnails: they are made again.

        What the gallery `base` holds counts as there. ValueError when the file is damaged in another way.
        """
        super().__init__(path, "rwc")
        self.embed_dim, self.fingerprint = embed_dim, fingerprint
        self._files: list[SQLiteFile] = [self]
        if base is not None:
            with suppress(OSError, ValueError):  # there is none, or it is damaged
                self._files.append(SQLiteFile(base, "ro"))

    def _prepare(self) -> None:
        self(f"PRAGMA page_size={_PAGE_BYTES}")
        self(f"PRAGMA cache_spill={_SPILL_PAGES}")  # up to that, readers are locked out for the commit only
        if not self("SELECT 1 FROM sqlite_schema WHERE name = 'scanned'"):
            for statement in ("BEGIN", *_SCHEMA.split(";")[:-1], f"PRAGMA user_version={VERSION}", "COMMIT"):
                self(statement)
        if not (faults := list(self.faults())):
            return
        if broken := [fault for fault in faults if fault.partition(" ")[0] not in COLUMNS]:
            raise self.damaged(broken[0])
        for table in _CONTENT:  # the others are replaced anyway
            self(f"DELETE FROM {table} WHERE crc IS NOT crc_of({COLUMNS[table]})")
        self.commit()
        logger.warning("%s is damaged in %d places, which are made again: %s", self.path, len(faults), faults[0])

    def close(self) -> None:
        """Close the file, and delete it if it holds nothing; what was not committed is gone."""
        empty = False
        with suppress(OSError, ValueError), self._errors():  # an earlier error is the one to report
            self._connection.rollback()
            empty = not any(self(f"SELECT 1 FROM {table} LIMIT 1") for table in ("meta", "embedding", "scanned"))
        for file in self._files[1:]:
            file.close()
        super().close()
        if empty:
            delete_database(self.path)

    def _key(self, kind: Kind, content: str) -> int:
        text = f"{self.fingerprint}\0{kind}\0{content}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def has(self, kind: Kind, content: str) -> bool:
        """Whether there is an embedding of a picture's file, by its SHA-256, or of a caption, see `content_of`."""
        return any(file("SELECT 1 FROM embedding WHERE key = ?", [self._key(kind, content)]) for file in self._files)

    def has_thumbnail(self, sha256: str) -> bool:
        """Whether there is a thumbnail of a picture's file."""
        return any(file("SELECT 1 FROM thumbnail WHERE sha256 = ?", [bytes.fromhex(sha256)]) for file in self._files)

    def add(self, kind: Kind, contents: Iterable[str], embeds: Tensor) -> None:
        """Add embeddings, (n, embed_dim), in half precision; contents as for `has`."""
        rows = zip((self._key(kind, content) for content in contents), _blobs(embeds), strict=True)
        self("INSERT OR IGNORE INTO embedding(key, embeds, crc) VALUES (?1, ?2, crc_of(?1, ?2))", many=rows)

    def embeds(self, kind: Kind, items: Sequence[Picture | Caption], positions: Tensor) -> Tensor:
        """Fetch the embeddings of the items at some positions, (n, embed_dim) float16; KeyError when one is missing."""
        keys = [self._key(kind, content_of(items[position])) for position in positions.tolist()]
        sql = f"SELECT key, embeds FROM embedding WHERE key IN {CHOSEN}"
        found: dict[int, bytes] = dict(self(sql, (json.dumps(keys),)))
        return to_tensor((found[key] for key in keys), "<f2").reshape(len(keys), self.embed_dim)

    def add_thumbnail(self, sha256: str, webp: bytes) -> None:
        """Add the thumbnail of a picture's file."""
        sql = "INSERT OR REPLACE INTO thumbnail(sha256, webp, crc) VALUES (?1, ?2, crc_of(?1, ?2))"
        self(sql, (bytes.fromhex(sha256), webp))

    def add_scanned(self, source: str, file: FileFingerprint) -> None:
        """Note the state of a picture's file until the build is finished: the next one need not read it again."""
        self("INSERT OR REPLACE INTO scanned VALUES (?, ?, ?, ?)", (os.fsencode(source), *astuple(file)))

    def scanned(self) -> dict[str, FileFingerprint]:
        """Return what `add_scanned` noted, by source."""
        return {os.fsdecode(source): FileFingerprint(*state) for source, *state in self("SELECT * FROM scanned")}

    def count_unused(self) -> int:
        """Count the embeddings that no record refers to, which an unfinished build left."""
        return int(self(f"SELECT count(*) FROM embedding WHERE id NOT IN {_USED}")[0][0])

    def merge(self, share: Path) -> None:
        """Take over embeddings, thumbnails and files that this database lacks; after an error it can only be closed."""
        self("ATTACH ? AS share", (f"{share.absolute().as_uri()}?mode=rw",))
        for table, columns in ((table, f"{COLUMNS[table]}, crc") for table in _CONTENT):
            last = self(f"SELECT max(id) FROM share.{table}")[0][0] or 0
            for start in range(0, last, _BATCH):
                rows = f"SELECT {columns} FROM share.{table} WHERE id > {start} AND id <= {start + _BATCH}"
                self(f"INSERT OR IGNORE INTO {table}({columns}) {rows} ORDER BY id")
                self.commit()
        self("INSERT OR REPLACE INTO scanned SELECT * FROM share.scanned")
        self.commit()
        self("DETACH share")

    def finish(
        self, pictures: Sequence[Picture], captions: Sequence[Caption], metadata: GalleryMetadata,
        cohort: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Replace the records in one transaction, and delete embeddings and thumbnails that no record refers to.

        Nothing is written where only the date differs. Pictures and captions come in order of position; KeyError unless
        embeddings of all were added. The counts of the metadata are filled in.
        """
        self.commit()
        before = self._connection.total_changes
        rows: dict[int, int] = dict(self("SELECT key, id FROM embedding"))
        ids = {"picture": self._replace("picture", pictures, rows), "caption": self._replace("caption", captions, rows)}
        self(f"DELETE FROM embedding WHERE id NOT IN {_USED}")
        self("DELETE FROM thumbnail WHERE sha256 NOT IN (SELECT sha256 FROM picture)")
        self("DELETE FROM scanned WHERE 1")  # without a WHERE, it changes the file even if there are none
        ids["packaged"] = ids["picture"][[place for place, picture in enumerate(pictures) if picture.package]]
        meta: dict[str, Any] = {name: part.numpy().astype("<i8").tobytes() for name, part in ids.items()}
        meta |= {COHORT + name: b"".join(_blobs(part)) for name, part in cohort.items()}
        header = asdict(metadata) | {"num_pictures": len(pictures), "num_captions": len(captions)}
        here = Path(os.path.abspath(self.path.parent))
        if Path(metadata.source).is_relative_to(here.parent):  # in or beside the gallery: the two may move together
            header["source"] = "./" + os.path.relpath(metadata.source, here).replace(os.sep, "/")
        self._replace_meta(meta | {"embed_dim": self.embed_dim}, header, self._connection.total_changes > before)
        self.commit()
        pages, free = (self(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count"))
        if self._connection.total_changes > before and (pages * _PAGE_BYTES <= _SMALL or free > _WASTE * pages):
            with suppress(OSError):  # in use, or no room for the copy; it is complete anyway
                self("VACUUM")

    def _replace(self, kind: Kind, items: Sequence[Picture | Caption], rows: Mapping[int, int]) -> Tensor:
        ids = item_ids(items)
        embeddings = (rows[self._key(kind, content_of(item))] for item in items)
        values = ((id, *_columns(item), row) for id, item, row in zip(ids.tolist(), items, embeddings, strict=True))
        names = [*COLUMNS[kind].split(", "), "crc"]
        marks = ", ".join(f"?{place}" for place in range(1, len(names)))
        old, new = ", ".join(names), ", ".join(f"excluded.{name}" for name in names)
        self(f"DELETE FROM {kind} WHERE id NOT IN {CHOSEN}", (json.dumps(ids.tolist()),))
        update = f"DO UPDATE SET ({old}) = ({new}) WHERE ({old}) IS NOT ({new})"  # an equal row is no change
        self(f"INSERT INTO {kind} VALUES ({marks}, crc_of({marks})) ON CONFLICT(id) {update}", many=values)
        return ids

    def _replace_meta(self, meta: dict[str, Any], header: dict[str, Any], changed: bool) -> None:
        old: dict[str, Any] = dict(self("SELECT key, value FROM meta WHERE crc IS crc_of(key, value)"))
        built, build = json.loads(old.get("metadata", "{}")).get("built"), old.get("build")
        if changed or old != meta | {"metadata": json.dumps(header | {"built": built}), "build": build}:
            meta |= {"metadata": json.dumps(header), "build": secrets.token_hex(8)}
            self("DELETE FROM meta")
            self("INSERT INTO meta VALUES (?1, ?2, crc_of(?1, ?2))", many=meta.items())


def delete_database(path: Path) -> None:
    """Delete a database and its journal."""
    for name in (path, path.with_name(f"{path.name}-journal")):
        name.unlink(missing_ok=True)


def _blobs(embeds: Tensor) -> list[bytes]:
    return [row.tobytes() for row in embeds.numpy().astype("<f2")]


def _columns(item: Picture | Caption) -> Row:
    """Lay a record out as its row, without id and embedding."""
    if isinstance(item, Caption):
        name, text, lang, scene, topic, _ = astuple(item)
        # Nearly every name begins with the scene: that is a tenth of the row.
        return name.removeprefix(scene) if scene and name.startswith(f"{scene}.") else name, text, lang, scene, topic
    captions = json.dumps(dict(item.captions), ensure_ascii=False) if item.captions else ""
    source, folder, file = item.source, folder_of(item.source), item.file or FileFingerprint(0, 0, "")
    state = file.size, file.mtime_ns, bytes.fromhex(file.sha256)
    return item.id, os.fsencode(source), os.fsencode(folder), captions, item.credit, *state


def content_of(item: Picture | Caption) -> str:
    """Return what an item's embedding is stored by: the SHA-256 of a picture's file, or a caption's texts."""
    if isinstance(item, Caption):
        return "\0".join(item.translations) or item.text
    return item.file.sha256 if item.file else item.id


def write_gallery(
    folder: Path, pictures: Sequence[Picture], captions: Sequence[Caption], embeds: Mapping[Kind, Iterable[Tensor]],
    embed_dim: int, metadata: GalleryMetadata, cohort: Mapping[str, Tensor],
    thumbnail: Callable[[Picture], bytes | None] = lambda picture: None,
) -> None:  # fmt: skip
    """Write a new `gallery.db` in a folder, which no other process writes to, and rename it to its place at the end.

    Pictures, captions and the batches of their embeddings, (n, embed_dim) each, come in order of position. `thumbnail`
    returns the WebP file of a picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = metadata.fingerprint
    with atomic_write(folder / DATABASE) as temp, closing(GalleryWriter(temp, fingerprint, embed_dim)) as writer:
        for kind, batches in embeds.items():
            contents = map(content_of, pictures if kind == "picture" else captions)
            for batch in batches:
                writer.add(kind, islice(contents, len(batch)), batch)
                writer.commit()
        for picture in pictures:
            if picture.file and (webp := thumbnail(picture)):
                writer.add_thumbnail(picture.file.sha256, webp)
        writer.finish(pictures, captions, metadata, cohort)
