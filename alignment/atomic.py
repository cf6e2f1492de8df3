"""Floor 1: write files atomically and lock a folder for one writer.

Place in the flow: below every module that writes files. A file is written under a temporary name, flushed to the disk
and renamed, so that a name always stands for a complete file, also after a kill or a power cut.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMP_PREFIX = ".writing-"  # of the names of files that are being written; readers ignore them
LOCK = ".lock"  # name of the lock file in a folder; it holds process, host and time as JSON


@contextmanager
def atomic_write(path: Path, *, fsync: bool = True) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` at the end; after an error nothing has changed.

    With `fsync` it survives a power cut as well, which takes some milliseconds.
    """
    temp = path.with_name(TEMP_PREFIX + secrets.token_hex(8))
    try:
        temp.touch()
        mode = temp.stat().st_mode  # of the user's umask; safetensors writes 0600
        yield temp
        temp.chmod(mode)
        if fsync:
            fsync_path(temp)
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    if fsync:
        fsync_path(path.parent)


def write_file(path: Path, content: bytes | str, *, fsync: bool = True) -> None:
    """Write a file atomically and make its parent folders; text is UTF-8. See `atomic_write`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, fsync=fsync) as temp:
        # surrogateescape: a file name in the text need not be UTF-8
        temp.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def fsync_path(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot flush folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale_temp(folder: Path, age: float = 3600) -> None:
    """Delete temporary files that killed processes left behind at least `age` seconds ago."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


@contextmanager
def exclusive_lock(folder: Path, *, timeout: float = 0) -> Iterator[None]:
    """Hold the write lock of a folder, which is created if needed; the end of the process releases it.

    Waits `timeout` seconds, or for ever if negative; then BlockingIOError that names the process that holds it.
    """
    from filelock import FileLock, Timeout

    new, path = not folder.exists(), folder / LOCK
    lock = FileLock(path, timeout=timeout)
    try:
        while not lock.is_locked:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process removed the empty folder in between
                lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError, ValueError, TypeError, KeyError):
            holder = " ({process} on {host}, since {since})".format_map(json.loads(path.read_text("utf-8")))
        text = f"Another process{holder} is writing to {folder} now: wait until it is done, or choose another folder."
        raise BlockingIOError(text) from None
    try:
        with suppress(OSError):  # a full disk
            since = time.strftime("%Y-%m-%d %H:%M:%S%z")
            path.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}), "utf-8")
        yield
    finally:
        with suppress(OSError):  # before the release: a waiting process notices that the file is gone
            path.unlink()
        lock.release()
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()
