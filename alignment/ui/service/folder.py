"""Top floor, where everything lies that a visitor sends: one folder a process, gone with it.

Uploads, and what is unpacked of them, are in a folder of random name that nobody else may read. It is deleted when the
process ends; of a process that was killed the next one deletes it. A lock that ends with its process tells the living
from the dead, also where processes cannot see each other.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Self

from gradio import routes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

logger = logging.getLogger(__name__)

_PREFIX, _LOCK = "alignment-uploads-", ".lock"


class Folder:
    """A folder of this process for as long as it lives; a context manager."""

    def __init__(self, base: Path | None = None) -> None:
        """Make it.

        Args:
            base: the folder it is made in; by default `GRADIO_TEMP_DIR`, else the system's for what is temporary.

        Raises:
            OSError: when it cannot be made there.
        """
        chosen = base or os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
        self.base = Path(chosen).resolve()
        self.base.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = self._claimed()
        self._before = os.environ.get("GRADIO_TEMP_DIR"), tempfile.tempdir, routes.DEFAULT_TEMP_DIR

    def __enter__(self) -> Self:
        """Let Gradio, and whoever asks for a temporary file in this process, use it; tidy up after the dead."""
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = routes.DEFAULT_TEMP_DIR = str(self.path)
        self._tidy()
        return self

    def __exit__(self, *error: object) -> None:
        """Delete it."""
        gradio, tempfile.tempdir, routes.DEFAULT_TEMP_DIR = self._before
        if gradio is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = gradio
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        Path(self._lock.name).unlink(missing_ok=True)

    def _claimed(self) -> tuple[Path, IO[bytes]]:
        """Lock a name, then make its folder, readable by nobody else; who tidies up just then may be quicker."""
        while True:
            path = self.base / f"{_PREFIX}{secrets.token_hex(8)}"
            lock = path.with_name(path.name + _LOCK).open("xb")
            if _try_lock(lock) and os.path.exists(lock.name):
                path.mkdir(mode=0o700)
                return path, lock
            lock.close()

    def _tidy(self) -> None:
        """Delete the folders of processes that ended without doing so."""
        for lock in self.base.glob(f"{_PREFIX}*{_LOCK}"):
            try:
                with lock.open("r+b") as file:
                    if not _try_lock(file):
                        continue  # somebody lives there
                    shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
                lock.unlink(missing_ok=True)
                logger.info("Deleted the uploads of a process that was killed")
            except OSError:  # another process is at it, or it is another user's
                continue


def _try_lock(file: IO[bytes]) -> bool:
    """Take a lock that ends with the process; whether nobody else has it."""
    try:
        if fcntl is None:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep(folder: Path, seconds: float) -> int:
    """Delete the files below a folder that nobody has touched for so long, and folders that are empty by then.

    Args:
        folder: itself it stays.
        seconds: since a file came, or was read last.

    Returns:
        How many files were deleted.
    """
    deleted, long_ago = 0, time.time() - seconds
    for path in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):  # what is in a folder before it
        try:
            status = path.lstat()
            if max(status.st_mtime, status.st_atime, status.st_ctime) > long_ago:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
                deleted += 1
        except OSError:  # it is gone, or not empty
            continue
    return deleted
