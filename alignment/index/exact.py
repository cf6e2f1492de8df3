"""Exact ranking of rows: float32 finds who may be among the best, float64 decides.

Equal embeddings get equal scores wherever they stand, and equal scores are ordered by position. float32 cannot promise
that: its matrix kernels add up in another order at the edge of a tile, and duplicates drift apart in the last bit.
Hence a score is summed in float64 and rounded to float32 once. Doing so for every row would cost many times the
reading of it, so float32 goes first: it errs by less than `error_bound`, and only rows that could reach the best k with
that error are scored again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_ROWS = 2048  # scored at a time: as float32 4 MB at 512 dimensions, which stays in the cache
BLOCK_SCORES = 1 << 24  # held at a time, one for each query of a block and row

_ALONE = 1 << 15  # numbers from which torch shares work among threads
_FEW = 4  # times k: where no more rows compete, float64 scores them all

Floats = NDArray[np.floating]
Positions = NDArray[np.int64]


def rank(
    rows: Floats, queries: NDArray[np.float64], k: int, chosen: Positions | None = None
) -> tuple[NDArray[np.float32], Positions]:
    """Rank rows for each query, best first, ties by lower position.

    Args:
        rows: (n, embed_dim), float16, float32 or float64.
        queries: (num_queries, embed_dim).
        k: how many; clipped to the number of rows that compete.
        chosen: ascending positions of those that do; all of them if left out.

    Returns:
        Cosines and positions, both (num_queries, k).
    """
    count = len(rows) if chosen is None else len(chosen)
    k = min(k, count)
    scores, places = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    if k:
        step = max(1, BLOCK_SCORES // count)
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            scores[block], places[block] = _rank_block(rows, queries[block], k, chosen)
    return scores, places


def _rank_block(
    rows: Floats, queries: NDArray[np.float64], k: int, chosen: Positions | None
) -> tuple[NDArray[np.float32], Positions]:
    count = len(rows) if chosen is None else len(chosen)
    if count <= _FEW * k:
        scores = _scores(rows, queries, chosen).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), order if chosen is None else chosen[order]
    rough = _scores(rows, queries.astype(np.float32), chosen)
    bars = np.partition(rough, count - k, axis=1)[:, count - k] - 2 * error_bound(queries)
    found = [np.flatnonzero(line >= bar) for line, bar in zip(rough, bars, strict=True)]
    found = found if chosen is None else [chosen[near] for near in found]
    scores, places = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for number, (query, near) in enumerate(zip(queries, found, strict=True)):
        scores[number], order = first(_scores(rows, query[None], near)[0], k, near)
        places[number] = near[order]
    return scores, places


def first(scores: NDArray[np.float64], k: int, places: Positions) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Pick the k best of a few.

    Args:
        scores: (n,) of one query.
        k: how many.
        places: (n,) where each stands, in any order.

    Returns:
        Scores, best first, ties by lower place, and which these are, both (k,).
    """
    rounded = scores.astype(np.float32)
    order = np.lexsort((places, -rounded))[:k]
    return rounded[order], order


def cosines(rows: Floats, queries: Floats) -> Floats:
    """Multiply rows and queries of one precision; (num_queries, n).

    By torch: numpy's BLAS wakes its threads for a product as small as this, and on a busy machine they wait for their
    turn.
    """
    if len(queries) == 1:
        return np.asarray(torch.mv(torch.from_numpy(rows), torch.from_numpy(queries[0])).numpy())[None]
    return np.asarray((torch.from_numpy(queries) @ torch.from_numpy(rows).T).numpy())


def lifted(rows: Floats, kind: torch.dtype = torch.float32) -> Floats:
    """Widen rows; torch widens half precision twenty times faster than numpy.

    A few at a time if they are few: then torch does it in this thread, and waits for no other.
    """
    if rows.dtype != np.float16:
        return rows.astype(np.float64 if kind == torch.float64 else np.float32, copy=False)
    half = torch.from_numpy(rows if rows.flags.writeable else rows.copy())
    if len(rows) >= BLOCK_ROWS:
        return np.asarray(half.to(kind).numpy())
    wide = torch.empty(half.shape, dtype=kind)
    step = max(1, (_ALONE - 1) // max(half.shape[1], 1))
    for start in range(0, len(half), step):
        wide[start : start + step] = half[start : start + step]
    return np.asarray(wide.numpy())


def gather(rows: Floats, positions: Positions, kind: torch.dtype = torch.float32) -> Floats:
    """Copy some rows out, widened."""
    return lifted(np.take(rows, positions, axis=0), kind)


def error_bound(queries: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bound how far a float32 cosine may be off, for each query, whatever the order of the sum.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the rows are of unit norm.
    """
    lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries))
    return (queries.shape[1] + 8) * 2.0**-24 * np.maximum(lengths, 1.0)


def _scores(rows: Floats, queries: Floats, chosen: Positions | None) -> Floats:
    """Score in the precision of the queries; (num_queries, count)."""
    count = len(rows) if chosen is None else len(chosen)
    scores = np.empty((len(queries), count), queries.dtype)
    kind = torch.float64 if queries.dtype == np.float64 else torch.float32
    for start in range(0, count, BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        block = lifted(rows[here], kind) if chosen is None else gather(rows, chosen[here], kind)
        scores[:, here] = cosines(block, queries)
    return scores
