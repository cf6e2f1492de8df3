"""Floor 2, nearest neighbours of an embedding, behind one face.

Place in the flow: `encode (model) -> nearest candidates (here) -> matches (gallery)`. This is the embedded back end:
the embeddings stay in memory in the precision they came in and every search is exact. Embeddings are unit-norm, so
their dot product is the cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignment.similarity import top_k

BLOCK_ROWS = 4096  # lifted to float64 at a time: 16 MB at 512 dimensions, and it stays in the cache
BLOCK_QUERIES = 64  # scored at a time: what is held is one score per query of the block and candidate


class Index:
    """Exact nearest neighbours over a matrix of embeddings.

    Equal embeddings get equal scores wherever they stand, and equal scores are ordered by id. float32 cannot promise
    that: its matrix kernels add up in another order at the edge of a tile, and duplicates drift apart in the last bit.
    Hence the arithmetic is float64, rounded once at the end.
    """

    def __init__(self, embeds: Tensor) -> None:
        """Keep the embeddings; nothing is copied.

        Args:
            embeds: (num_candidates, embed_dim), unit-norm, any floating type; there may be no candidates at all.

        Raises:
            ValueError: on another shape or type.
        """
        if embeds.dim() != 2 or not embeds.is_floating_point():
            raise ValueError(
                "An index needs floating point embeddings of shape (num_candidates, embed_dim), "
                f"not {embeds.dtype} of shape {tuple(embeds.shape)}."
            )
        self._embeds = embeds.detach().cpu()

    def __len__(self) -> int:
        return self._embeds.shape[0]

    def search(self, queries: Tensor, k: int, *, subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k candidates closest to each query, best first, ties by lower id.

        Args:
            queries: (num_queries, embed_dim), unit-norm.
            k: how many; clipped to the number of candidates.
            subset: the candidates to look at, as a bool mask (num_candidates,) or as ids; all of them if left out.

        Returns:
            Cosines (num_queries, k) float32 and ids (num_queries, k) int64; ids count over all candidates.

        Raises:
            ValueError: on queries or a subset that do not fit, or a negative k.
        """
        if queries.dim() != 2 or queries.shape[1] != self._embeds.shape[1]:
            wanted = f"(num_queries, {self._embeds.shape[1]})"
            raise ValueError(f"Queries must be {wanted} like the candidates, not {tuple(queries.shape)}.")
        ids = self._candidate_ids(subset)
        blocks = [self._search_block(block, k, ids) for block in queries.detach().cpu().double().split(BLOCK_QUERIES)]
        scores, positions = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return scores, positions if ids is None else ids[positions]

    def _search_block(self, queries: Tensor, k: int, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rank for a few queries; the positions count within `ids`."""
        scores = torch.empty(len(queries), len(self) if ids is None else len(ids))
        for start in range(0, scores.shape[1], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            embeds = self._embeds[rows] if ids is None else self._embeds[ids[rows]]
            scores[:, rows] = (queries @ embeds.double().T).float()
        return top_k(scores, k)

    def _candidate_ids(self, subset: Tensor | None) -> Tensor | None:
        """Turn a subset into ascending ids without repetition; None stands for all of them."""
        if subset is None:
            return None
        subset = subset.detach().cpu()
        if subset.dim() != 1 or subset.is_floating_point() or subset.is_complex():
            raise ValueError(
                f"A subset is one-dimensional, a bool mask or ids, not {subset.dtype} of shape {tuple(subset.shape)}."
            )
        if subset.dtype == torch.bool:
            if len(subset) != len(self):
                raise ValueError(f"The mask is for {len(subset)} candidates, the index has {len(self)}.")
            return subset.nonzero().squeeze(1)
        if len(subset) and (subset.min() < 0 or subset.max() >= len(self)):
            raise ValueError(f"A subset's ids must lie in 0 to {len(self) - 1}.")
        return subset.long().unique(sorted=True)
