"""Rows that never change, with their ids and tags; of some it is only noted that they are dead.

An index is a few of these. The rows lie in memory, or in a file that is mapped into it. Few rows are ranked exactly;
many have `Codes`, which name some hundred that look near, and these are scored exactly. What is returned is a true
cosine either way. How near is near enough is told by the codes' error for this very query: more rows are scored until
the k-th best lies so many of its standard deviations above what the next one looks like that none can be better.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from alignment.index.codes import Codes, StoredCodes, sure
from alignment.index.exact import Floats, Positions, cosines, error_bound, first, gather, rank
from alignment.index.tags import Tags

DEPTH = 256
"""Rows that the codes name at first; twice as many among more than `DEEP_ROWS`."""

DEEP_ROWS = 200_000
"""Rows from which twice as many are named, and three times as many scored at first."""

SCORED = 64
"""Of those named, rows that are scored at first; they tell how many more have to be."""

SLACK = 0.25
"""Standard deviations further than it takes that these others reach, so that one look is enough."""

EXACT_ROWS = 4096
"""Rows up to which a segment has no codes: all that compete are scored."""

_DEEPER = 4  # times as many rows, where the first are not enough
_DEEPEST = 4  # a part of the rows that compete; if that is not enough, all are scored
_KEPT_CHOICES = 32  # of a segment: tags that were asked for lately


class Chosen:
    """Rows of a segment that compete.

    Attributes:
        count: of them.
    """

    def __init__(self, size: int, *, only: Positions | None = None, but: Positions | None = None) -> None:
        """Choose of `size` rows only these or all but those; both ascending."""
        self.size, self._only, self._but = size, only, but
        self.count = len(only) if only is not None else size - (0 if but is None else len(but))

    @cached_property
    def positions(self) -> Positions:
        """Where they are, ascending."""
        return np.flatnonzero(self._mask()) if self._only is None else self._only

    @cached_property
    def bits(self) -> NDArray[np.uint8]:
        """A bit for each row of the segment, the lowest first."""
        return np.packbits(self._mask(), bitorder="little")

    def _mask(self) -> NDArray[np.bool_]:
        mask = np.full(self.size, self._only is None)
        mask[self._but if self._only is None else self._only] = self._only is not None
        return mask


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows in the order of their ids.

    Attributes:
        ids: (n,) ascending.
        rows: (n, embed_dim), float16, float32 or float64.
        tags: of the rows.
        codes: of the rows, if they have any.
        dead: ascending positions of rows that were deleted or have a newer version elsewhere.
    """

    ids: Positions
    rows: Floats
    tags: Tags
    codes: StoredCodes | None = None
    dead: Positions = field(default_factory=lambda: np.empty(0, np.int64))
    _choices: OrderedDict[str, Chosen] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        """Count those alive."""
        return len(self.ids) - len(self.dead)

    @cached_property
    def living(self) -> Chosen:
        """All that are not dead."""
        return Chosen(len(self.ids), but=self.dead)

    def without(self, positions: Positions) -> Segment:
        """Declare rows dead that are alive now; the rest is shared with this one."""
        if not len(positions):
            return self
        return replace(self, dead=np.union1d(self.dead, positions), _choices=OrderedDict(), _lock=threading.Lock())

    def locate(self, ids: Positions) -> tuple[NDArray[np.bool_], Positions]:
        """Look ids up: which of them are alive here, and the positions of these."""
        if not len(self.ids):
            return np.zeros(len(ids), bool), np.empty(0, np.int64)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        here = np.asarray(self.ids[places] == ids)
        if len(self.dead):
            here &= self.dead[np.minimum(np.searchsorted(self.dead, places), len(self.dead) - 1)] != places
        return here, places[here]

    def choice(self, tag: str | None) -> Chosen:
        """Those alive that carry a tag; all that are alive for None."""
        if tag is None:
            return self.living
        with self._lock:
            found = self._choices.pop(tag, None) or self._tagged(tag)
            self._choices[tag] = found
            while len(self._choices) > _KEPT_CHOICES:
                self._choices.popitem(last=False)
            return found

    def count(self, tag: str) -> int:
        """Count those alive that carry a tag."""
        return self._tagged(tag).count

    def _tagged(self, tag: str) -> Chosen:
        return Chosen(len(self.ids), only=np.setdiff1d(self.tags.rows(tag), self.dead, assume_unique=True))

    def search(
        self, queries: NDArray[np.float64], k: int, chosen: Chosen | None = None, extra: int = 0
    ) -> tuple[NDArray[np.float32], Positions]:
        """Find the best k for each query, best first, ties by lower id, and some more that are good.

        Args:
            queries: (num_queries, embed_dim).
            k: how many; clipped to the rows that compete.
            chosen: those that do, all alive; all that are alive if left out.
            extra: how many more; of these, some may be missing in large segments.

        Returns:
            Cosines and ids, both (num_queries, k + extra) or as many as compete.
        """
        if chosen is None and len(self.dead):
            chosen = self.living
        competing = len(self.ids) if chosen is None else chosen.count
        extra = min(extra, competing - min(k, competing))
        depth = max(8 * k, k + extra, DEPTH if competing <= DEEP_ROWS else 2 * DEPTH)
        if self.codes is None or competing <= depth * _DEEPEST:
            scores, places = rank(self.rows, queries, k + extra, None if chosen is None else chosen.positions)
        else:
            scores, places = self._search_codes(self.codes.codes, queries, k, extra, chosen, depth)
        return scores, self.ids[places]

    def _search_codes(
        self, codes: Codes, queries: NDArray[np.float64], k: int, extra: int, chosen: Chosen | None, depth: int
    ) -> tuple[NDArray[np.float32], Positions]:
        """Let the codes name rows, score these, and look deeper for the queries that need it."""
        scores = np.empty((len(queries), k + extra), np.float32)
        places = np.empty((len(queries), k + extra), np.int64)
        competing = len(self.ids) if chosen is None else chosen.count
        bits = None if chosen is None else chosen.bits
        unsure = np.arange(len(queries))
        bounds = 2 * error_bound(queries)
        while len(unsure) and depth * _DEEPEST <= competing:
            looks, near = codes.look(queries[unsure].astype(np.float32), depth, bits, competing)
            still = []
            for query, look, here in zip(unsure.tolist(), looks, near, strict=True):
                best = self._settle(queries[query], k, extra, look, here, bounds[query])
                if best is None:
                    still.append(query)
                else:
                    scores[query], places[query] = best
            unsure, depth = np.array(still, np.int64), depth * _DEEPER
        if len(unsure):
            positions = None if chosen is None else chosen.positions
            scores[unsure], places[unsure] = rank(self.rows, queries[unsure], k + extra, positions)
        return scores, places

    def _settle(
        self,
        query: NDArray[np.float64],
        k: int,
        extra: int,
        look: NDArray[np.float32],
        near: Positions,
        bound: float,
    ) -> tuple[NDArray[np.float32], Positions] | None:
        """Rank what looked near; None where something that was not looked at could be better than the k-th."""
        needed = max(SCORED if len(near) <= DEPTH else 3 * SCORED, 2 * k, k + extra)
        narrow, rough, kth = query[None].astype(np.float32), np.empty(0, np.float32), math.inf
        while len(rough) < needed:
            if needed > len(near) or near[needed - 1] < 0:
                return None
            more = cosines(gather(self.rows, near[len(rough) : needed]), narrow)[0]
            rough = np.concatenate([rough, more]) if len(rough) else more
            if k:
                kth = float(np.partition(rough, -k)[-k])
                mean, spread = _mean_and_spread(rough - look[: len(rough)])
                bar = kth - bound - mean - sure(len(rough)) * spread
                if look[min(needed, len(near) - 1)] >= bar:
                    needed = int(np.searchsorted(-look, SLACK * spread - bar, side="right"))
                    needed += needed == len(near)  # who knows how many more there are
        contenders = np.flatnonzero(rough >= kth - bound)
        exact = cosines(gather(self.rows, near[contenders], torch.float64), query[None])[0]
        scores, order = first(exact, k, near[contenders])
        best = contenders[order]
        if extra:
            rough[best] = math.inf
            left = np.argsort(-rough)[k : k + extra]
            scores = np.concatenate([scores, np.minimum(rough[left], scores[-1] if k else 1)])
            best = np.concatenate([best, left])
        return scores, near[best]


def _mean_and_spread(errors: NDArray[np.float32]) -> tuple[float, float]:
    mean = float(errors.sum()) / len(errors)
    return mean, math.sqrt(max(float(errors @ errors) / len(errors) - mean * mean, 0.0))
