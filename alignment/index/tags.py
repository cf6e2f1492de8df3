"""Which rows carry which tag: for each tag the ascending positions of its rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from alignment.index.exact import Positions

NAMES, ENDS, ROWS = "tag_names", "tag_ends", "tag_rows"
"""Arrays of a segment's file: the tags as JSON, where the rows of each end, and the rows of all one after the other."""


class Tags:
    """The tags of some rows; nothing is read before it is asked for."""

    def __init__(self, arrays: Mapping[str, NDArray]) -> None:
        self.arrays = arrays

    @classmethod
    def of(cls, tags: Iterable[Collection[str]]) -> Tags:
        """Lay out the tags of one row after the other."""
        rows: dict[str, list[int]] = {}
        for row, names in enumerate(tags):
            for name in set(names):
                rows.setdefault(name, []).append(row)
        return cls._laid_out({name: np.array(of_tag, np.int32) for name, of_tag in rows.items()})

    @classmethod
    def merged(cls, parts: Sequence[tuple[Tags, NDArray[np.int64]]]) -> Tags:
        """Put the rows of several into one; each part says where its rows go to, -1 for nowhere."""
        rows: dict[str, list[NDArray]] = {}
        for part, places in parts:
            for name in part.names:
                new = places[part.rows(name)]
                rows.setdefault(name, []).append(new[new >= 0])
        merged = {name: np.sort(np.concatenate(pieces)).astype(np.int32) for name, pieces in rows.items()}
        return cls._laid_out({name: of_tag for name, of_tag in merged.items() if len(of_tag)})

    @classmethod
    def _laid_out(cls, rows: Mapping[str, NDArray[np.int32]]) -> Tags:
        names = sorted(rows)
        none = np.empty(0, np.int32)
        return cls(
            {
                NAMES: np.frombuffer(json.dumps(names, ensure_ascii=False).encode("utf-8", "surrogatepass"), np.uint8),
                ENDS: np.cumsum([len(rows[name]) for name in names], dtype=np.int64),
                ROWS: np.concatenate([none, *(rows[name] for name in names)]),
            }
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tags, in order."""
        return tuple(json.loads(self.arrays[NAMES].tobytes().decode("utf-8", "surrogatepass")))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def rows(self, name: str) -> Positions:
        """Positions of the rows that carry a tag, ascending; none for a tag that is not known."""
        number = self._numbers.get(name)
        if number is None:
            return np.empty(0, np.int64)
        ends = self.arrays[ENDS]
        return self.arrays[ROWS][ends[number - 1] if number else 0 : ends[number]].astype(np.int64)
