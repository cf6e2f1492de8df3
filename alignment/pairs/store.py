"""The store: pictures that come packed, in shards or tables, written out once under the hash of their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Find where to keep what is read from shards: $ALIGNMENT_CACHE, else `~/.cache/alignment`."""
    return Path(os.path.abspath(os.environ.get("ALIGNMENT_CACHE") or Path.home() / ".cache" / "alignment"))


def stored(data: bytes, ending: str, store: Path) -> Path:
    """Write a picture out, unless it is there, so that one repeated for each caption is one picture."""
    file = store / f"{hashlib.sha256(data).hexdigest()}{ending.lower() or '.jpg'}"
    if not file.exists():
        write_whole(file, data)
    return file


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that nobody ever finds half of it under its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(file)
