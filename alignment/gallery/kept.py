"""Embeddings by what they are of, wherever they lie: in the gallery as it was, in the parts of a build, or in memory.

Place in the flow: `old gallery, parts, model -> rows by key (here) -> gallery folder`. A row is in memory from when it
comes out of the model until it is written down, some seconds later; of all others there is only a note of their place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from alignment.gallery.storage import Rows

_BITS = 40  # of a place: the row's number, below that of the source it lies in


class Kept:
    """Rows by key: of pictures by the hash of their file, of captions by their text.

    Attributes:
        fresh: keys of the rows that are only in memory so far, with these.
    """

    def __init__(self, embed_dim: int) -> None:
        """Begin with none."""
        self.embed_dim = embed_dim
        self.fresh: list[tuple[str, Tensor]] = []
        self._places: dict[str, int] = {}
        self._sources: list[Rows] = [_Fresh(self.fresh)]  # the last one is always that of the fresh rows

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def include(self, keys: Collection[str], rows: Rows) -> None:
        """Take in rows that lie somewhere, one for each key; of a key that is known already, the later row counts."""
        assert not self.fresh, "what is known comes before what is new"
        start = (len(self._sources) - 1) << _BITS
        self._places.update(zip(keys, range(start, start + len(rows)), strict=True))
        self.settle(rows)

    def add(self, keys: Iterable[str], rows: Iterable[Tensor]) -> None:
        """Take in rows as they come, (embed_dim,) each."""
        source = (len(self._sources) - 1) << _BITS
        for key, row in zip(keys, rows, strict=True):
            self._places[key] = source + len(self.fresh)
            self.fresh.append((key, row))

    def settle(self, rows: Rows) -> None:
        """Let go of the fresh rows: they lie here now, in their order."""
        self.fresh = []
        self._sources[-1:] = [rows, _Fresh(self.fresh)]

    def of(self, keys: Iterable[str]) -> Rows:
        """Line up the rows of these keys; nothing is read before it is asked for.

        Raises:
            KeyError: when there is no row for one of them.
        """
        places = np.fromiter((self._places[key] for key in keys), np.int64)
        return _Chosen(self._sources, places, self.embed_dim)


class _Fresh:
    """Rows in memory."""

    def __init__(self, rows: Sequence[tuple[str, Tensor]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, positions: Tensor) -> Tensor:
        return torch.stack([self._rows[position][1] for position in positions.tolist()])


class _Chosen:
    """Some rows, in some order."""

    def __init__(self, sources: Sequence[Rows], places: np.ndarray, embed_dim: int) -> None:
        self._sources, self._places, self._embed_dim = sources, places, embed_dim

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, positions: Tensor) -> Tensor:
        places = torch.from_numpy(self._places)[positions]
        found = torch.empty(len(places), self._embed_dim, dtype=torch.float16)
        owners = places >> _BITS
        for owner in owners.unique().tolist():
            mine = owners == owner
            found[mine] = self._sources[owner][places[mine] & ((1 << _BITS) - 1)].half()
        return found
