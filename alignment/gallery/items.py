"""Records of pictures or captions by position: in memory, or read from the database for each result.

Place in the flow: `gallery.db -> records by position (here) -> modality -> search`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from alignment.gallery.database import GalleryDatabase, Kind
from alignment.gallery.records import Caption, Picture, folder_of

logger = logging.getLogger(__name__)

Item = TypeVar("Item", Picture, Caption)

_BATCH = 1024  # records fetched at a time where all are read


class Records(Sequence[Item]):
    """Records by position, and their tags, see `tags_of`; here held in memory."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items: tuple[Item, ...] = tuple(items)
        self._positions: dict[str, int] = {item.id: position for position, item in enumerate(items)}

    def __len__(self) -> int:
        return len(self._items)

    def fetch(self, positions: Sequence[int]) -> list[Item | None]:
        """Fetch records; None for one that another process has deleted since the gallery was opened."""
        return [self._items[position] for position in positions]

    def position(self, name: str) -> int | None:
        """Find an item by its public name, the `id` of its record."""
        return self._positions.get(name)

    def tags(self) -> Mapping[str, int]:
        """Count the items of each tag."""
        return Counter(tag for item in self._items for tag in tags_of(item))

    def tagged(self, tag: str) -> Tensor:
        """List the positions of the items of a tag, ascending."""
        return torch.tensor([tag in tags_of(item) for item in self._items], dtype=torch.bool).nonzero().flatten()

    def find(self, name: str) -> Item | None:
        """Fetch the record of a public name."""
        return None if (position := self.position(name)) is None else self.fetch([position])[0]

    def __getitem__(self, position: Any) -> Any:
        """Fetch one record, or those of a slice that are still there."""
        chosen = range(len(self))[position]
        return list(filter(None, self.fetch(chosen))) if isinstance(chosen, range) else self.fetch([chosen])[0]

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self[start : start + _BATCH] for start in range(0, len(self), _BATCH))


class StoredRecords(Records[Item]):
    """Records in a gallery's database; only their ids are in memory."""

    def __init__(self, database: GalleryDatabase, kind: Kind, ids: Tensor) -> None:
        self._database, self._kind, self._ids = database, kind, ids
        self._read: Any = database.pictures if kind == "picture" else database.captions

    def __len__(self) -> int:
        return len(self._ids)

    def fetch(self, positions: Sequence[int]) -> list[Item | None]:
        """See `Records`."""
        try:
            return list(self._read(self._ids.numpy()[list(positions)].tolist()))  # numpy: less overhead
        except KeyError:
            return [None] if len(positions) == 1 else [self.fetch([position])[0] for position in positions]

    def position(self, name: str) -> int | None:
        """See `Records`."""
        id = self._database.id_of(self._kind, name)
        found = np.flatnonzero(self._ids.numpy() == (-1 if id is None else id))  # numpy: one thread
        return int(found[0]) if len(found) else None

    def tags(self) -> Mapping[str, int]:
        """See `Records`."""
        return self._database.tags(self._kind)

    def tagged(self, tag: str) -> Tensor:
        """See `Records`."""
        return torch.isin(self._ids, self._database.ids(self._kind, tag)).nonzero().flatten()


def tags_of(item: Picture | Caption) -> list[str]:
    """List the folders around a picture, "a" and "a/b" of "a/b/c.jpg", or the language of a caption."""
    if isinstance(item, Caption):
        return [item.lang]
    names = folder_of(item.source).split("/")
    return ["/".join(names[:end]) for end in range(1, len(names) + 1) if names[0]]


def missing_pictures(database: GalleryDatabase) -> list[int]:
    """List the ids of pictures inside packages that are not installed here; a warning counts them."""
    pictures = zip(database.packaged, database.pictures(database.packaged), strict=True)
    missing = {id: picture.package for id, picture in pictures if not picture.exists}
    for package, count in Counter(missing.values()).items():
        logger.warning("%d pictures of the package %s are left out: it is not installed here.", count, package)
    return list(missing)
