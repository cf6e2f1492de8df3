"""Where a gallery's embeddings lie on a Milvus server, for galleries that outgrow one machine.

Place in the flow: as the index folders of `storage`, instead of which it is asked. Embeddings and tags are on the
server, a collection for each side that holds anything; what a person sees stays in the gallery folder: pictures and
captions, thumbnails, the stamp with the model's fingerprint, the calibration and its background. So the folder says
what is in the gallery, and the server finds it. Several apps may serve one gallery from copies of its folder.

A collection is called by the gallery, the side and the model: `my_photos_image_embeds_0123456789ab`. Rows go by the ids
of `storage`, made of what they belong to: a rerun finds those that are there and goes on. When all are there, the
collection is marked with a digest of their ids, so that the app need not list millions of them to know that the folder
and the server mean the same; only then are rows taken out that no item asks for. Whoever is killed in between leaves
rows too many, which a search overlooks, and the old mark, the new one or both.

Names come from folders, and two people may have a folder of the same name. So a collection says whose it is, by random
letters that lie in the gallery's folder as well, and in every copy of it; nobody else's rows are touched.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignment.atomic import read_json_checksummed, write_json_checksummed
from alignment.gallery.sides import Rows
from alignment.index import MilvusIndex, Server

INDEX, INDEX_NAME = "ALIGNMENT_INDEX", "ALIGNMENT_INDEX_NAME"

_OWNER = "milvus.json"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


@dataclass(frozen=True)
class Remote:
    """A gallery's place on a server.

    Attributes:
        server: which.
        name: of the gallery there.
        folder: the gallery's, for what errors advise.
    """

    server: Server
    name: str
    folder: Path

    @classmethod
    def of(cls, uri: str | None, folder: str | os.PathLike[str], name: str | None = None) -> Remote | None:
        """Find a gallery's place by the options of a command; None without an address.

        Raises:
            ValueError: when they are not what Milvus takes.
        """
        if not uri:
            return None
        if name and not _NAME.fullmatch(name):
            raise ValueError(
                f"Milvus takes letters, digits and underscores for --index-name, no digit first, not {name}"
            )
        return cls(Server.at(uri), name or default_name(folder), Path(folder))

    def check(self) -> None:
        """Raise an OSError, or a ValueError, when the server cannot be used."""
        self.server.connect().close()

    def collection(self, side: str, fingerprint: str) -> str:
        """Name the collection of a side."""
        return f"{self.name}_{side}_{fingerprint[:12]}"

    def push_command(self) -> str:
        """Spell out what brings the server up to date."""
        own = "" if self.name == default_name(self.folder) else f" --index-name {self.name}"
        return f"python -m alignment.gallery push {self.folder} --index {self.server.uri}{own}"

    def open(self, side: str, fingerprint: str, ids: Tensor) -> MilvusIndex:
        """Open a side that holds all rows of these ids.

        Raises:
            ValueError: when it does not; says what to run.
            OSError: when the server does not answer or refuses us.
        """
        name = self.collection(side, fingerprint)
        try:
            index = self._opened(name, fingerprint)
        except FileNotFoundError:
            where = f"{self.server.uri} has no collection {name}"
            raise ValueError(f"{where}. Put the gallery there with: {self.push_command()}") from None
        if digest(ids) not in index.marks or len(index) < len(ids):
            held = f"The collection {name} at {self.server.uri} is not what {self.folder} says"
            raise ValueError(
                f"{held}. If this folder is an older copy, copy it anew; else bring the server up to date with: "
                f"{self.push_command()}"
            )
        return index

    def fill(self, side: str, fingerprint: str, ids: Tensor, rows: Rows) -> Filled:
        """See what the server lacks of a side; a collection is made if there is none.

        Raises:
            ValueError: when the collection is of another gallery or model.
            OSError: when the server does not answer or refuses us.
        """
        name = self.collection(side, fingerprint)
        try:
            index = self._opened(name, fingerprint)
        except FileNotFoundError:
            width = rows[torch.empty(0, dtype=torch.int64)].shape[1]
            about = {"fingerprint": fingerprint, "owner": self._owner() or self._new_owner()}
            index = MilvusIndex.create(self.server, name, width, about)
        return Filled(index, ids, self.held(index, ids))

    def held(self, index: MilvusIndex, ids: Tensor) -> Tensor:
        """List what a collection holds; ValueError when it is another gallery's."""
        there, owner = index.ids(), index.about.get("owner", "")
        foreign = owner != self._owner() if owner else not torch.isin(ids, there).any()  # of before there were owners
        if len(there) and foreign:
            raise ValueError(
                f"The collection {index.name} at {self.server.uri} holds {len(there)} rows of another gallery. Choose "
                f"another --index-name, or delete it with: {self.push_command()} --drop"
            )
        return there

    def _owner(self) -> str:
        try:
            return str(read_json_checksummed(self.folder / _OWNER)["owner"])
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.folder / _OWNER} is damaged ({error}): copy it from a copy of the gallery."
            ) from error

    def _new_owner(self) -> str:
        owner = secrets.token_hex(8)
        write_json_checksummed(self.folder / _OWNER, {"owner": owner})
        return owner

    def sides(self, fingerprint: str, names: Sequence[str]) -> list[MilvusIndex]:
        """Open the collections that there are."""
        found = []
        for name in (self.collection(side, fingerprint) for side in names):
            try:
                found.append(self._opened(name, fingerprint))
            except FileNotFoundError:
                continue
        return found

    def left_behind(self, fingerprint: str, names: Sequence[str]) -> list[MilvusIndex]:
        """Open this gallery's collections of other models; of those that do not say whose they are, none."""
        connection = self.server.connect()
        try:
            there = connection.ask("list_collections")
        finally:
            connection.close()
        now = [self.collection(side, fingerprint) for side in names]
        ours = re.compile(rf"{re.escape(self.name)}_({'|'.join(names)})_[0-9a-f]{{12}}")
        old = (MilvusIndex(self.server, name) for name in sorted(there) if ours.fullmatch(name) and name not in now)
        owner = self._owner()
        return [index for index in old if owner and index.about.get("owner") == owner]

    def _opened(self, name: str, fingerprint: str) -> MilvusIndex:
        index = MilvusIndex(self.server, name)
        if index.about.get("fingerprint") != fingerprint:
            raise ValueError(f"The collection {name} at {self.server.uri} was made by another model.")
        return index


@dataclass(frozen=True)
class Filled:
    """A side on its way to the server.

    Attributes:
        index: its collection.
        ids: of all its items.
        there: ids of the rows that the server had.
    """

    index: MilvusIndex
    ids: Tensor
    there: Tensor

    @property
    def missing(self) -> Tensor:
        """Positions of the items whose rows the server had not."""
        return (~torch.isin(self.ids, self.there)).nonzero().flatten()

    @property
    def stale(self) -> Tensor:
        """Ids of the rows that no item asks for."""
        return self.there[~torch.isin(self.there, self.ids)]

    def add(self, positions: Tensor, rows: Tensor, tags: Sequence[Collection[str]]) -> None:
        """Add the rows of some items."""
        self.index.upsert(self.ids[positions], rows, tags)

    def mark(self) -> None:
        """Say that all items have their rows."""
        self.index.mark(digest(self.ids))

    def settle(self) -> None:
        """Take out what no item asks for.

        Raises:
            ValueError: when the collection does not hold what it should then.
        """
        self.index.unmark(but=digest(self.ids))
        self.index.delete(self.stale)
        if (count := len(self.index)) != len(self.ids):
            raise ValueError(f"{self.index.name} has {count} rows instead of {len(self.ids)}. Run the command again.")


def default_name(folder: str | os.PathLike[str]) -> str:
    """Make a name that Milvus takes of a gallery folder's; other letters are replaced by a hash of the whole."""
    given = Path(os.path.abspath(folder)).name
    name = re.sub(r"[^A-Za-z0-9_]+", "_", given).strip("_")[:60]
    if name == given and _NAME.fullmatch(name):
        return name
    return f"gallery_{name}_{_hash(given.encode('utf-8', 'surrogatepass'))[:8]}".replace("__", "_")


def digest(ids: Tensor) -> str:
    """Sum up which rows a side has, in whatever order."""
    return _hash(ids.sort().values.numpy().tobytes())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def add_index_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Let a command take a server; `Remote.of(args.index, folder, args.index_name)` reads it."""
    env = os.environ.get
    parser.add_argument(
        "--index",
        metavar="URI",
        default=env(INDEX) or None,
        required=required and not env(INDEX),
        help=f"a Milvus server for the embeddings, such as http://localhost:19530 (or {INDEX})",
    )
    parser.add_argument(
        "--index-name",
        metavar="NAME",
        default=env(INDEX_NAME) or None,
        help=f"of the gallery there, if not that of its folder (or {INDEX_NAME})",
    )
