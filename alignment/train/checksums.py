"""Checksums of a folder's files, written last: a folder without them is incomplete.

Place in the flow: under `checkpoints` and `feature_cache`.
"""

from __future__ import annotations

from pathlib import Path

from alignment.durable import read_sealed, sha256_of, sync_tree, write_sealed


def write_checksums(folder: Path, name: str) -> None:
    """Flush a folder to disk and write the sha256 of its files to the file `name` in it."""
    sync_tree(folder)
    write_sealed(folder / name, {path.name: sha256_of(path) for path in sorted(folder.iterdir())})


def verify_checksums(folder: Path, name: str) -> None:
    """Compare the files of a folder with their checksums.

    Raises:
        OSError: when a file is missing or cannot be read.
        ValueError: when a file has changed.
    """
    for file, sha256 in read_sealed(folder / name).items():
        if sha256_of(folder / file) != sha256:
            raise ValueError(f"{file} is not as it was written")
