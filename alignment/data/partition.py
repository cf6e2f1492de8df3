"""Divide a data set among several processes that need not know of each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

BLOCK = 64
"""Neighbours that stay together: they are close on disk, and form the same batches as in one process."""


@dataclass(frozen=True)
class Partition:
    """One of several equal parts of a data set.

    Attributes:
        number: from 1.
        count: of all parts.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read "2/4", the second of four.

        Raises:
            ValueError: on any other text.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text!r} is no share; the second of four is 2/4.")
        return cls(int(found[1]), int(found[2]))

    def select(self, items: Sequence[Item], block: int = BLOCK) -> list[Item]:
        """Take every `count`-th block of `block` neighbours."""
        starts = range((self.number - 1) * block, len(items), self.count * block)
        return [item for start in starts for item in items[start : start + block]]
