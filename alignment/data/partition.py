"""Shares: how several processes divide a data set among them, so that none has to know of the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

BLOCK = 64
"""Items that stay together: neighbours lie on one disk, and make the same batches as in one process."""


@dataclass(frozen=True)
class Partition:
    """One of several equal parts of a data set.

    Attributes:
        number: from 1.
        count: how many there are.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read "2/4", the second of four.

        Raises:
            ValueError: when it is nothing of the kind.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text!r} is no share; the second of four is 2/4.")
        return cls(int(found[1]), int(found[2]))

    def select(self, items: Sequence[Item], block: int = BLOCK) -> list[Item]:
        """Take this share: every `count`-th block of so many neighbours."""
        starts = range((self.number - 1) * block, len(items), self.count * block)
        return [item for start in starts for item in items[start : start + block]]
