"""The interface of every index."""

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.floating]
Ranking: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]  # cosines and ids, best first


class VectorIndex(ABC):
    """Unit-norm embeddings, `embed_dim` wide, under int64 ids, and the search for the nearest of them.

    Tags are texts such as "en" or "holiday/2024"; a row may carry several. Methods may be called from several threads.
    """

    embed_dim: int

    @abstractmethod
    def __len__(self) -> int:
        """Count the rows."""

    @abstractmethod
    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch the embeddings of rows, (n, embed_dim) float32 in the order of the ids."""

    def search(self, query: Tensor, k: int, *, tag: str | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to a query, or of those that carry a tag: best first, ties by lower id.

        The query is (embed_dim,), unit-norm; ValueError on another shape, or a negative k or extra. Returns cosines
        float32 and ids int64, both (k + extra,) or as many as compete; after the first k, a better one may be missing.
        """
        if query.shape != (self.embed_dim,) or min(k, extra) < 0:
            takes = f"A search takes one embedding ({self.embed_dim},) and a k and extra of at least 0"
            raise ValueError(f"{takes}, not {tuple(query.shape)}, {k} and {extra}.")
        scores, ids = self._rank(query.numpy(force=True).astype(np.float64), k, k + extra, tag)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    @abstractmethod
    def _rank(self, query: NDArray[np.float64], k: int, wanted: int, tag: str | None) -> Ranking:
        """Find `wanted` rows, of which the first k are the closest."""
