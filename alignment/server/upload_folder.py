"""Server, upload folder: one folder of random name for each process, deleted with it.

Only this user may read it. A process deletes its folder when it ends; the next one deletes that of a process that was
killed. A file lock, which the system releases with its process, tells the two apart, across containers too.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from alignment.server.gradio_internals import set_temp_folder

logger = logging.getLogger(__name__)

_PREFIX, _LOCK = "alignment-uploads-", ".lock"


class UploadFolder:
    """A folder for as long as this process lives; a context manager."""

    def __init__(self, base: Path | None = None) -> None:
        """Make it.

        Args:
            base: the folder it is made in; by default GRADIO_TEMP_DIR, else the system's temporary folder.

        Raises:
            OSError: when it cannot be made there.
        """
        self.base = Path(base or os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()).resolve()
        self.base.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = self._claim()
        self._before = os.environ.get("GRADIO_TEMP_DIR"), tempfile.tempdir, ""

    def __enter__(self) -> Self:
        """Let Gradio and all temporary files of this process use it, and delete folders of killed processes."""
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(self.path)
        self._before = (*self._before[:2], set_temp_folder(str(self.path)))
        self._remove_orphans()
        return self

    def __exit__(self, *error: object) -> None:
        """Delete it."""
        gradio, tempfile.tempdir, inside = self._before
        set_temp_folder(inside)
        if gradio is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = gradio
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _claim(self) -> tuple[Path, FileLock]:
        """Lock a new name, then make its folder; a process that removes orphans may take the lock first."""
        while True:
            path = self.base / f"{_PREFIX}{secrets.token_hex(8)}"
            lock = FileLock(f"{path}{_LOCK}", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            if os.path.exists(lock.lock_file):
                path.mkdir(mode=0o700)
                return path, lock
            lock.release()

    def _remove_orphans(self) -> None:
        for path in self.base.glob(f"{_PREFIX}*{_LOCK}"):
            try:
                with FileLock(path, timeout=0):
                    shutil.rmtree(path.with_name(path.name.removesuffix(_LOCK)), ignore_errors=True)
                    path.unlink(missing_ok=True)
                logger.info("Deleted the uploads of a process that was killed")
            except (Timeout, OSError):  # its process lives, another one deletes it, or it is another user's
                continue


def expire_files(folder: Path, seconds: float) -> int:
    """Delete files below a folder that were not read or written for so long, and folders that are empty by then.

    Returns:
        How many files were deleted.
    """
    deleted, limit = 0, time.time() - seconds
    for path in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):  # files before their folders
        try:
            status = path.lstat()
            if max(status.st_mtime, status.st_atime, status.st_ctime) > limit:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
                deleted += 1
        except OSError:  # it is gone, or not empty
            continue
    return deleted
