"""Vector index on a Milvus server: one collection, for galleries that outgrow one machine.

A row is an id, an embedding and its tags, an array of texts. Only requests that every Milvus from 2.3 on answers alike
are used: its own choice of an index, literal filters, no message above `REQUEST_BYTES`. Searches are approximate.
Cosines that differ by less than `SCORE_TOLERANCE` count as equal and are ordered by id. Where Milvus returns too few
results, the embeddings are fetched and ranked here.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.index.local import rank
from alignment.index.server import SEARCH_TIMEOUT_S, Connection, Server
from alignment.index.vector_index import Ranking, VectorIndex

REQUEST_BYTES = 4 << 20  # of embeddings in one request or answer; every server accepts some megabytes more
MAX_LIMIT = 16_384  # rows that Milvus returns in one answer
SCORE_TOLERANCE = 5e-7  # the observed rounding error of float32 sums
LOAD_TIMEOUT_S = 600.0  # to load a collection into the memory of the server
INDEX_TIMEOUT_S = 3600.0  # an index build without progress; Milvus reports whole segments, of up to 512 MB each
PROVISIONAL_ROWS = 4096  # every row of smaller segments is compared; larger ones have a provisional index at first

_MADE_BY, _FORMAT, _MARK = "image-text-alignment", 1, "_is_"
_MIN_LIMIT = 256  # the graph search of Milvus is as wide as its limit: recall@10 .76 at 64, .98 at 256
_ID_CHUNK = 4096
_SESSION, _STRONG = "Session", "Strong"  # a read sees the writes of this connection | of all, which takes longer


class MilvusIndex(VectorIndex):
    """A collection on a Milvus server, with the texts `about` that were stored when it was created, until `close`."""

    def __init__(self, server: Server, name: str) -> None:
        """Open and load a collection; errors as of `Connection`, and ValueError if another program made it."""
        self.name, self._connection = name, Connection(server)
        self.close = self._connection.close
        try:
            described = self._connection.call("describe_collection", name)
            self.about, self.embed_dim = read_description(described, f"The collection {name} at {server.uri}")
            self._connection.call("load_collection", name, timeout=LOAD_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self._rows_per_request = max(1, min(_ID_CHUNK, REQUEST_BYTES // (4 * self.embed_dim)))

    @classmethod
    def create(cls, server: Server, name: str, embed_dim: int, about: Mapping[str, str]) -> Self:
        """Create an empty collection, with texts that cannot be changed later, and open it."""
        with closing(Connection(server)) as connection:
            from pymilvus import DataType, MilvusClient  # optional; the connection says what to install

            description = json.dumps({"made_by": _MADE_BY, "format": _FORMAT, **about})
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("embed", DataType.FLOAT_VECTOR, dim=embed_dim)
            tags = {"element_type": DataType.VARCHAR, "max_capacity": 4096, "max_length": 65_535}
            schema.add_field("tags", DataType.ARRAY, **tags)
            index = MilvusClient.prepare_index_params()
            index.add_index("embed", index_type="AUTOINDEX", metric_type="IP", params={})
            connection.call("create_collection", name, schema=schema, index_params=index, timeout=LOAD_TIMEOUT_S)
        return cls(server, name)

    def __len__(self) -> int:
        return self._count("", _STRONG)

    def ids(self, tag: str | None = None) -> Tensor:
        """List the ids of all rows, or of those with a tag: (n,) int64, ascending."""
        condition = after = tag_filter(tag)
        pages: list[NDArray[np.int64]] = []
        while not pages or len(pages[-1]) == MAX_LIMIT:
            rows = self._query(after, "id", limit=MAX_LIMIT)  # the lowest ids, in any order
            pages.append(np.sort(np.array([row["id"] for row in rows], np.int64)))
            after = " and ".join(filter(None, [condition, f"id > {pages[-1][-1] if rows else 0}"]))
        return torch.from_numpy(np.concatenate(pages))

    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch the embeddings of rows, as every index does; ValueError on an id that is not there."""
        wanted, places = np.unique(ids.numpy(), return_inverse=True)
        rows, found = np.empty((len(wanted), self.embed_dim), np.float32), np.zeros(len(wanted), bool)
        for level in (_SESSION, _STRONG):  # wait for the writes of others only where a row seems to be missing
            for chunk in filter(len, torch.from_numpy(wanted[~found]).split(self._rows_per_request)):
                for row in self._query(f"id in {chunk.tolist()}", "id", "embed", level=level):
                    place = np.searchsorted(wanted, row["id"])
                    rows[place], found[place] = row["embed"], True
        if not found.all():
            raise ValueError(f"The index has no row with the id {wanted[~found][0]}.")
        return torch.from_numpy(rows[places])

    def _rank(self, query: NDArray[np.float64], k: int, wanted: int, tag: str | None) -> Ranking:
        if 0 < wanted <= MAX_LIMIT:
            scores, ids = self._approximate(query, k, wanted, tag_filter(tag))
            if len(ids) >= k or len(ids) >= self._count(tag_filter(tag), _SESSION):
                return scores, ids
        every = self.ids(tag) if wanted else torch.empty(0, dtype=torch.int64)
        scores, best = rank(self.embeds(every).numpy(), query, wanted)
        return scores, every.numpy()[best]

    def _approximate(self, query: NDArray[np.float64], k: int, wanted: int, condition: str) -> Ranking:
        limit = min(max(wanted + wanted // 8, _MIN_LIMIT), MAX_LIMIT)
        options: dict[str, Any] = {"data": [query.astype(np.float32)], "anns_field": "embed", "filter": condition}
        options |= {"search_params": {"metric_type": "IP", "params": {}}, "consistency_level": _SESSION}
        while True:
            found = self._connection.call("search", self.name, limit=limit, timeout=SEARCH_TIMEOUT_S, **options)
            scores, ids = order_hits(found[0])
            if not k or limit == MAX_LIMIT or len(ids) < limit or scores[k - 1] > scores[-1]:
                return scores[:wanted], ids[:wanted]
            limit = min(limit * 4, MAX_LIMIT)  # rows beyond may equal the k-th best and have lower ids

    def upsert(self, ids: Tensor, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> None:
        """Add rows, or replace those of the same id; ValueError on embeddings not finite or of another width."""
        if embeds.shape[1] != self.embed_dim or not embeds.isfinite().all():
            raise ValueError(f"Embeddings must be finite and {self.embed_dim} wide, unlike {tuple(embeds.shape)}.")
        columns = zip(ids.tolist(), embeds.float().numpy(), tags or [()] * len(ids), strict=True)
        data = [{"id": id, "embed": row, "tags": sorted(map(encode_tag, carried))} for id, row, carried in columns]
        for start in range(0, len(data), self._rows_per_request):
            self._connection.call("upsert", self.name, data=data[start : start + self._rows_per_request])

    def delete(self, ids: Tensor) -> None:
        """Delete rows; ids that are not there are ignored."""
        for chunk in filter(len, ids.split(_ID_CHUNK)):
            self._connection.call("delete", self.name, filter=f"id in {chunk.tolist()}")

    def drop(self) -> None:
        """Delete the collection with all its rows."""
        self.mark("")
        self._connection.call("drop_collection", self.name)

    def wait_until_indexed(self, progress: Callable[[int], object] = lambda rows: None) -> None:
        """Wait until the server searches its own index; recall@10 among 20,000 rows was .51 before and .97 then.

        `progress` gets the number of rows not indexed yet. ConnectionError if none were within `INDEX_TIMEOUT_S`.
        """
        fewest, end = math.inf, 0.0
        while (left := self._unindexed()) > PROVISIONAL_ROWS:
            if fewest == math.inf:  # Milvus builds no index on segments that still grow
                self._connection.call("flush", self.name, timeout=LOAD_TIMEOUT_S)
            if left < fewest:
                fewest, end = left, time.monotonic() + INDEX_TIMEOUT_S
            elif time.monotonic() > end:
                raise ConnectionError(f"{self.name}: the server does not index {left} rows; run the command again.")
            progress(left)
            time.sleep(1.0)

    def _unindexed(self) -> int:
        """Count rows in large segments without an index: not built yet | built, not loaded yet | still growing."""
        pending = int(self._connection.call("describe_index", self.name, "embed")["pending_index_rows"])
        loaded = [(each.num_rows, each.index_id) for each in self._connection.call("list_loaded_segments", self.name)]
        unused = sum(rows for rows, index in loaded if not index and rows > PROVISIONAL_ROWS)
        return max(pending, unused, len(self) - sum(rows for rows, _ in loaded))

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that the collection is marked with: aliases, which every server supports."""
        aliases, start = self._connection.call("describe_collection", self.name).get("aliases", ()), self.name + _MARK
        return tuple(alias.removeprefix(start) for alias in aliases if alias.startswith(start))

    def mark(self, text: str) -> None:
        """Mark the collection with letters and digits, such as a digest of its rows, and remove other marks."""
        marks = self.marks
        if text and text not in marks:
            self._connection.call("create_alias", self.name, self.name + _MARK + text)
        for old in filter(lambda mark: mark != text, marks):
            self._connection.call("drop_alias", self.name + _MARK + old)

    def _query(self, condition: str, *fields: str, level: str = _STRONG, **options: Any) -> list[dict[str, Any]]:
        options |= {"filter": condition, "output_fields": list(fields), "consistency_level": level}
        return list(self._connection.call("query", self.name, **options))

    def _count(self, condition: str, level: str) -> int:
        return int(self._query(condition, "count(*)", level=level)[0]["count(*)"])


def read_description(described: Mapping[str, Any], collection: str) -> tuple[dict[str, str], int]:
    """Read the texts and the width that a collection was created with; ValueError if another program made it."""
    with suppress(ValueError, KeyError, AttributeError, TypeError, StopIteration):
        about = json.loads(described["description"])
        if (about.pop("made_by"), about.pop("format")) == (_MADE_BY, _FORMAT):
            return about, next(int(field["params"]["dim"]) for field in described["fields"] if field["name"] == "embed")
    raise ValueError(f"{collection} was made by another program, or another version of this; choose a name.")


def tag_filter(tag: str | None) -> str:
    """Return the filter expression for rows with a tag; "" for None."""
    if tag is None:
        return ""
    literal = encode_tag(tag).replace("\\", "\\\\").replace('"', '\\"')
    return f'array_contains(tags, "{literal}")'


def encode_tag(tag: str) -> str:
    """Escape control characters and lone surrogates, which names of files may contain, as JSON does."""
    return json.dumps(tag, ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace").decode()


def order_hits(hits: Sequence[Mapping[str, Any]]) -> Ranking:
    """Sort hits, best first; those within `SCORE_TOLERANCE` get the same score and are ordered by id."""
    scores, ids = np.array([hit["distance"] for hit in hits], np.float32), np.array([hit["id"] for hit in hits])
    best = np.argsort(-scores, kind="stable")
    scores, ids = scores[best], ids[best].astype(np.int64)
    groups = np.concatenate([[0], np.cumsum(scores[:-1] - scores[1:] > SCORE_TOLERANCE)])[: len(scores)]
    return scores[np.searchsorted(groups, groups)], ids[np.lexsort((ids, groups))]
