"""The index of one process: in memory and exact, or in a mapped file, see `quantized`.

Of a file, faiss names candidates by their codes; their rows are ranked as exact search ranks all rows.

Equal embeddings get equal scores, and equal scores are ordered by position. float32 sums differ in the last bit, by
where a row stands, so scores are summed in float64 and rounded to float32. As that takes many times as long, float32
goes first, and only rows that could reach the best k within its error are scored again.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.index import quantized
from alignment.index.vector_index import Floats, Ranking, VectorIndex

EXACT_ROWS = 4096
"""Rows up to which all are scored: of a gallery, which then needs no file, or of those that carry a tag.

Best 10 of 1024 dimensions, captions asked of mixtures of pictures, 2 busy cores: 1.2 ms for 4,096 rows in memory and
3.0 ms for 10,000; by a file 0.32 ms for 10,000 (recall .9997) and 0.63 ms for 100,000 (recall 1.0).
"""

_CACHED_TAGS = 32  # a bit for each row
_PER_RESULT = 8  # candidates for each of k, at least
_DEEPER = 8  # times as many, where equal rows may be missing or too few were found
_MIN_ROWS_PER_CANDIDATE = 4  # with more candidates than that, all rows are scored
_EQUAL = 1e-6  # quantised scores of equal rows differ by less
_BLOCK_ROWS = 2048  # scored at a time: 4 MB as float32 at 512 dimensions, which stays in the cache
_PARALLEL_FROM = 1 << 15  # numbers from which torch distributes work over threads
_ALL_IN_FLOAT64 = 4  # times k: so few rows are scored without a float32 pass


class LocalIndex(VectorIndex):
    """An index of this process, in memory or opened from a file; ids are the positions of the rows."""

    write = staticmethod(quantized.write)

    def __init__(
        self, embeds: Tensor, tagged: Callable[[str], Tensor] | None = None, file: quantized.QuantizedFile | None = None
    ) -> None:
        """Index unit-norm embeddings, (n, embed_dim), without a copy; `tagged` lists the positions that carry a tag."""
        self._rows, self.embed_dim, self._tagged, self._file = embeds.numpy(), embeds.shape[1], tagged, file
        self._carriers = lru_cache(_CACHED_TAGS)(self._find_carriers)

    @classmethod
    def open(cls, path: Path, stamp: str, tagged: Callable[[str], Tensor] | None = None) -> Self:
        """Map a file; FileNotFoundError if there is none, ValueError if it is damaged or has another stamp."""
        file = quantized.QuantizedFile(path, stamp)
        return cls(torch.from_numpy(file.rows), tagged, file)

    def __len__(self) -> int:
        return len(self._rows)

    def embeds(self, ids: Tensor) -> Tensor:
        """See `VectorIndex`."""
        return _widened(np.take(self._rows, ids.numpy(), axis=0), torch.float32)

    def _rank(self, query: NDArray[np.float64], k: int, wanted: int, tag: str | None) -> Ranking:
        count, bits = (len(self), None) if tag is None else self._carriers(tag)
        k, wanted = min(k, count), min(wanted, count)
        if self._file is not None and count > EXACT_ROWS:
            depth = max(self._file.depth, _PER_RESULT * k, wanted)
            while depth * _MIN_ROWS_PER_CANDIDATE <= count:
                looks, near = self._file.candidates(query, depth, count, bits)
                scores, found = rank(self._rows, query, wanted, near)
                # The last of the k must look better than the last candidate, whose equals may have lower positions.
                if len(found) == wanted and (
                    not k or len(near) < depth or looks[near == found[k - 1]] > looks[-1] + _EQUAL
                ):
                    return scores, found
                depth *= _DEEPER
        positions = None if bits is None else np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        return rank(self._rows, query, wanted, positions)

    def _find_carriers(self, tag: str) -> tuple[int, NDArray[np.uint8]]:  # how many, and a bit for each row
        mask = np.zeros(len(self), bool)
        mask[self._tagged(tag).numpy() if self._tagged else []] = True
        return int(mask.sum()), np.packbits(mask, bitorder="little")


def rank(rows: Floats, query: NDArray[np.float64], k: int, chosen: NDArray[np.int64] | None = None) -> Ranking:
    """Find the k best of unit-norm rows, (n, embed_dim), or of those at the chosen positions; ties by lower position.

    Source: the error of a float32 sum in any order, Higham, Accuracy and Stability of Numerical Algorithms, 3.1.
    """
    positions = np.arange(len(rows)) if chosen is None else chosen
    if len(positions) > _ALL_IN_FLOAT64 * k > 0:
        rough = _score(rows, query.astype(np.float32), chosen)
        error = (len(query) + 8) * 2.0**-24 * max(float(np.linalg.norm(query)), 1.0)
        chosen = positions = positions[rough >= np.partition(rough, -k)[-k] - 2 * error]
    scores = _score(rows, query, chosen).astype(np.float32)
    order = np.lexsort((positions, -scores))[:k]
    return scores[order], positions[order]


def _score(rows: Floats, query: Floats, chosen: NDArray[np.int64] | None) -> Floats:
    """Compute cosines, (count,), in the precision of the query; by torch, as numpy wakes threads for small products."""
    count = len(rows) if chosen is None else len(chosen)
    scores, factor = np.empty(count, query.dtype), torch.from_numpy(query)
    for start in range(0, count, _BLOCK_ROWS):
        here = slice(start, start + _BLOCK_ROWS)
        block = rows[here] if chosen is None else np.take(rows, chosen[here], axis=0)
        scores[here] = torch.mv(_widened(block, factor.dtype), factor).numpy()
    return scores


def _widened(rows: Floats, dtype: torch.dtype) -> torch.Tensor:
    """Convert rows to float32 or float64; torch converts half precision twenty times faster than numpy.

    A few rows are converted in pieces that torch does not distribute: on a busy machine threads wait to be scheduled.
    """
    narrow = torch.from_numpy(rows)
    if narrow.dtype != torch.float16 or len(rows) >= _BLOCK_ROWS:
        return narrow.to(dtype)
    wide, step = torch.empty(narrow.shape, dtype=dtype), max(1, (_PARALLEL_FROM - 1) // narrow.shape[1])
    for start in range(0, len(narrow), step):
        wide[start : start + step] = narrow[start : start + step]
    return wide
