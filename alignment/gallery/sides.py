"""One side of a gallery, its pictures or its captions: their embeddings by position, and the search among them.

Place in the flow: `index -> positions and shares (here) -> matches (search)`. The embeddings of few items are in
memory, those of many in an index folder that is mapped into it; no search here looks at all of many.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from alignment.index import EXACT_ROWS, EmbeddedIndex, Index
from alignment.similarity import logits_per_image, match_probabilities

logger = logging.getLogger(__name__)

SAMPLED = 1024
"""Candidates that stand for all those beyond the best, where there are too many to score them all for every query."""

_AT_ONCE = 16_384  # rows fetched at a time
_KEPT_SAMPLES = 16  # of tags that were asked for lately

Tagged: TypeAlias = Callable[[], Iterable[Collection[str]]]
"""Tells the tags of one item after the other."""


class Rows(Protocol):
    """Embeddings by position: a tensor, a `Side`, or what `Kept` has lined up."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Tensor) -> Tensor: ...


class Side:
    """The embeddings of a gallery's items, by their position.

    Attributes:
        index: where they lie.
    """

    def __init__(self, index: Index, ids: Tensor | None = None, tagged: Tagged | None = None) -> None:
        """Say which rows of an index are the items.

        Args:
            index: may hold other rows; they are overlooked.
            ids: (n,) of each item, all of them there; the positions themselves if left out.
            tagged: tells the tags of one item after the other, where the index cannot tell them at once.
        """
        self.index, self._ids, self._tagged = index, ids, tagged
        if ids is not None:
            self._order = np.argsort(ids.numpy())
            self._sorted = ids.numpy()[self._order]
        self._sample = lru_cache(_KEPT_SAMPLES)(self._draw_sample)

    @classmethod
    def of_own(cls, index: Index, ids: Tensor) -> Side:
        """Take an index that nobody else uses; rows that belong to no item are taken out of it, in memory.

        Raises:
            ValueError: when an item has no row.
        """
        there = index.ids()
        foreign = there[~torch.isin(there, ids)]
        if len(there) - len(foreign) != len(ids):
            raise ValueError(f"Its {len(ids)} items have {len(there) - len(foreign)} embeddings.")
        index.delete(foreign)
        return cls(index, ids)

    @classmethod
    def in_memory(cls, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> Side:
        """Keep embeddings, (n, embed_dim); they are made unit-norm float32."""
        unit = functional.normalize(embeds.float(), dim=-1)
        side = cls(EmbeddedIndex(unit, tags=tags))
        side.__dict__["embeds"] = unit
        return side

    def __len__(self) -> int:
        return len(self.index if self._ids is None else self._ids)

    def __getitem__(self, positions: Tensor) -> Tensor:
        """Fetch some items' embeddings, (n, embed_dim) float32, unit norm."""
        if "embeds" in self.__dict__:
            return self.embeds[positions]
        ids = positions if self._ids is None else self._ids[positions]
        rows = self.index.embeds(ids).numpy()  # by numpy: torch would call in its threads for a few dozen rows
        return torch.from_numpy(rows / np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None])

    @cached_property
    def embeds(self) -> Tensor:
        """All of them, (n, embed_dim) float32, unit norm; of many items this fills the memory, so ask for a few."""
        logger.info("The embeddings of all %d items of a gallery are read into memory.", len(self))
        parts = [self[positions] for positions in torch.arange(len(self)).split(_AT_ONCE)]
        return torch.cat([torch.empty(0, self.index.embed_dim), *parts])

    def some(self) -> Tensor:
        """Fetch items that stand for all of them, (n, embed_dim): of many `SAMPLED`, one every so often."""
        count = SAMPLED if has_many(len(self)) else len(self)
        return self[torch.linspace(0, len(self) - 1, count, dtype=torch.double).long()]

    @cached_property
    def tags(self) -> dict[str, int]:
        """How many items carry each tag."""
        if self._tagged is None:
            return self.index.tags()
        return dict(sorted(Counter(tag for tags in self._tagged() for tag in tags).items()))

    def count(self, tag: str | None = None) -> int:
        """Count the items, or those that carry a tag."""
        return len(self) if tag is None else self.tags.get(tag, 0)

    def search(self, query: Tensor, k: int, head: int, tag: str | None = None) -> tuple[Tensor, Tensor]:
        """Find the best items for a query, best first, equal ones by position.

        Args:
            query: (embed_dim,), unit norm.
            k: how many.
            head: how many more are welcome if they cost nothing, these k included.
            tag: only items that carry it compete.

        Returns:
            Cosines and positions, both (k,) up to (head,).
        """
        if not len(self):
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        more = 0  # rows of others that may be among the best
        while True:
            found, ids = self.index.search(query[None], k + more, extra=max(head - k, 0), tag=tag)
            if self._ids is None:
                return found[0], ids[0]
            scores, places = self._own(found[0].numpy(), ids[0].numpy())
            foreign = len(ids[0]) - len(places)
            if foreign <= more or len(ids[0]) < k + more:
                order = np.lexsort((places, -scores))[: max(head, k)]
                return torch.from_numpy(scores[order]), torch.from_numpy(places[order])
            more = foreign

    def _own(self, scores: NDArray[np.float32], ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray]:
        """Leave out the rows that belong to no item; of the others, positions instead of ids."""
        places = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        own = self._sorted[places] == ids
        return scores[own], self._order[places[own]]

    def shares(self, query: Tensor, found: Tensor, scale: float, bias: float | None, tag: str | None = None) -> Tensor:
        """Say what a model thinks of the best candidates: its softmax over all of them, or a sigmoid of each.

        The softmax needs the weight of every candidate. Of more than `EXACT_ROWS` only those that were found are
        weighed, and for the rest, if it is not among them, `SAMPLED` candidates drawn once and for all. On 50,000
        pictures and 128 found, the shares are off by 7 % of their value for the compact model and by 1 % for one as
        sharp as CLIP (medians).

        Args:
            query: (embed_dim,), unit norm.
            found: cosines of the best, best first.
            scale: the model's `logit_scale`.
            bias: the model's `logit_bias`; None for a softmax.
            tag: of the candidates.

        Returns:
            As `found`, in [0, 1].
        """
        count = self.count(tag)
        if bias is None and has_many(count) and len(found):
            cosines = self._sample(tag) @ query
            rest = ((cosines - found[0]) * scale).exp()[cosines < found[-1]].sum() / len(cosines) * count
            weights = ((found - found[0]) * scale).exp()
            return weights / (weights.sum() + rest)
        if bias is None:
            found = self.search(query, count, count, tag)[0]
        return match_probabilities(logits_per_image(found[None], scale, bias), dim=1, logit_bias=bias)[0]

    def _draw_sample(self, tag: str | None) -> Tensor:
        """Draw the same items every time, (at most `SAMPLED`, embed_dim)."""
        if self._tagged is None:
            ids = self.index.ids(tag)
        else:
            own = [row for row, tags in enumerate(self._tagged()) if tag is None or tag in tags]
            ids = torch.tensor(own, dtype=torch.int64)
            ids = ids if self._ids is None else self._ids[ids].sort().values
        drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:SAMPLED]
        return functional.normalize(self.index.embeds(ids[drawn]), dim=-1)


def has_many(count: int) -> bool:
    """Whether so many candidates are too many to score them all for every query."""
    return count > EXACT_ROWS
