"""What every index can do, wherever its rows lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from torch import Tensor


class Index(ABC):
    """Embeddings under ids of the caller's choice, with tags, and the nearest of them to a query.

    Embeddings are unit-norm, so their dot product is the cosine. Ids are int64 and mean the same for as long as the
    caller wants. Tags are any texts, such as "en" or "holiday/2024"; a row may carry several. Every method may be
    called from several threads; a search sees the index as it was when it began.
    """

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
    def tags(self) -> dict[str, int]:
        """Count the rows of each tag, in order of the tags."""

    @abstractmethod
    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids.

        Raises:
            ValueError: on an id that is not there.
        """

    @abstractmethod
    def upsert(self, ids: Tensor, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> None:
        """Add rows; one whose id is there already takes the place of the old one, tags and all.

        Args:
            ids: (n,) integers, each once.
            embeds: (n, embed_dim), unit-norm, any floating type.
            tags: of each row; none if left out.

        Raises:
            ValueError: when these do not fit together, or an embedding is not finite.
        """

    @abstractmethod
    def delete(self, ids: Tensor) -> int:
        """Take rows out; ids that are not there do no harm. Returns how many went."""

    @abstractmethod
    def search(
        self, queries: Tensor, k: int, *, tag: str | None = None, subset: Tensor | None = None, extra: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id.

        Args:
            queries: (num_queries, embed_dim), unit-norm.
            k: how many; clipped to the number of rows that compete.
            tag: only rows that carry it compete; none do if nobody carries it.
            subset: only these compete: ids, or a bool mask (len(self),) in the order of `ids()`.
            extra: how many more to return after these, good ones, though a better one may be missing; they cost next
                to nothing.

        Returns:
            Cosines float32 and ids int64, both (num_queries, k + extra) or as many as compete.

        Raises:
            ValueError: on queries or a subset that do not fit, or a negative k or extra.
        """
