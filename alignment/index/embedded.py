"""The embedded index: in memory, or in a folder that is mapped into it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignment.index import files, melting
from alignment.index.codes import Codes
from alignment.index.exact import Floats, Positions, gather
from alignment.index.face import Index
from alignment.index.incoming import (
    RowTags,
    by_id,
    floats,
    integers,
    new_rows,
    query_rows,
    refuse_unknown,
    subset_ids,
)
from alignment.index.segment import EXACT_ROWS, Chosen, Segment
from alignment.index.tags import Tags


@dataclass(frozen=True, eq=False)
class _Part:
    """A segment and what the folder knows of it.

    Attributes:
        segment: as it is now.
        entry: as it was saved; None if it never was.
        saved_dead: dead rows it had then.
    """

    segment: Segment
    entry: files.Entry | None = None
    saved_dead: int = 0


class EmbeddedIndex(Index):
    """An index of this process's own.

    Made of embeddings, it is in memory and exact. Saved to a folder, or opened from one, its rows are float16 in files
    that are mapped into memory; more than `EXACT_ROWS` of them are found by their codes, see
    `alignment.index.segment`. Changes are in memory until they are saved, and then only they are written.
    """

    def __init__(
        self, embeds: Tensor, *, ids: Tensor | None = None, tags: Sequence[Collection[str]] | None = None
    ) -> None:
        """Keep the embeddings; nothing is copied if the ids ascend.

        Args:
            embeds: (n, embed_dim), unit-norm, any floating type; there may be none at all.
            ids: (n,) integers, each once; 0, 1, 2, ... if left out.
            tags: of each row.

        Raises:
            ValueError: on another shape or type, or ids or tags that do not fit.
        """
        rows = floats(embeds)
        self._embed_dim = rows.shape[1]
        self._parts: tuple[_Part, ...] = ()
        self._folder: Path | None = None
        self._about: Mapping[str, str] = {}
        self._lock = threading.Lock()
        if len(rows):
            wanted = torch.arange(len(rows)) if ids is None else ids
            self._parts = (_Part(_segment(*by_id(integers(wanted), rows, tags))),)

    @classmethod
    def open(cls, folder: Path) -> EmbeddedIndex:
        """Open what was saved; takes as long for a million rows as for a thousand.

        Raises:
            FileNotFoundError: when there is no index.
            ValueError: when it is damaged.
        """
        listing = files.read_listing(folder)
        while True:
            try:
                segments = [files.map_segment(folder, entry, listing.embed_dim) for entry in listing.entries]
                break
            except FileNotFoundError as error:
                newer = files.read_listing(folder)
                if newer == listing:
                    raise ValueError(f"The index in {folder} is damaged: {error.filename} is missing.") from error
                listing = newer  # somebody saved it just now
        index = cls(torch.empty(0, listing.embed_dim))
        index._settle(folder, listing, segments)
        return index

    def _settle(self, folder: Path, listing: files.Listing, segments: Sequence[Segment]) -> None:
        """Be what the folder holds."""
        pairs = zip(segments, listing.entries, strict=True)
        self._parts = tuple(_Part(segment, entry, len(segment.dead)) for segment, entry in pairs)
        self._folder, self._about = folder, dict(listing.about)

    # ------------------------------------------------------------ reading

    @property
    def about(self) -> Mapping[str, str]:
        """What its owner had written down beside it."""
        return self._about

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self._embed_dim

    def __len__(self) -> int:
        return sum(len(part.segment) for part in self._parts)

    def ids(self, tag: str | None = None) -> Tensor:
        """List the ids of all rows, or of those with a tag: (n,) int64, ascending."""
        return torch.from_numpy(_ids([part.segment for part in self._parts], tag))

    def tags(self) -> dict[str, int]:
        """Count the rows of each tag, in order of the tags."""
        counts: dict[str, int] = {}
        for segment in (part.segment for part in self._parts):
            for name in segment.tags.names:
                counts[name] = counts.get(name, 0) + segment.count(name)
        return {name: counts[name] for name in sorted(counts) if counts[name]}

    def embeds(self, ids: Tensor) -> Tensor:
        """Fetch embeddings, (n, embed_dim) float32 in the order of the ids.

        Raises:
            ValueError: on an id that is not there.
        """
        wanted = integers(ids)
        found, missing = np.empty((len(wanted), self.embed_dim), np.float32), np.ones(len(wanted), bool)
        for segment in (part.segment for part in self._parts):
            here, positions = segment.locate(wanted)
            found[here] = gather(segment.rows, positions)
            missing &= ~here
        refuse_unknown(wanted[missing])
        return torch.from_numpy(found)

    def search(
        self, queries: Tensor, k: int, *, tag: str | None = None, subset: Tensor | None = None, extra: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Find the k rows closest to each query, best first, ties by lower id; see `Index.search`."""
        exact = query_rows(queries, self.embed_dim, k, extra)
        segments = [part.segment for part in self._parts]
        choices = self._choices(segments, tag, subset)
        pairs = zip(segments, choices, strict=True)
        found = [segment.search(exact, k, chosen, extra) for segment, chosen in pairs if chosen is None or chosen.count]
        if len(found) == 1:
            scores, ids = found[0]
        else:
            none = np.empty((len(exact), 0), np.float32), np.empty((len(exact), 0), np.int64)
            scores, ids = (np.concatenate(part, axis=1) for part in zip(none, *found, strict=True))
            order = np.lexsort((ids, -scores), axis=1)[:, : k + extra]
            scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def _choices(self, segments: Sequence[Segment], tag: str | None, subset: Tensor | None) -> Sequence[Chosen | None]:
        """Say for each segment which rows compete; None for all that are alive."""
        if subset is None:
            return [None if tag is None else segment.choice(tag) for segment in segments]
        wanted = subset_ids(subset, lambda: _ids(segments))
        located = [segment.locate(wanted) for segment in segments]
        refuse_unknown(wanted[~reduce(np.logical_or, [here for here, _ in located], np.zeros(len(wanted), bool))])
        found = [(segment, positions) for segment, (_, positions) in zip(segments, located, strict=True)]
        if tag is not None:
            found = [
                (segment, np.intersect1d(positions, segment.choice(tag).positions)) for segment, positions in found
            ]
        return [Chosen(len(segment.ids), only=positions) for segment, positions in found]

    # ------------------------------------------------------------ changing

    def upsert(self, ids: Tensor, embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> None:
        """Add rows; one whose id is there already takes the place of the old one; see `Index.upsert`."""
        new = _segment(*new_rows(ids, embeds, tags, self.embed_dim))
        if not len(new):
            return
        with self._lock:
            parts = self._without(new.ids)
            fresh = [part.segment for part in parts if part.entry is None and len(part.segment)]
            melted = melting.due(fresh, len(new))
            if melted:
                new = melting.Melted([*melted, new]).segment()
            kept = [part for part in parts if part.segment not in melted and (part.entry or len(part.segment))]
            self._parts = (*kept, _Part(new))

    def delete(self, ids: Tensor) -> int:
        """Take rows out; ids that are not there do no harm. Returns how many went."""
        with self._lock:
            before = len(self)
            self._parts = self._without(np.unique(integers(ids)))
            return before - len(self)

    def _without(self, ids: Positions) -> tuple[_Part, ...]:
        return tuple(replace(part, segment=part.segment.without(part.segment.locate(ids)[1])) for part in self._parts)

    # ------------------------------------------------------------ keeping

    def save(self, folder: Path | None = None, *, about: Mapping[str, str] | None = None) -> None:
        """Write what is new; where the index was opened from or last saved to, nothing else.

        Segments that are small or full of dead rows are written again together, see `melting`.

        Args:
            folder: the one it was opened from, or last saved to, if left out; any other gets all of it.
            about: anything to be kept beside it; as before if left out.

        Raises:
            ValueError: without a folder.
        """
        with self._lock:
            folder = folder or self._folder
            if folder is None:
                raise ValueError("An index that was never saved needs to be told where to.")
            if self._folder is not None and folder.resolve() == self._folder.resolve():
                stored = [part for part in self._parts if part.entry is not None]
                fresh = [part.segment for part in self._parts if part.entry is None]
                melted = melting.due([part.segment for part in stored], sum(map(len, fresh)))
                kept = [part for part in stored if part.segment not in melted]
            else:
                fresh, melted, kept = [part.segment for part in self._parts], [], []
            self._write(folder, kept, [*fresh, *melted], self._about if about is None else about)

    def compact(self) -> None:
        """Write everything into one segment; for an index that will be searched much and changed little."""
        with self._lock:
            if self._folder is None:
                raise ValueError("An index that was never saved has nothing to compact.")
            self._write(self._folder, [], [part.segment for part in self._parts], self._about)

    def verify(self) -> None:
        """Read every byte of the folder and compare it with what was written.

        Raises:
            ValueError: naming the file that has changed.
        """
        if self._folder is not None:
            files.verify(self._folder, files.read_listing(self._folder))

    def _write(self, folder: Path, kept: Sequence[_Part], melted: Sequence[Segment], about: Mapping[str, str]) -> None:
        segments, entries = [], []
        for part in kept:
            segments.append(part.segment)
            entries.append(_entry_of(folder, part))
        living = [segment for segment in melted if len(segment)]
        if living:
            segment, entry = _write_segment(folder, melting.Melted(living), self.embed_dim)
            segments.append(segment)
            entries.append(entry)
        listing = files.Listing(self.embed_dim, tuple(entries), dict(about))
        files.write_listing(folder, listing)
        files.sweep(folder, listing)
        self._settle(folder, listing, segments)


def _entry_of(folder: Path, part: _Part) -> files.Entry:
    """Describe a segment that is in the folder already, writing down which rows have died since."""
    assert part.entry is not None
    if len(part.segment.dead) == part.saved_dead:
        return part.entry
    return replace(part.entry, dead=files.write_dead(folder, part.segment.dead))


def _write_segment(folder: Path, melted: melting.Melted, embed_dim: int) -> tuple[Segment, files.Entry]:
    entry = files.write_segment(folder, melted.ids, melted.blocks(np.float16), embed_dim, melted.tags())
    if entry.num_rows > EXACT_ROWS:
        codes = Codes.build(files.map_segment(folder, entry, embed_dim).rows)
        entry = replace(entry, codes=files.write_codes(folder, codes))
    return files.map_segment(folder, entry, embed_dim), entry


def _segment(ids: Positions, rows: Floats, tags: RowTags | None) -> Segment:
    return Segment(ids, rows, Tags.of(() if tags is None else tags))


def _ids(segments: Sequence[Segment], tag: str | None = None) -> Positions:
    found = [segment.ids[segment.choice(tag).positions] for segment in segments]
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))
