"""The index on a Milvus server: one collection, for galleries that outgrow one machine.

Place in the flow: as `embedded`, behind the same face; several processes may use one collection. A row is an id, an
embedding and its tags, an array of texts. Only what every Milvus from 2.3 on does the same way is asked of it: its own
choice of an index, filters written out, no request larger than `REQUEST`.

Searches are approximate where Milvus has built its index, as for any database; what they return are cosines as float32
adds them up, and rows whose cosines differ by less than `TIE` count as equal and go by their ids. Where Milvus is of
no help, for a subset or for more results than it returns, the rows are fetched piece by piece and ranked here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.index.exact import Positions, rank
from alignment.index.face import Index
from alignment.index.incoming import integers, new_rows, query_rows, refuse_unknown, subset_ids
from alignment.index.server import SEARCHING, Server

REQUEST = 4 << 20
"""Bytes of embeddings in one request or answer; the least that servers take is some megabytes more."""

MOST = 16_384
"""Rows that Milvus returns at most."""

TIE = 5e-7
"""Cosines that lie closer are equal: what float32 may be off by in practice."""

LOADING = 600.0
"""Seconds in which a collection has to be loaded into the server's memory."""

_LEAST, _DEEPER = 64, 4  # rows asked for at least, and times as many where a tie reaches beyond them
_IDS_AT_ONCE = 4096  # in a filter
_TAG_BYTES, _TAGS = 65_535, 4096  # as long, and as many to a row, as Milvus allows
_UNLISTED = 2**63 - 1  # by 2.3, where no filter is given
_MARK = "_is_"
_OURS = "image-text-alignment"
_OWN, _ALL = "Session", "Strong"  # a read sees the writes made through this object, or everybody's, which takes longer


class MilvusIndex(Index):
    """A collection on a Milvus server.

    Changes are kept as soon as a call returns. A search sees the changes made through this object; those of others
    after a moment.
    """

    def __init__(self, server: Server, name: str) -> None:
        """Open a collection and have it loaded.

        Args:
            server: where it lies.
            name: of the collection.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when somebody else made it, or pymilvus is missing.
            OSError: when the server does not answer or refuses us.
        """
        self.name = name
        self._server = server.connect()
        try:
            described = self._server.ask("describe_collection", name)
            self._about, self._embed_dim = _read(described, name, server)
            self._server.ask("load_collection", name, patience=LOADING)
        except BaseException:
            self._server.close()
            raise

    @classmethod
    def create(cls, server: Server, name: str, embed_dim: int, about: Mapping[str, str]) -> MilvusIndex:
        """Make an empty collection and open it.

        Args:
            server: where to.
            name: letters, digits and underscores, no digit first.
            embed_dim: width of the embeddings.
            about: kept beside it for good.
        """
        from pymilvus import DataType, MilvusClient

        connection = server.connect()
        try:
            described = json.dumps({"made_by": _OURS, "format": 1, **about})
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=described)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("embed", DataType.FLOAT_VECTOR, dim=embed_dim)
            tags = {"element_type": DataType.VARCHAR, "max_capacity": _TAGS, "max_length": _TAG_BYTES}
            schema.add_field("tags", DataType.ARRAY, **tags)
            index = MilvusClient.prepare_index_params()
            index.add_index("embed", index_type="AUTOINDEX", metric_type="IP", params={})
            connection.ask("create_collection", name, schema=schema, index_params=index, patience=LOADING)
        finally:
            connection.close()
        return cls(server, name)

    @staticmethod
    def exists(server: Server, name: str) -> bool:
        """Whether there is a collection of this name."""
        connection = server.connect()
        try:
            return bool(connection.ask("has_collection", name))
        finally:
            connection.close()

    def drop(self) -> None:
        """Delete the collection with all that is in it."""
        self.unmark()
        self._server.ask("drop_collection", self.name)

    def close(self) -> None:
        """Let go of the server; nothing may be asked afterwards."""
        self._server.close()

    # ------------------------------------------------------------ reading

    @property
    def about(self) -> Mapping[str, str]:
        """What its owner had written down beside it."""
        return self._about

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self._embed_dim

    def __len__(self) -> int:
        return self._count("")

    def ids(self, tag: str | None = None) -> Tensor:
        """List the ids of all rows, or of those with a tag: (n,) int64, ascending."""
        return torch.from_numpy(self._ids(_carries(tag)))

    def tags(self) -> dict[str, int]:
        """Count the rows of each tag, in order of the tags; reads the tags of every row."""
        counts = Counter(tag for page in self._pages("", "tags") for row in page for tag in row["tags"])
        named = {_read_tag(tag): count for tag, count in counts.items()}
        return {tag: named[tag] for tag in sorted(named)}

    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids.

        Raises:
            ValueError: on an id that is not there.
        """
        distinct, places = np.unique(integers(ids), return_inverse=True)
        found, there = np.empty((len(distinct), self.embed_dim), np.float32), np.zeros(len(distinct), bool)
        for level in (_OWN, _ALL):  # to wait for what others write only where something seems to be missing
            for part in _pieces(distinct[~there], self._rows_at_once):
                for row in self._query(_among(part), "id", "embed", level=level):
                    place = np.searchsorted(distinct, row["id"])
                    found[place], there[place] = row["embed"], True
        refuse_unknown(distinct[~there])
        return torch.from_numpy(found[places])

    def search(
        self, queries: Tensor, k: int, *, tag: str | None = None, subset: Tensor | None = None, extra: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id; see `Index.search`."""
        rows, wanted = query_rows(queries, self.embed_dim, k, extra), k + extra
        if subset is not None:
            chosen = subset_ids(subset, lambda: self._ids(""))
            refuse_unknown(np.setdiff1d(chosen, self._there(chosen)))
            found = self._rank(rows, wanted, self._there(chosen, _carries(tag)))
        elif not len(rows) or not wanted:
            width = min(wanted, self._count(_carries(tag), _OWN)) if wanted else 0
            found = np.empty((len(rows), width), np.float32), np.empty((len(rows), width), np.int64)
        else:
            found = self._nearest(rows, k, wanted, _carries(tag)) or self._rank(rows, wanted, self._ids(_carries(tag)))
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def _nearest(
        self, queries: NDArray[np.float64], k: int, wanted: int, condition: str
    ) -> tuple[NDArray[np.float32], Positions] | None:
        """Ask Milvus; None where it returns less than there is."""
        if wanted > MOST:
            return None
        limit = min(max(wanted + wanted // 8, _LEAST), MOST)
        found = self._hits(queries, limit, condition)
        while limit < MOST and any(len(ids) == limit and _tied(scores, k) for scores, ids in found):
            limit = min(limit * _DEEPER, MOST)
            found = self._hits(queries, limit, condition)
        width = min(wanted, *(len(ids) for _, ids in found)) if found else wanted
        if width < wanted and width < min(k, self._count(condition, _OWN)):
            return None
        return np.stack([scores[:width] for scores, _ in found]), np.stack([ids[:width] for _, ids in found])

    def _hits(
        self, queries: NDArray[np.float64], limit: int, condition: str
    ) -> list[tuple[NDArray[np.float32], Positions]]:
        found = []
        for part in _pieces(queries.astype(np.float32), max(1, min(self._rows_at_once, REQUEST // (16 * limit)))):
            answers = self._server.ask(
                "search",
                self.name,
                data=list(part),
                anns_field="embed",
                limit=limit,
                filter=condition,
                search_params={"metric_type": "IP", "params": {}},
                consistency_level=_OWN,
                patience=SEARCHING,
            )
            for hits in answers:
                scores = np.array([hit["distance"] for hit in hits], np.float32)
                found.append(_in_order(scores, np.array([hit["id"] for hit in hits], np.int64)))
        return found

    def _rank(self, queries: NDArray[np.float64], wanted: int, ids: Positions) -> tuple[NDArray[np.float32], Positions]:
        """Rank rows exactly; they are fetched piece by piece."""
        scores, best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for part in _pieces(ids, self._rows_at_once):
            more, places = rank(self.embeds(torch.from_numpy(part)).numpy(), queries, wanted)
            scores, best = np.concatenate([scores, more], 1), np.concatenate([best, part[places]], 1)
            order = np.lexsort((best, -scores), axis=1)[:, :wanted]
            scores, best = np.take_along_axis(scores, order, 1), np.take_along_axis(best, order, 1)
        return scores, best

    # ------------------------------------------------------------ changing

    def upsert(self, ids: Tensor, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> None:
        """Add rows; one whose id is there already takes the place of the old one; see `Index.upsert`."""
        numbers, rows, names = new_rows(ids, embeds, tags, self.embed_dim)
        if len(numbers) and numbers[-1] == _UNLISTED:
            raise ValueError(f"Milvus does not list a row with the id {_UNLISTED}; choose another.")
        written = [_written_tags(row) for row in names] if names is not None else [[] for _ in numbers]
        for places in _pieces(np.arange(len(numbers)), self._rows_at_once):
            wide = rows[places].astype(np.float32)
            data = [
                {"id": int(numbers[place]), "embed": row, "tags": written[place]}
                for place, row in zip(places.tolist(), wide, strict=True)
            ]
            self._server.ask("upsert", self.name, data=data)

    def delete(self, ids: Tensor) -> int:
        """Take rows out; ids that are not there do no harm. Returns how many went."""
        there = self._there(np.unique(integers(ids)))
        for part in _pieces(there, _IDS_AT_ONCE):
            self._server.ask("delete", self.name, filter=_among(part))
        return len(there)

    def mark(self, text: str) -> None:
        """Put a mark on the collection, besides those it has.

        Whoever fills it marks what is in it, once all of that is, so that nobody has to look. A mark is an alias of the
        collection: every server knows these.

        Args:
            text: letters and digits.
        """
        if text not in self.marks:
            self._server.ask("create_alias", self.name, self.name + _MARK + text)

    def unmark(self, but: str = "") -> None:
        """Take the marks off, but for one."""
        for mark in self.marks:
            if mark != but:
                self._server.ask("drop_alias", self.name + _MARK + mark)

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that it carries."""
        described = self._server.ask("describe_collection", self.name)
        start = self.name + _MARK
        return tuple(alias.removeprefix(start) for alias in described.get("aliases", ()) if alias.startswith(start))

    # ------------------------------------------------------------ requests

    @property
    def _rows_at_once(self) -> int:
        return max(1, min(_IDS_AT_ONCE, REQUEST // (4 * self.embed_dim)))

    def _query(self, condition: str, *fields: str, level: str = _ALL, **options: Any) -> list[dict[str, Any]]:
        asked = {"filter": condition, "output_fields": list(fields), "consistency_level": level, **options}
        return list(self._server.ask("query", self.name, **asked))

    def _count(self, condition: str, level: str = _ALL) -> int:
        return int(self._query(condition, "count(*)", level=level)[0]["count(*)"])

    def _pages(self, condition: str, *fields: str) -> Iterator[list[dict[str, Any]]]:
        """Read rows in the order of their ids, some thousand at a time."""
        after = condition
        while True:
            page = sorted(self._query(after, "id", *fields, limit=MOST), key=lambda row: row["id"])
            yield page
            if len(page) < MOST:
                return
            after = " and ".join(filter(None, [condition, f"id > {page[-1]['id']}"]))

    def _ids(self, condition: str) -> Positions:
        pages = [np.array([row["id"] for row in page], np.int64) for page in self._pages(condition)]
        return np.concatenate(pages)

    def _there(self, ids: Positions, condition: str = "") -> Positions:
        """Tell which of these ids have a row, ascending."""
        none = np.empty(0, np.int64)
        parts = []
        for part in _pieces(ids, _IDS_AT_ONCE):
            rows = self._query(" and ".join(filter(None, [_among(part), condition])), "id")
            parts.append(np.array([row["id"] for row in rows], np.int64))
        return np.sort(np.concatenate([none, *parts]))


def _read(described: Mapping[str, Any], name: str, server: Server) -> tuple[dict[str, str], int]:
    """Read what a collection says of itself."""
    try:
        about = json.loads(described["description"])
        if about.pop("made_by") != _OURS:
            raise ValueError
        widths = [field["params"]["dim"] for field in described["fields"] if field["name"] == "embed"]
        form = about.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"The collection {name} at {server.uri} was made by another program; choose a name.") from None
    if form != 1:
        raise ValueError(f"The collection {name} at {server.uri} has the format {form}, and this version reads 1.")
    return about, int(widths[0])


# ---------------------------------------------------------------- filters


def _carries(tag: str | None) -> str:
    """Write the filter for a tag; empty for None."""
    return "" if tag is None else f"array_contains(tags, {_quoted(_write_tag(tag))})"


def _among(ids: Positions) -> str:
    """Write the filter for some ids."""
    return f"id in [{', '.join(map(str, ids.tolist()))}]"


def _write_tag(tag: str) -> str:
    """Write any text as one without control characters, which may hold what is no Unicode: names of files do."""
    return json.dumps(tag, ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace").decode()


def _read_tag(written: str) -> str:
    """Undo `_write_tag`."""
    return str(json.loads(f'"{written}"'))


def _quoted(text: str) -> str:
    """Quote a text for a filter; after `_write_tag` only backslashes and quotes mean anything."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _written_tags(tags: Collection[str]) -> list[str]:
    written = sorted({_write_tag(tag) for tag in tags})
    if len(written) > _TAGS or any(len(tag.encode()) > _TAG_BYTES for tag in written):
        raise ValueError(f"Milvus keeps {_TAGS} tags of {_TAG_BYTES} bytes to a row, and this one has more.")
    return written


# ---------------------------------------------------------------- order


def _in_order(scores: NDArray[np.float32], ids: Positions) -> tuple[NDArray[np.float32], Positions]:
    """Sort results, best first, equal ones by id and with equal scores."""
    best = np.argsort(-scores, kind="stable")
    scores, ids = scores[best], ids[best]
    groups = np.concatenate([[0], np.cumsum(scores[:-1] - scores[1:] > TIE)]).astype(np.int64)[: len(scores)]
    order = np.lexsort((ids, groups))
    return scores[np.searchsorted(groups, groups)], ids[order]


def _tied(scores: NDArray[np.float32], k: int) -> bool:
    """Whether the k-th best is as good as the last one, so that others may be as good."""
    return 0 < k <= len(scores) and bool(scores[k - 1] == scores[-1])


def _pieces(array: NDArray, size: int) -> Iterator[NDArray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
