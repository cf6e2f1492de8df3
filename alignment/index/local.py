"""The index of one process: in memory and exact, or in a mapped file, see `quantized`.

Of the file, faiss names candidates by their codes; their rows are ranked as exact search ranks all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.index import quantized
from alignment.index.exact import rank, widened
from alignment.index.vector_index import Positions, VectorIndex, validate_embeds, validate_ids, validate_queries

EXACT_ROWS = 4096
"""Rows up to which all are scored: of a gallery, which then needs no file, or of those that carry a tag.

Best 10 by a file, 1024 dimensions, captions asked of mixtures of pictures, 2 cores: 0.38 ms at 10,000 rows (recall
.9997), 0.74 ms at 100,000 (.999), 2.0 ms at 1,000,000 (.9995).
"""

_CACHED_TAGS = 32
_PER_RESULT = 8  # candidates for each of k, at least
_DEEPER = 8  # times as many, where equal rows may be missing or too few were found
_MIN_ROWS_PER_CANDIDATE = 4  # with more candidates than that, all rows are scored
_EQUAL = 1e-6  # quantised scores of equal rows differ by less

Tagged = Callable[[str], Tensor]


class _Filter(NamedTuple):
    """Rows that compete: how many, and their positions or, of many, a bit per row of the index; neither for all."""

    size: int
    positions: Positions | None = None
    bits: NDArray[np.uint8] | None = None


class LocalIndex(VectorIndex):
    """An index of this process: in memory, or opened from a file."""

    write = staticmethod(quantized.write)
    check = staticmethod(quantized.check)

    def __init__(self, ids: Tensor, embeds: Tensor, *, tagged: Tagged | None = None) -> None:
        """Index embeddings in memory, without a copy.

        Args:
            ids: (n,) integers, each once.
            embeds: (n, embed_dim), unit-norm, any floating type; n may be 0.
            tagged: returns the ids of the rows that carry a tag; if left out, no row carries any.

        Raises:
            ValueError: on another shape or type, or ids that do not fit.
        """
        self._ids, self._rows = validate_ids(ids), validate_embeds(embeds)
        self._order = np.argsort(self._ids, kind="stable")  # quick where they are sorted
        if len(self._ids) != len(self._rows) or not np.diff(self._ids[self._order]).all():
            raise ValueError(f"{len(self._rows)} embeddings need as many distinct ids.")
        self._tagged = tagged or (lambda tag: torch.empty(0, dtype=torch.int64))
        self._filter = lru_cache(_CACHED_TAGS)(self._make_filter)
        self._file: quantized.QuantizedFile | None = None

    @classmethod
    def open(cls, path: Path, ids: Tensor, stamp: str, *, tagged: Tagged | None = None) -> LocalIndex:
        """Map a file; takes some milliseconds at 1,000,000 rows.

        Args:
            path: what `write` wrote.
            ids: of the rows, in the order in which they were written.
            stamp: with which they were.
            tagged: as for an index in memory.

        Raises:
            FileNotFoundError: when there is no file.
            ValueError: when it is damaged, or was written with other ids or another stamp.
        """
        file = quantized.QuantizedFile(path, validate_ids(ids), stamp)
        index = cls(ids, torch.from_numpy(file.rows), tagged=tagged)
        index._file = file
        return index

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return int(self._rows.shape[1])

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, tag: str | None = None) -> Tensor:
        """List the ids of all rows, or of those with a tag: (n,) int64, ascending."""
        return torch.from_numpy(self._ids[self._order]) if tag is None else self._tagged(tag).sort().values

    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids; ValueError on an id that has no row."""
        return widened(np.take(self._rows, self._positions(validate_ids(ids)), axis=0), torch.float32)

    def search(self, queries: Tensor, k: int, *, tag: str | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id; see `VectorIndex.search`."""
        exact = validate_queries(queries, self.embed_dim, k, extra)
        among = _Filter(len(self)) if tag is None else self._filter(tag)
        width = min(k + extra, among.size)
        scores, positions = np.empty((len(exact), width), np.float32), np.empty((len(exact), width), np.int64)
        for number, query in enumerate(exact):
            scores[number], positions[number] = self._search(query, min(k, width), width, among)
        return torch.from_numpy(scores), torch.from_numpy(self._ids[positions])

    def _search(
        self, query: NDArray[np.float64], k: int, width: int, among: _Filter
    ) -> tuple[NDArray[np.float32], Positions]:
        if self._file is not None and among.size > EXACT_ROWS:
            depth = max(self._file.depth, _PER_RESULT * k, width)
            while depth * _MIN_ROWS_PER_CANDIDATE <= among.size:
                looks, near = self._file.candidates(query, depth, among.size, among.bits)
                scores, found = rank(self._rows, self._ids, query, width, near)
                last = looks[near == found[k - 1]] if k and len(found) == width else looks[:1]
                if len(found) == width and (len(near) < depth or last > looks[-1] + _EQUAL):
                    return scores, found
                depth *= _DEEPER
        positions = among.positions
        if among.bits is not None:
            positions = np.flatnonzero(np.unpackbits(among.bits, bitorder="little"))
        return rank(self._rows, self._ids, query, width, positions)

    def _make_filter(self, tag: str) -> _Filter:
        positions = self._positions(validate_ids(self._tagged(tag)))
        if len(positions) <= EXACT_ROWS or self._file is None:
            return _Filter(len(positions), positions)
        mask = np.zeros(len(self), bool)
        mask[positions] = True
        return _Filter(len(positions), bits=np.packbits(mask, bitorder="little"))

    def _positions(self, ids: Positions) -> Positions:
        places = np.searchsorted(self._ids, ids, sorter=self._order)
        positions = np.take(self._order, places, mode="clip") if len(self) else places
        unknown = ids[self._ids[positions] != ids] if len(self) else ids
        if len(unknown):
            raise ValueError(f"The index has no row with the id {int(unknown[0])}.")
        return positions
