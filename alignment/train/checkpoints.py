"""The checkpoints of a run: which are complete, and their weights.

Place in the flow: `trainer` writes them, `run` resumes from the last complete one.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from alignment.train.checksums import verify_checksums, write_checksums
from alignment.train.presets import Towers

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_COMPLETE = "complete"  # checksums of all files; a checkpoint without it was being written when the run was killed


def save_trained(towers: Towers, folder: Path) -> None:
    """Write the trained weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(towers.state_dict(), folder / WEIGHTS)


def load_trained(towers: Towers, checkpoint: Path) -> None:
    """Replace the trained weights; raises ValueError when the checkpoint is of another model or preset."""
    towers.load_state_dict(load_file(checkpoint / WEIGHTS))


def mark_complete(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint."""
    write_checksums(checkpoint, _COMPLETE)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file is there and as it was written."""
    try:
        verify_checksums(checkpoint, _COMPLETE)
    except (OSError, ValueError):
        return False
    return True


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
