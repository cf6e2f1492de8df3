"""The store: pictures that come packed, in shards or tables, written out once under the hash of their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from alignment.atomic import write_file


def cache_folder() -> Path:
    """Find where to keep what is read from shards: $ALIGNMENT_CACHE, else `~/.cache/alignment`."""
    return Path(os.path.abspath(Path(os.environ.get("ALIGNMENT_CACHE") or "~/.cache/alignment").expanduser()))


def stored(data: bytes, ending: str, store: Path) -> Path:
    """Write a picture out, unless it is there whole, so that one repeated for each caption is one picture."""
    file = store / f"{hashlib.sha256(data).hexdigest()}{ending.lower() or '.jpg'}"
    if not _holds(file, data):
        write_file(file, data, fsync=False)  # who reads it looks whether it is whole
    return file


def _holds(file: Path, data: bytes) -> bool:
    try:
        return file.stat().st_size == len(data) and file.read_bytes() == data
    except OSError:
        return False
