"""Read a data set in one call, for tests that look at its pictures alone."""

from pathlib import Path
from typing import Any

from alignment.data import Pair, read_data


def read_pairs(source: str | Path, format: str | None = None, **options: Any) -> list[Pair]:
    """Return the `pairs` of `read_data`."""
    return read_data(source, format=format, **options).pairs
