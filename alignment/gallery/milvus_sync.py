"""Copy the embeddings of a gallery to a Milvus server and back, for galleries that outgrow one machine.

Place in the flow: `gallery.db -> collections on the server (here) -> search`. Pictures and captions have a collection
each, such as `my_photos_image_embeds_0123456789ab` with the model at its end. Rows have the ids of the gallery. When
all are there and indexed, the collection is marked with a digest of the ids, which an app compares instead of listing
them; then rows are deleted that the gallery has no more. A collection stores its owner, random letters that are also in
the file `milvus.json` of the gallery folder and of its copies; rows of another owner are never changed.
"""

import argparse
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

import torch
from torch import Tensor

from alignment.atomic import exclusive_lock
from alignment.checksum import read_json_checksummed, write_json_checksummed
from alignment.gallery.database import DATABASE, KINDS, SIDES, GalleryDatabase, Kind
from alignment.gallery.old_format import import_gallery
from alignment.gallery.records import tags_of
from alignment.gallery.writer import GalleryWriter, content_of
from alignment.index import MilvusIndex, Server
from alignment.index.server import Connection

logger = logging.getLogger(__name__)

OWNER_FILE = "milvus.json"
_URI_HELP = "a Milvus server for the embeddings, such as http://localhost:19530 (or ALIGNMENT_INDEX)"
_NAME_HELP = "of the gallery there, if not that of its folder (or ALIGNMENT_INDEX_NAME)"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_BATCH_ROWS = 16_384

Progress: TypeAlias = Callable[[int, int, str], object]  # rows done, rows in all, what is done


@dataclass(frozen=True)
class Remote:
    """The collections of a gallery on a server: which server, the gallery's name there, and its folder here."""

    server: Server
    name: str
    folder: Path

    @classmethod
    def of(cls, uri: str | None, folder: str | os.PathLike[str], name: str | None = None) -> Self | None:
        """Read the options of a command; None without an address, ValueError if Milvus does not accept them."""
        if name and not _NAME.fullmatch(name):
            raise ValueError(f"--index-name takes letters, digits and underscores, no digit first, not {name}")
        return cls(Server.at(uri), name or default_name(folder), Path(folder)) if uri else None

    def collection(self, kind: Kind, fingerprint: str) -> str:
        """Return the name of a collection."""
        return f"{self.name}_{SIDES[kind]}_{fingerprint[:12]}"

    def push_command(self) -> str:
        """Return the command that brings the server up to date."""
        own = "" if self.name == default_name(self.folder) else f" --index-name {self.name}"
        return f"python -m alignment.gallery push {self.folder} --index {self.server.uri}{own}"

    def open(self, kind: Kind, fingerprint: str, ids: Tensor) -> MilvusIndex:
        """Open a collection that holds the rows of all ids, and perhaps others; ValueError if there is none."""
        where, push = f"the collection {self.collection(kind, fingerprint)}", self.push_command()
        if (index := self._find(kind, fingerprint)) is None:
            raise ValueError(f"{self.server.uri} lacks {where}. Put the gallery there with: {push}")
        if digest(ids) in index.marks and len(index) >= len(ids):
            return index
        index.close()
        raise ValueError(
            f"At {self.server.uri}, {where} is not what {self.folder} says. If this folder is an older copy, copy it "
            f"anew; else bring the server up to date with: {push}"
        )

    def embeds(self, kind: Kind, fingerprint: str, ids: Tensor) -> Tensor:
        """Fetch all embeddings of a collection, (n, embed_dim) float32; errors as of `open`."""
        with closing(self.open(kind, fingerprint, ids)) as index:
            return index.embeds(ids)

    def push(self, database: GalleryDatabase, show: Progress, *, dry_run: bool = False) -> list[str]:
        """Bring the server up to date, or only say what would change; returns a line on each collection.

        ValueError if a collection is of another gallery, or this one is rebuilt meanwhile.
        """
        return [self._push(kind, database, show, dry_run) for kind in KINDS if len(database.ids(kind))]

    def _push(self, kind: Kind, database: GalleryDatabase, show: Progress, dry_run: bool) -> str:
        ids, fingerprint = database.ids(kind), database.metadata.fingerprint
        index = self._find(kind, fingerprint)
        existing = ids[:0] if index is None else index.ids()
        if index is not None and index.about.get("owner", "") != self._owner():
            raise ValueError(
                f"The collection {index.name} at {self.server.uri} holds {len(existing)} rows of another gallery. "
                f"Choose another --index-name, or delete it with: {self.push_command()} --drop"
            )
        missing, stale = ids[~torch.isin(ids, existing)], existing[~torch.isin(existing, ids)]
        sent, gone, start = len(missing), len(stale), f"{self.collection(kind, fingerprint)}: {len(ids)} rows"
        if dry_run:
            return f"{start}, {sent} to be sent, {gone} to be taken out; nothing was changed"
        if index is None:
            about = {"fingerprint": fingerprint, "owner": self._owner() or secrets.token_hex(8)}
            write_json_checksummed(self.folder / OWNER_FILE, {"owner": about["owner"]})
            index = MilvusIndex.create(self.server, self.collection(kind, fingerprint), database.embed_dim, about)
        with closing(index):
            self._send(database, kind, missing, index, show)
            index.mark(digest(ids))
            index.delete(stale)
            if (count := len(index)) != len(ids):
                raise ValueError(f"{index.name} has {count} rows, not {len(ids)}. Run the command again.")
        return f"{start}, {sent} sent, {len(ids) - sent} were there, {gone} taken out"

    def _send(self, database: GalleryDatabase, kind: Kind, missing: Tensor, index: MilvusIndex, show: Progress) -> None:
        count = len(database.ids(kind))
        done = count - len(missing)
        for ids in filter(len, missing.split(_BATCH_ROWS)):
            try:
                items = (database.pictures if kind == "picture" else database.captions)(ids.tolist())
                index.upsert(ids, database.embeds(kind, ids), list(map(tags_of, items)))
            except KeyError:
                raise ValueError(f"{self.folder} was rebuilt meanwhile. Run the command again.") from None
            show(done := done + len(ids), count, index.name)
        try:
            index.wait_until_indexed(lambda left: show(max(0, count - left), count, f"{index.name}: index"))
        except (PermissionError, ValueError) as error:  # no privilege, or a provider without these requests
            logger.warning("Until the server has built the index of %s, searches miss results: %s", index.name, error)

    def pull(self, show: Progress) -> tuple[int, int]:
        """Fetch embeddings that the folder lacks; returns the number of items. ValueError if the server lacks them."""
        with exclusive_lock(self.folder):
            import_gallery(self.folder, self.embeds)
            with closing(GalleryDatabase(self.folder)) as old:
                pictures, captions = old.records()
                with closing(GalleryWriter(self.folder / DATABASE, old.metadata.fingerprint, old.embed_dim)) as writer:
                    self._fetch("picture", old.ids("picture"), list(map(content_of, pictures)), writer, show)
                    self._fetch("caption", old.ids("caption"), list(map(content_of, captions)), writer, show)
                    writer.finish(pictures, captions, old.metadata, old.cohort())
        return len(pictures), len(captions)

    def _fetch(self, kind: Kind, ids: Tensor, contents: list[str], writer: GalleryWriter, show: Progress) -> None:
        if not contents:
            return
        missing = [row for row, content in enumerate(contents) if not writer.has(kind, content)]
        with closing(self.open(kind, writer.fingerprint, ids)) as index:
            for start in range(0, len(missing), _BATCH_ROWS):
                rows = missing[start : start + _BATCH_ROWS]
                writer.add(kind, [contents[row] for row in rows], index.embeds(ids[rows]))
                writer.commit()
                show(start + len(rows), len(missing), index.name)

    def drop(self, fingerprint: str) -> dict[str, int]:
        """Delete all collections of a gallery; returns how many rows each had."""
        dropped, now = {}, [self._find(kind, fingerprint) for kind in KINDS]
        for index in filter(None, [*now, *self.of_other_models(fingerprint)]):
            with closing(index):
                dropped[index.name] = len(index)
                index.drop()
        return dropped

    def of_other_models(self, fingerprint: str) -> list[MilvusIndex]:
        """Open the collections that this gallery had for other models."""
        with closing(Connection(self.server)) as connection:
            names = sorted(connection.call("list_collections"))
        ours, owner = rf"{self.name}_({'|'.join(SIDES.values())})_(?!{fingerprint[:12]})[0-9a-f]{{12}}", self._owner()
        found = [MilvusIndex(self.server, name) for name in names if owner and re.fullmatch(ours, name)]
        return [index for index in found if index.about.get("owner") == owner]

    def _find(self, kind: Kind, fingerprint: str) -> MilvusIndex | None:
        try:
            index = MilvusIndex(self.server, self.collection(kind, fingerprint))
        except FileNotFoundError:
            return None
        if index.about.get("fingerprint") != fingerprint:
            index.close()
            raise ValueError(f"The collection {index.name} at {self.server.uri} was made by another model.")
        return index

    def _owner(self) -> str:
        path = self.folder / OWNER_FILE
        try:
            return str(read_json_checksummed(path)["owner"]) if path.exists() else ""
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy it from a copy of the gallery.") from error


def default_name(folder: str | os.PathLike[str]) -> str:
    """Make a name that Milvus accepts of a folder's; where characters are replaced, a hash of the whole is added."""
    given = Path(os.path.abspath(folder)).name
    name = re.sub(r"[^A-Za-z0-9_]+", "_", given).strip("_")[:60]
    if name == given and _NAME.fullmatch(name):
        return name
    suffix = hashlib.blake2b(given.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()[:8]
    return f"gallery_{name}_{suffix}".replace("__", "_")


def digest(ids: Tensor) -> str:
    """Hash a set of ids, in whatever order."""
    return hashlib.blake2b(ids.sort().values.numpy().tobytes(), digest_size=8).hexdigest()


def add_index_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options for a server; `Remote.of(args.index, folder, args.index_name)` reads them."""
    uri, name = os.environ.get("ALIGNMENT_INDEX") or None, os.environ.get("ALIGNMENT_INDEX_NAME") or None
    parser.add_argument("--index", metavar="URI", default=uri, required=required and not uri, help=_URI_HELP)
    parser.add_argument("--index-name", metavar="NAME", default=name, help=_NAME_HELP)
