"""Rank the positives of every query.

Place in the flow: `embeddings -> ranks (here) -> retrieval, zero_shot, error_analysis`. The convention is
CLIP_benchmark's, the hit rate over unit-norm embeddings compared in float32, but ties count against the query.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from alignment.similarity import cosine_similarity

KS = (1, 5, 10)
ROUNDING = 1e-6  # closer cosines are ties: in float32, equal embeddings get scores that differ in the last bits
DIRECTIONS = ("image_to_text", "text_to_image")  # the query is named first
_QUERIES_AT_ONCE = 1024  # rows of the similarity matrix in memory at a time


def retrieval_ranks(similarity: Tensor, positives: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Rank each query's best positive among the negatives, from 1; recall@k is the share of ranks up to k.

    Every negative that scores no less counts as ranked before it, so a collapsed encoder that scores every pair equally
    earns a recall of 0; other positives of the query do not count. Two queries over four candidates:

        scores      .9  .8  .1  .0       positives   0 1 0 0       rank 2
                    .7  .6  .5  .5                   0 0 0 1       rank 4

    Args:
        similarity: (num_queries, num_candidates), any monotone score, higher is closer.
        positives: same shape, bool; several positives per query are allowed.
        tolerance: scores that differ by no more than this are ties.

    Raises ValueError on shapes that differ, non-finite scores, or a query without a positive.
    """
    if similarity.dim() != 2 or similarity.shape != positives.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"Scores and positives must be one (num_queries, num_candidates) matrix each, the second bool, not "
            f"{tuple(similarity.shape)} and {positives.dtype} {tuple(positives.shape)}."
        )
    if not similarity.isfinite().all():
        raise ValueError("The scores hold NaN or infinity; the model or its precision is broken.")
    if not positives.any(dim=1).all():
        raise ValueError("A query has no positive among the candidates; leave it out, it can never be found.")
    best_positive = similarity.where(positives, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best_positive - tolerance) & ~positives).sum(dim=1) + 1


def scored_blocks(
    queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Score the queries block by block: indices of the queries, their similarity to all candidates, and positives.

    Both sides are embeddings (n, embed_dim) and the index of each one's image (n,); the same image is a positive.
    """
    for rows in torch.arange(len(queries[0])).split(_QUERIES_AT_ONCE):
        embeds, images = queries[0][rows], queries[1][rows]
        yield rows, cosine_similarity(embeds, candidates[0]), images[:, None] == candidates[1]
