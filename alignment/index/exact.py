"""Exact ranking of rows: float32 selects the rows that may be among the best, float64 ranks them.

Equal embeddings get equal scores wherever they stand, and equal scores are ordered by position. float32 cannot
guarantee that: matrix kernels add up in another order at the edge of a tile, and the scores of duplicates differ in the
last bit. So a score is summed in float64 and rounded to float32 once. float64 for every row would cost many times the
reading of it, so float32 goes first, and only rows that could reach the best k within its error are scored again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from alignment.index.vector_index import Floats, Ranking

BLOCK_ROWS = 2048  # scored at a time: 4 MB as float32 at 512 dimensions, which stays in the cache

_PARALLEL_FROM = 1 << 15  # numbers from which torch distributes work over threads
_ALL_IN_FLOAT64 = 4  # times k: so few rows are scored without a float32 pass


def rank(rows: Floats, query: NDArray[np.float64], k: int, chosen: NDArray[np.int64] | None = None) -> Ranking:
    """Find the k best of unit-norm rows, (n, embed_dim) of any floating type, or of those at the chosen positions.

    Best first, ties by lower position. Source of the error of a float32 sum in whatever order: Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1.
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
    for start in range(0, count, BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        block = rows[here] if chosen is None else np.take(rows, chosen[here], axis=0)
        scores[here] = torch.mv(widened(block, factor.dtype), factor).numpy()
    return scores


def widened(rows: Floats, dtype: torch.dtype) -> torch.Tensor:
    """Convert rows to float32 or float64; torch converts half precision twenty times faster than numpy.

    A few rows are converted in pieces that torch does not distribute: on a busy machine threads wait to be scheduled.
    """
    narrow = torch.from_numpy(rows)
    if narrow.dtype != torch.float16 or len(rows) >= BLOCK_ROWS:
        return narrow.to(dtype)
    wide, step = torch.empty(narrow.shape, dtype=dtype), max(1, (_PARALLEL_FROM - 1) // narrow.shape[1])
    for start in range(0, len(narrow), step):
        wide[start : start + step] = narrow[start : start + step]
    return wide
