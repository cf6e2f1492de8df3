"""Exact ranking of rows: float32 selects the rows that may be among the best, float64 ranks them.

Equal embeddings get equal scores wherever they stand, and equal scores are ordered by id. float32 cannot guarantee
that: matrix kernels add up in another order at the edge of a tile, and the scores of duplicates differ in the last bit.
Hence a score is summed in float64 and rounded to float32 once. float64 for every row would cost many times the reading
of it, so float32 goes first, and only rows that could reach the best k within its error are scored again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from alignment.index.vector_index import Floats, Positions

BLOCK_ROWS = 2048  # scored at a time: 4 MB as float32 at 512 dimensions, which stays in the cache

_PARALLEL_FROM = 1 << 15  # numbers from which torch distributes work over threads
_ALL_IN_FLOAT64 = 4  # times k: so few rows are scored without a float32 pass


def rank(
    rows: Floats, ids: Positions, query: NDArray[np.float64], k: int, chosen: Positions | None = None
) -> tuple[NDArray[np.float32], Positions]:
    """Rank rows for a query, best first, ties by lower id.

    Args:
        rows: (n, embed_dim), float16, float32 or float64.
        ids: (n,) of the rows, in any order.
        query: (embed_dim,).
        k: how many; clipped to the number of rows that compete.
        chosen: positions of the rows that compete; all of them if left out.

    Returns:
        Cosines and positions, both (k,).
    """
    positions = np.arange(len(rows)) if chosen is None else chosen
    if len(positions) > _ALL_IN_FLOAT64 * k > 0:
        rough = _score(rows, query.astype(np.float32), chosen)
        chosen = positions = positions[rough >= np.partition(rough, -k)[-k] - 2 * error_bound(query)]
    scores = _score(rows, query, chosen).astype(np.float32)
    order = np.lexsort((ids[positions], -scores))[:k]
    return scores[order], positions[order]


def _score(rows: Floats, query: Floats, chosen: Positions | None) -> Floats:
    """Compute cosines, (count,), in the precision of the query.

    torch multiplies: numpy's BLAS wakes its threads even for small products, and on a busy machine they wait to be
    scheduled.
    """
    count = len(rows) if chosen is None else len(chosen)
    scores, factor = np.empty(count, query.dtype), torch.from_numpy(query)
    for start in range(0, count, BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        block = rows[here] if chosen is None else np.take(rows, chosen[here], axis=0)
        scores[here] = torch.mv(widened(block, factor.dtype), factor).numpy()
    return scores


def widened(rows: Floats, dtype: torch.dtype) -> torch.Tensor:
    """Convert rows to float32 or float64.

    torch converts half precision twenty times faster than numpy; a few rows in pieces so small that it does not
    distribute them over threads.
    """
    narrow = torch.from_numpy(rows)
    if narrow.dtype != torch.float16 or len(rows) >= BLOCK_ROWS:
        return narrow.to(dtype)
    wide = torch.empty(narrow.shape, dtype=dtype)
    step = max(1, (_PARALLEL_FROM - 1) // max(narrow.shape[1], 1))
    for start in range(0, len(narrow), step):
        wide[start : start + step] = narrow[start : start + step]
    return wide


def error_bound(query: NDArray[np.float64]) -> float:
    """Bound the error of a float32 cosine, whatever the order of the sum.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the rows are of unit norm.
    """
    return (len(query) + 8) * 2.0**-24 * max(float(np.linalg.norm(query)), 1.0)
