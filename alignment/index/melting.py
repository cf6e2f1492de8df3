"""Melt segments into one, and decide when it is due: few segments are searched faster, but large ones take long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from alignment.index.exact import Floats, Positions
from alignment.index.segment import Segment
from alignment.index.tags import Tags

DEAD_SHARE = 0.25
"""Share of dead rows beyond which a segment is written again without them."""

FAN = 4
"""A segment is melted into one that is about to be written if it has less than so many times its rows.

So a row is written again only when what it is melted with has grown by a quarter of it: in all, a number of times that
grows with the logarithm of the number of rows. No more than a handful of segments are left.
"""

_BLOCK = 4096  # rows copied at a time


def due(stored: Sequence[Segment], fresh: int) -> list[Segment]:
    """Say which segments to write again together with fresh rows.

    Args:
        stored: what lies in files.
        fresh: number of rows to be written in any case.
    """
    melted = [segment for segment in stored if len(segment.dead) > DEAD_SHARE * len(segment.ids)]
    size = fresh + sum(map(len, melted))
    for segment in sorted((segment for segment in stored if segment not in melted), key=len):
        if len(segment) >= FAN * size:
            break
        melted.append(segment)
        size += len(segment)
    return melted


class Melted:
    """Several segments as one, without the dead rows; nothing is copied before it is asked for.

    Attributes:
        ids: of all rows, ascending.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        living = [segment.living.positions for segment in segments]
        ids = [segment.ids[positions] for segment, positions in zip(segments, living, strict=True)]
        owners = np.repeat(np.arange(len(segments)), [len(part) for part in ids])
        order = np.argsort(np.concatenate(ids), kind="stable")
        self.ids: Positions = np.concatenate(ids)[order]
        self._owners, self._positions = owners[order], np.concatenate(living)[order]

    def tags(self) -> Tags:
        """Put the tags of all rows together."""
        parts = []
        for number, segment in enumerate(self._segments):
            places = np.full(len(segment.ids), -1)
            mine = np.flatnonzero(self._owners == number)
            places[self._positions[mine]] = mine
            parts.append((segment.tags, places))
        return Tags.merged(parts)

    def blocks(self, kind: type[np.floating]) -> Iterator[Floats]:
        """Copy the rows, some thousand at a time."""
        for start in range(0, len(self.ids), _BLOCK):
            owners, positions = (part[start : start + _BLOCK] for part in (self._owners, self._positions))
            block = np.empty((len(owners), self._segments[0].rows.shape[1]), kind)
            for number, segment in enumerate(self._segments):
                mine = owners == number
                block[mine] = segment.rows[positions[mine]]
            yield block

    def segment(self) -> Segment:
        """All of it in memory, in the widest precision there is among them."""
        kind = np.result_type(*(segment.rows.dtype for segment in self._segments)).type
        return Segment(self.ids, np.concatenate(list(self.blocks(kind))), self.tags())
