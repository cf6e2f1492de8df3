"""Folders whose files are checksummed last, so that an interrupted or damaged one is noticed.

Place in the flow: `trainer` marks checkpoints and `feature_cache` its files; a resumed run takes the last checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from alignment.atomic import fsync_tree, read_json_checksummed, sha256_of, write_json_checksummed

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_CHECKSUMS = "complete"


def mark_complete(folder: Path, name: str = _CHECKSUMS) -> None:
    """Flush a folder to disk and write the sha256 of its files to the file `name` in it."""
    fsync_tree(folder)
    write_json_checksummed(folder / name, {path.name: sha256_of(path) for path in sorted(folder.iterdir())})


def is_complete(folder: Path, name: str = _CHECKSUMS) -> bool:
    """Whether every file is there and as it was written."""
    try:
        return all(sha256_of(folder / file) == sha256 for file, sha256 in read_json_checksummed(folder / name).items())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint, and delete incomplete and damaged ones."""
    last = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        if is_complete(path):
            last = path
        else:
            logger.warning("%s was not finished or is damaged, and is removed.", path)
            shutil.rmtree(path, ignore_errors=True)  # another process of the run may delete it at the same time
    return last
