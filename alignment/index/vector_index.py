"""The interface of every index, and the validation of what is passed to one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating]
Positions = NDArray[np.int64]


class VectorIndex(ABC):
    """Unit-norm embeddings under int64 ids, and the search for the nearest of them.

    The dot product of two embeddings is their cosine. Tags are texts such as "en" or "holiday/2024"; a row may carry
    several. Every method may be called from several threads.
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
    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids.

        Raises:
            ValueError: on an id that has no row.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int, *, tag: str | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id.

        Args:
            queries: (num_queries, embed_dim), unit-norm.
            k: how many; clipped to the number of rows that compete.
            tag: only rows that carry it compete; none do if no row carries it.
            extra: how many more to return after these; a better one than these may be missing. They cost next to
                nothing.

        Returns:
            Cosines float32 and ids int64, both (num_queries, k + extra) or as many as compete.

        Raises:
            ValueError: on queries that do not fit, or a negative k or extra.
        """


def validate_embeds(embeds: Tensor) -> Floats:
    """Convert embeddings, (n, embed_dim) of any floating type, without a copy where numpy knows the type.

    Raises:
        ValueError: on another shape or type.
    """
    if embeds.dim() != 2 or not embeds.is_floating_point():
        raise ValueError(
            "An index needs floating point embeddings of shape (num_candidates, embed_dim), "
            f"not {embeds.dtype} of shape {tuple(embeds.shape)}."
        )
    embeds = embeds.detach().cpu()
    return np.asarray((embeds.float() if embeds.dtype == torch.bfloat16 else embeds).numpy())


def validate_ids(ids: Tensor) -> Positions:
    """Convert ids, (n,) of any integer type.

    Raises:
        ValueError: on another shape or type.
    """
    if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"Ids are one-dimensional integers, not {ids.dtype} of shape {tuple(ids.shape)}.")
    return np.ascontiguousarray(ids.detach().cpu().long().numpy())


def validate_queries(queries: Tensor, embed_dim: int, k: int, extra: int) -> NDArray[np.float64]:
    """Convert queries, (num_queries, embed_dim).

    Raises:
        ValueError: on queries of another shape, or a negative k or extra.
    """
    if queries.dim() != 2 or queries.shape[1] != embed_dim:
        wanted = f"(num_queries, {embed_dim})"
        raise ValueError(f"Queries must be {wanted} like the candidates, not {tuple(queries.shape)}.")
    if k < 0 or extra < 0:
        raise ValueError(f"k and extra must not be negative, they are {k} and {extra}.")
    return np.asarray(queries.detach().cpu().double().numpy())
