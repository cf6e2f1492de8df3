"""Vector index on a Milvus server: one collection, for galleries that outgrow one machine.

A row is an id, an embedding and its tags, an array of texts. Only requests that every Milvus from 2.3 on answers alike
are used: its own choice of an index, literal filters, no message above `REQUEST_BYTES`.

Searches are approximate. Their cosines are float32 sums, so those that differ by less than `SCORE_TOLERANCE` count as
equal and are ordered by id. Where Milvus returns too few results, the embeddings are fetched and ranked here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.index.server import SEARCH_TIMEOUT_S, Connection, Server
from alignment.index.vector_index import Floats, Positions, VectorIndex, validate_embeds, validate_ids, validate_queries

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

Scores = NDArray[np.float32]


class MilvusIndex(VectorIndex):
    """A collection on a Milvus server, with the texts `about` that were stored when it was created."""

    def __init__(self, server: Server, name: str) -> None:
        """Open a collection and have the server load it; errors as of `Connection.call`.

        Raises:
            ValueError: if another program made it, or pymilvus is not installed.
        """
        self.name, self._connection = name, Connection(server)
        try:
            described = self._connection.call("describe_collection", name)
            self.about, self._embed_dim = read_description(described, f"The collection {name} at {server.uri}")
            self._connection.call("load_collection", name, timeout=LOAD_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, server: Server, name: str, embed_dim: int, about: Mapping[str, str]) -> MilvusIndex:
        """Create an empty collection, with texts that cannot be changed later, and open it."""
        connection = Connection(server)
        from pymilvus import DataType, MilvusClient  # optional; the connection says what to install

        description = json.dumps({"made_by": _MADE_BY, "format": _FORMAT, **about})
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embed", DataType.FLOAT_VECTOR, dim=embed_dim)
        schema.add_field("tags", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=4096, max_length=65_535)
        index = MilvusClient.prepare_index_params()
        index.add_index("embed", index_type="AUTOINDEX", metric_type="IP", params={})
        try:
            connection.call("create_collection", name, schema=schema, index_params=index, timeout=LOAD_TIMEOUT_S)
        finally:
            connection.close()
        return cls(server, name)

    def close(self) -> None:
        """Close the connection; the index cannot be used afterwards."""
        self._connection.close()

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self._embed_dim

    def __len__(self) -> int:
        return self._count("", _STRONG)

    def ids(self, tag: str | None = None) -> Tensor:
        """List the ids of all rows, or of those with a tag: (n,) int64, ascending."""
        condition = after = tag_filter(tag)
        pages: list[Positions] = []
        while not pages or len(pages[-1]) == MAX_LIMIT:
            rows = self._query(after, "id", limit=MAX_LIMIT)  # the lowest ids, in any order
            pages.append(np.sort(np.array([row["id"] for row in rows], np.int64)))
            after = " and ".join(filter(None, [condition, f"id > {pages[-1][-1] if rows else 0}"]))
        return torch.from_numpy(np.concatenate(pages))

    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids; ValueError on an id that is not there."""
        wanted, places = np.unique(validate_ids(ids), return_inverse=True)
        rows, found = np.empty((len(wanted), self.embed_dim), np.float32), np.zeros(len(wanted), bool)
        for level in (_SESSION, _STRONG):  # wait for the writes of others only where a row seems to be missing
            for chunk in _chunks(wanted[~found], self._rows_per_request):
                for row in self._query(f"id in {chunk.tolist()}", "id", "embed", level=level):
                    place = np.searchsorted(wanted, row["id"])
                    rows[place], found[place] = row["embed"], True
        if not found.all():
            raise ValueError(f"The index has no row with the id {wanted[~found][0]}.")
        return torch.from_numpy(rows[places])

    def search(self, queries: Tensor, k: int, *, tag: str | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id; see `VectorIndex.search`."""
        rows, wanted, found = validate_queries(queries, self.embed_dim, k, extra), k + extra, None
        if not len(rows) or not wanted:
            return torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64)
        if wanted <= MAX_LIMIT:
            found = self._approximate(rows, k, wanted, tag_filter(tag))
        scores, ids = found or self._exact(rows, wanted, self.ids(tag).numpy())
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def _approximate(self, queries: Floats, k: int, wanted: int, condition: str) -> tuple[Scores, Positions] | None:
        """Let Milvus search; None if it returns fewer than k results though there are more."""
        limit = min(max(wanted + wanted // 8, _MIN_LIMIT), MAX_LIMIT)
        hits = self._hits(queries, limit, condition)
        while (
            k and limit < MAX_LIMIT and any(len(ids) == limit and scores[k - 1] == scores[-1] for scores, ids in hits)
        ):
            limit = min(limit * 4, MAX_LIMIT)  # rows beyond the limit may equal the k-th best and have lower ids
            hits = self._hits(queries, limit, condition)
        width = min(wanted, *(len(ids) for _, ids in hits))
        if width < k and width < self._count(condition, _SESSION):
            return None
        return np.stack([scores[:width] for scores, _ in hits]), np.stack([ids[:width] for _, ids in hits])

    def _hits(self, queries: Floats, limit: int, condition: str) -> list[tuple[Scores, Positions]]:
        options: dict[str, Any] = {"anns_field": "embed", "limit": limit, "filter": condition}
        options |= {"search_params": {"metric_type": "IP", "params": {}}, "consistency_level": _SESSION}
        found = []
        for chunk in _chunks(queries.astype(np.float32), max(1, REQUEST_BYTES // (16 * limit + 4 * self.embed_dim))):
            options |= {"data": list(chunk), "timeout": SEARCH_TIMEOUT_S}
            found += [order_hits(hits) for hits in self._connection.call("search", self.name, **options)]
        return found

    def _exact(self, queries: Floats, wanted: int, ids: Positions) -> tuple[Scores, Positions]:
        """Fetch rows, by ascending ids, and rank them in float64."""
        rows = self.embeds(torch.from_numpy(ids)).double().numpy()
        scores = (queries @ rows.T).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(scores, order, 1), ids[order]

    def upsert(self, ids: Tensor, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> None:
        """Add rows, or replace those of the same id; ValueError on embeddings not finite or of another width."""
        rows, texts = validate_embeds(embeds.float()), [sorted(map(encode_tag, row)) for row in tags or [()] * len(ids)]
        if rows.shape[1] != self.embed_dim or not np.isfinite(rows).all():
            raise ValueError(f"Embeddings must be finite and {self.embed_dim} wide, unlike {tuple(rows.shape)}.")
        columns = zip(ids.tolist(), rows, texts, strict=True)
        data = [{"id": number, "embed": row, "tags": tags} for number, row, tags in columns]
        for start in range(0, len(data), self._rows_per_request):
            self._connection.call("upsert", self.name, data=data[start : start + self._rows_per_request])

    def delete(self, ids: Tensor) -> None:
        """Delete rows; ids that are not there are ignored."""
        for chunk in _chunks(ids.numpy(), _ID_CHUNK):
            self._connection.call("delete", self.name, filter=f"id in {chunk.tolist()}")

    def drop(self) -> None:
        """Delete the collection with all its rows."""
        self.unmark()
        self._connection.call("drop_collection", self.name)

    def wait_until_indexed(self, progress: Callable[[int], object] = lambda rows: None) -> None:
        """Wait until the server searches its own index; recall@10 among 20,000 rows was .51 before and .97 then.

        `progress` is called every second with the number of rows that are not indexed yet. ConnectionError if nothing
        was indexed for `INDEX_TIMEOUT_S`.
        """
        fewest, end = 0, 0.0
        while (left := self._unindexed()) > PROVISIONAL_ROWS:
            if not end:  # Milvus builds no index on segments that still grow
                self._connection.call("flush", self.name, timeout=LOAD_TIMEOUT_S)
            if not end or left < fewest:
                fewest, end = left, time.monotonic() + INDEX_TIMEOUT_S
            if time.monotonic() > end:
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
        aliases = self._connection.call("describe_collection", self.name).get("aliases", ())
        start = self.name + _MARK
        return tuple(alias.removeprefix(start) for alias in aliases if alias.startswith(start))

    def mark(self, text: str) -> None:
        """Add a mark, letters and digits, such as a digest of the rows once all of them are there."""
        if text not in self.marks:
            self._connection.call("create_alias", self.name, self.name + _MARK + text)

    def unmark(self, keep: str = "") -> None:
        """Remove all marks, or all but one."""
        for mark in self.marks:
            if mark != keep:
                self._connection.call("drop_alias", self.name + _MARK + mark)

    @property
    def _rows_per_request(self) -> int:
        return max(1, min(_ID_CHUNK, REQUEST_BYTES // (4 * self.embed_dim)))

    def _query(self, condition: str, *fields: str, level: str = _STRONG, **options: Any) -> list[dict[str, Any]]:
        options |= {"filter": condition, "output_fields": list(fields), "consistency_level": level}
        return list(self._connection.call("query", self.name, **options))

    def _count(self, condition: str, level: str) -> int:
        return int(self._query(condition, "count(*)", level=level)[0]["count(*)"])


def read_description(described: Mapping[str, Any], collection: str) -> tuple[dict[str, str], int]:
    """Read the texts and the width that a collection was created with; ValueError if another program made it."""
    try:
        about = json.loads(described["description"])
        if (about.pop("made_by"), about.pop("format")) == (_MADE_BY, _FORMAT):
            return about, next(int(field["params"]["dim"]) for field in described["fields"] if field["name"] == "embed")
    except (ValueError, KeyError, AttributeError, TypeError, StopIteration):
        pass
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


def order_hits(hits: Sequence[Mapping[str, Any]]) -> tuple[Scores, Positions]:
    """Sort hits, best first; those within `SCORE_TOLERANCE` get the same score and are ordered by id."""
    scores, ids = np.array([hit["distance"] for hit in hits], np.float32), np.array([hit["id"] for hit in hits])
    best = np.argsort(-scores, kind="stable")
    scores, ids = scores[best], ids[best].astype(np.int64)
    groups = np.concatenate([[0], np.cumsum(scores[:-1] - scores[1:] > SCORE_TOLERANCE)])[: len(scores)]
    return scores[np.searchsorted(groups, groups)], ids[np.lexsort((ids, groups))]


def _chunks(array: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
