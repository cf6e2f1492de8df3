"""Write pictures from shards, tables and Hub data sets to disk once, named after the hash of their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from alignment.atomic import write_file


def cache_folder() -> Path:
    """Return $ALIGNMENT_CACHE, else `~/.cache/alignment`."""
    return Path(os.path.abspath(Path(os.environ.get("ALIGNMENT_CACHE") or "~/.cache/alignment").expanduser()))


def store_image(data: bytes, suffix: str, folder: Path) -> Path:
    """Write a picture unless it is there, so that one repeated for each caption is one file."""
    file = folder / f"{hashlib.sha256(data).hexdigest()}{suffix.lower() or '.jpg'}"
    try:
        is_whole = file.stat().st_size == len(data) and file.read_bytes() == data
    except OSError:
        is_whole = False
    if not is_whole:
        write_file(file, data, fsync=False)  # not synced: a file cut off by a crash is found here
    return file
