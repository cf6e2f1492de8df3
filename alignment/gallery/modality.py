"""Items of one kind by position, pictures or captions: records, embeddings, nearest neighbours, softmax shares.

Place in the flow: `gallery.db + index -> modality (here) -> search`. No query scores all of many items.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from alignment.gallery.database import SIDES, GalleryDatabase, Kind
from alignment.gallery.milvus_sync import Remote
from alignment.gallery.records import Caption, Picture, tags_of
from alignment.index import EXACT_ROWS, FileIndex, LocalIndex, VectorIndex
from alignment.similarity import logits_per_image, match_probabilities

logger = logging.getLogger(__name__)

Item = TypeVar("Item", Picture, Caption)

IN_MEMORY_ROWS = 20_000  # read into memory where a build has not written their index; writing it takes seconds
LARGE = 4096  # candidates above which a query is not scored against all of them
SAMPLED = 1024  # candidates that stand for the rest in the softmax over more than that

_RECORDS, _EMBEDS = 1024, 16_384  # fetched at a time where all are read
_CACHED_SAMPLES = 16  # of the tags used last


class Records(Sequence[Item]):
    """Records by position, and their tags, see `tags_of`; here held in memory."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items: tuple[Item, ...] = tuple(items)
        self._positions = {item.id: position for position, item in enumerate(items)}

    def __len__(self) -> int:
        return len(self._items)

    def fetch(self, positions: Sequence[int]) -> list[Item | None]:
        """Fetch records; None for one that another process has deleted since the gallery was opened."""
        return [self._items[position] for position in positions]

    def position(self, name: str) -> int | None:
        """Find an item by its public name, the `id` of its record."""
        return self._positions.get(name)

    @cached_property
    def tags(self) -> Mapping[str, int]:
        """Number of items of each tag."""
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
        return chain.from_iterable(self[start : start + _RECORDS] for start in range(0, len(self), _RECORDS))


class _StoredRecords(Records[Item]):
    """Records in a gallery's database; only their ids are in memory."""

    def __init__(self, database: GalleryDatabase, kind: Kind, ids: Tensor) -> None:
        self._database, self._kind, self._ids = database, kind, ids
        self._read: Any = database.pictures if kind == "picture" else database.captions

    def __len__(self) -> int:
        return len(self._ids)

    def fetch(self, positions: Sequence[int]) -> list[Item | None]:
        try:
            return list(self._read(self._ids.numpy()[list(positions)].tolist()))  # numpy: less overhead
        except KeyError:
            return [None] if len(positions) == 1 else [self.fetch([position])[0] for position in positions]

    def position(self, name: str) -> int | None:
        found = np.flatnonzero(self._ids.numpy() == self._database.id_of(self._kind, name))  # numpy: one thread
        return int(found[0]) if len(found) else None

    @cached_property
    def tags(self) -> Mapping[str, int]:
        return self._database.tags(self._kind)

    def tagged(self, tag: str) -> Tensor:
        return torch.isin(self._ids, self._database.ids(self._kind, tag)).nonzero().flatten()

    def open_index(self, *, write: bool) -> FileIndex:
        """Map the index of all items; if it is missing or outdated, write it, or raise OSError or ValueError."""
        path, model = self._database.folder / f"{SIDES[self._kind]}.faiss", self._database.metadata.fingerprint
        stamp = hashlib.sha256(model.encode() + self._ids.numpy().tobytes()).hexdigest()
        try:
            return FileIndex(path, stamp, self.tagged)
        except (FileNotFoundError, ValueError):
            if not write:
                raise
        queries = self._database.cohort().get("text_embeds" if self._kind == "picture" else "image_embeds")
        FileIndex.write(path, (rows for _, rows in self._database.batches(self._kind)), stamp, queries)
        return FileIndex(path, stamp, self.tagged)


class Modality(Generic[Item]):
    """Pictures or captions of a gallery by position: their records, and the index of their embeddings."""

    def __init__(self, items: Records[Item], index: VectorIndex, ids: Tensor | None = None) -> None:
        """Combine records and an index, which may hold other rows; without `ids`, (n,), these are the positions."""
        self.items: Records[Item] = items
        self.index, self._ids = index, ids
        self._order = torch.empty(0, dtype=torch.int64) if ids is None else ids.argsort()
        self.sample = lru_cache(_CACHED_SAMPLES)(self._sample)

    @classmethod
    def in_memory(cls, items: Sequence[Item], embeds: Tensor) -> Self:
        """Hold embeddings in memory, (n, embed_dim), one for each item or a ValueError; they are normalised."""
        if len(items) != len(embeds):
            raise ValueError(f"{len(items)} items have {len(embeds)} embeddings: each item needs one.")
        records: Records[Item] = items if isinstance(items, Records) else Records(items)
        unit = functional.normalize(embeds.float(), dim=-1)
        modality = cls(records, LocalIndex(unit, records.tagged))
        modality.embeds = unit
        return modality

    @classmethod
    def open(cls, database: GalleryDatabase, kind: Kind, remote: Remote | None = None) -> Self:
        """Open the items of a gallery, but no pictures of packages that are not installed here.

        They are searched through its index, on a server, or, if few, in memory. KeyError when another process replaced
        it, ValueError when it is damaged or the server holds other items, OSError when the server does not answer.
        """
        every = ids = database.ids(kind)
        if kind == "picture":
            packaged = zip(database.packaged, database.pictures(database.packaged), strict=True)
            missing = {id: picture.package for id, picture in packaged if not picture.exists}
            ids = every[~torch.isin(every, torch.tensor(list(missing), dtype=torch.int64))]
            for package, count in Counter(missing.values()).items():
                logger.warning("%d pictures of the package %s are left out: it is not installed here.", count, package)
        items: _StoredRecords[Item] = _StoredRecords(database, kind, ids)
        if remote is not None and len(ids):
            return cls(items, remote.open(kind, database.metadata.fingerprint, every), ids)
        if len(ids) == len(every) > EXACT_ROWS:
            try:
                return cls(items, items.open_index(write=len(ids) > IN_MEMORY_ROWS))
            except (OSError, ValueError) as error:
                logger.info("The embeddings of %d %ss are read into memory: %s", len(ids), kind, error)
        return cls.in_memory(items, database.embeds(kind, ids))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, positions: Tensor) -> Tensor:
        """Fetch the embeddings of some items, (n, embed_dim) float32, unit norm within half precision."""
        if "embeds" in self.__dict__:
            return self.embeds[positions]
        return self.index.embeds(positions if self._ids is None else self._ids[positions])

    @cached_property
    def embeds(self) -> Tensor:
        """All embeddings, (n, embed_dim) float32, unit norm; of many items they fill the memory."""
        return torch.cat([self[positions] for positions in torch.arange(len(self)).split(_EMBEDS)])

    def embed(self, name: str) -> Tensor | None:
        """Fetch the embedding of the item of a public name, (embed_dim,)."""
        position = self.items.position(name)
        return None if position is None else self[torch.tensor([position])][0]

    def count(self, tag: str | None = None) -> int:
        """Count the items, or those of a tag: in a folder, or of a language."""
        return len(self) if tag is None else self.items.tags.get(tag, 0)

    def search(self, query: Tensor, k: int, head: int, tag: str | None = None) -> tuple[Tensor, Tensor]:
        """Find the `head` nearest items of a query, (embed_dim,), or of those of a tag: best first, ties by position.

        The first k are exact; among the others a better one may be missing. Returns cosines and positions.
        """
        foreign = 0  # rows of no item that are allowed for
        while True:
            scores, rows = self.index.search(query, k + foreign, extra=max(head - k, 0), tag=tag)
            if self._ids is None:
                return scores, rows
            places = torch.searchsorted(self._ids, rows, sorter=self._order).clamp_max(len(self) - 1)
            positions = self._order[places]
            own = self._ids[positions] == rows
            if len(rows) < k + foreign or (count := int((~own).sum())) <= foreign:
                scores, positions = scores[own], positions[own]
                order = torch.from_numpy(np.lexsort((positions.numpy(), -scores.numpy()))[: max(head, k)])
                return scores[order], positions[order]
            foreign = count

    def softmax(self, query: Tensor, found: Tensor, scale: float, bias: float | None, tag: str | None = None) -> Tensor:
        """Compute the model's softmax over all candidates, or its sigmoid, for the cosines `found`, best first.

        Among more than `LARGE` candidates only these, the best, are weighed exactly, the rest by a sample: with 128 of
        50,000 the median relative error is 7 % for the compact model, and 1 % for one with CLIP's `logit_scale`.
        """
        count = self.count(tag)
        if bias is None and count > LARGE and len(found):
            cosines = self.sample(tag) @ query
            rest = ((cosines - found[0]) * scale).exp()[cosines < found[-1]].sum() / len(cosines) * count
            weights = ((found - found[0]) * scale).exp()
            return weights / (weights.sum() + rest)
        if bias is None:
            found = self.search(query, count, count, tag)[0]
        return match_probabilities(logits_per_image(found[None], scale, bias), dim=1, logit_bias=bias)[0]

    def _sample(self, tag: str | None = None) -> Tensor:  # (n, embed_dim); of many items, `SAMPLED` at equal distances
        positions = torch.arange(len(self)) if tag is None else self.items.tagged(tag)
        if len(positions) > LARGE:
            positions = positions[torch.linspace(0, len(positions) - 1, SAMPLED, dtype=torch.double).long()]
        return self[positions]


def write_index(database: GalleryDatabase, kind: Kind) -> None:
    """Write the index of more than `EXACT_ROWS` items, unless it is up to date; delete that of fewer; or OSError."""
    ids = database.ids(kind)
    if len(ids) > EXACT_ROWS:
        _StoredRecords[Any](database, kind, ids).open_index(write=True)
    else:
        (database.folder / f"{SIDES[kind]}.faiss").unlink(missing_ok=True)
