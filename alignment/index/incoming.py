"""What comes into an index is looked at once, the same way for every back end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.index.exact import Floats, Positions

RowTags = Sequence[Collection[str]]


def floats(embeds: Tensor) -> Floats:
    """Read embeddings, (n, embed_dim) of any floating type.

    Raises:
        ValueError: on anything else.
    """
    if embeds.dim() != 2 or not embeds.is_floating_point():
        raise ValueError(
            "An index needs floating point embeddings of shape (num_candidates, embed_dim), "
            f"not {embeds.dtype} of shape {tuple(embeds.shape)}."
        )
    embeds = embeds.detach().cpu()
    rows: NDArray[np.floating] = (embeds.float() if embeds.dtype == torch.bfloat16 else embeds).numpy()
    return rows


def integers(ids: Tensor) -> Positions:
    """Read ids, (n,) of any integer type.

    Raises:
        ValueError: on anything else.
    """
    if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"Ids are one-dimensional integers and a subset is ids or a bool mask, "
            f"not {ids.dtype} of shape {tuple(ids.shape)}."
        )
    numbers: Positions = ids.detach().cpu().long().numpy()
    return numbers


def by_id(ids: Positions, rows: Floats, tags: RowTags | None) -> tuple[Positions, Floats, RowTags | None]:
    """Order rows by their ids.

    Raises:
        ValueError: when there are not as many of each, or an id is there twice.
    """
    if len(ids) != len(rows) or (tags is not None and len(tags) != len(rows)):
        raise ValueError(f"{len(rows)} embeddings need as many ids and tags, not {len(ids)} and {len(tags or ids)}.")
    order = np.argsort(ids, kind="stable")
    if (order[1:] < order[:-1]).any():
        ids, rows, tags = ids[order], rows[order], None if tags is None else [tags[row] for row in order]
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"Every id may be there once, {int(ids[:-1][ids[1:] == ids[:-1]][0])} is there twice.")
    return ids, rows, tags


def new_rows(
    ids: Tensor, embeds: Tensor, tags: RowTags | None, embed_dim: int
) -> tuple[Positions, Floats, RowTags | None]:
    """Read what is to be added, in the order of the ids.

    Raises:
        ValueError: when it does not fit together or into the index.
    """
    rows = floats(embeds)
    if rows.shape[1] != embed_dim or not np.isfinite(rows).all():
        raise ValueError(f"Embeddings must be finite and {embed_dim} wide, unlike {tuple(embeds.shape)}.")
    return by_id(integers(ids), rows, tags)


def query_rows(queries: Tensor, embed_dim: int, k: int, extra: int) -> NDArray[np.float64]:
    """Read what is asked, (num_queries, embed_dim).

    Raises:
        ValueError: on queries of another shape, or a negative k or extra.
    """
    if queries.dim() != 2 or queries.shape[1] != embed_dim:
        wanted = f"(num_queries, {embed_dim})"
        raise ValueError(f"Queries must be {wanted} like the candidates, not {tuple(queries.shape)}.")
    if k < 0 or extra < 0:
        raise ValueError(f"k and extra must not be negative, they are {k} and {extra}.")
    rows: NDArray[np.float64] = queries.detach().cpu().double().numpy()
    return rows


def subset_ids(subset: Tensor, all_ids: Callable[[], Positions]) -> Positions:
    """Turn a subset, ids or a mask of all of them, into ascending ids without repetition."""
    if subset.dtype != torch.bool or subset.dim() != 1:
        return np.unique(integers(subset))
    ids = all_ids()
    if len(subset) != len(ids):
        raise ValueError(f"The mask is for {len(subset)} candidates, the index has {len(ids)}.")
    return ids[subset.detach().cpu().numpy()]


def refuse_unknown(ids: Positions) -> None:
    """Raise ValueError if there are any."""
    if len(ids):
        raise ValueError(f"The index has no row with the id {int(ids[0])}.")
