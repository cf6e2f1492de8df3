"""What every index of embeddings can do, whatever its back end."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class VectorIndex(ABC):
    """Unit-norm embeddings under int64 ids, and the nearest of them to a query."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width of the embeddings."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the rows."""

    @abstractmethod
    def ids(self, tag: str | None = None) -> Tensor:
        """List the ids of all rows, or of those with a tag: (n,) int64, ascending."""

    @abstractmethod
    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids.

        Raises:
            ValueError: on an id that is not there.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int, *, tag: str | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id.

        Args:
            queries: (num_queries, embed_dim), unit-norm.
            k: how many; clipped to the number of rows that compete.
            tag: only rows that carry it compete.
            extra: how many more to return after these, though a better one may be missing.

        Returns:
            Cosines float32 and ids int64, both (num_queries, k + extra) or as many as compete.

        Raises:
            ValueError: on queries that do not fit, or a negative k or extra.
        """
