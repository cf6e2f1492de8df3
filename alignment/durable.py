"""Write files so that neither a kill nor a power cut leaves half of one; let one process at a time write to a folder.

Place in the flow: under everything that keeps something. A file is written under another name, is on the disk before
it gets its own, and the folder is told to the disk as well. What stands behind a name is therefore always whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

ASIDE = ".writing-"
"""How the names of files begin that are being written; nobody reads these."""

LOCK = ".lock"
"""Name of the file that says who writes to a folder."""

_SEAL = "sha256"
_LEFT_BEHIND = 3600.0  # seconds after which a file that is being written counts as left behind
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_ROOM = 16 * 2**20  # bytes: PyTorch does not say why it could not write
_WRITING = re.compile(r"writ|inline_container|iostream")  # in what PyTorch and faiss say of a file they could not write
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


# ---------------------------------------------------------------- one file, one folder


@contextmanager
def put_in_place(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """Give a name to write to, whose file takes the place of `path` in the end; after an error nothing has changed.

    Args:
        path: what is to be written.
        lasting: whether it has to survive a power cut too; that takes some milliseconds.
    """
    fresh = path.with_name(ASIDE + secrets.token_hex(8))
    try:
        yield fresh
        open_up(fresh)
        if lasting:
            sync(fresh)
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    if lasting:
        sync(path.parent)


def open_up(path: Path) -> None:
    """Let those read a new file whom the user's umask lets; safetensors writes for its owner alone."""
    path.chmod(_mode())


@cache
def _mode() -> int:
    mask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(mask)
    return 0o666 & ~mask


def write_file(path: Path, content: bytes | str, *, lasting: bool = True) -> None:
    """Write a file whole, with the folders around it; text as UTF-8. See `put_in_place`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with put_in_place(path, lasting=lasting) as fresh:
        # surrogateescape: the name of a file need not be UTF-8
        fresh.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON that vouches for itself."""
    content = json.loads(json.dumps(content))  # as it will be read
    write_file(path, json.dumps({**content, _SEAL: _digest(content)}, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        OSError: when there is no such file, or it cannot be read.
        ValueError: when it is not as it was written.
    """
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict) or content.pop(_SEAL, "") != _digest(content):
        raise ValueError("its content is not what was written")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make sure that a file, or which names a folder holds, survives a power cut."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return  # Windows knows no such thing
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make sure of everything below a folder, and of the folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def sweep(folder: Path, age: float = _LEFT_BEHIND) -> None:
    """Delete what somebody who was killed left half-written, and so many seconds have passed over."""
    for path in folder.glob(f"{ASIDE}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < age:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------- one writer


@contextmanager
def sole_writer(folder: Path, *, patience: float = 0) -> Iterator[None]:
    """Keep others from writing to a folder, which is made if need be; ends with the process, however that ends.

    Args:
        folder: in which the file `.lock` lies meanwhile.
        patience: seconds to wait for somebody else.

    Raises:
        BlockingIOError: when another process writes to it, saying which.
    """
    from filelock import FileLock, Timeout

    new = not folder.exists()
    path = folder / LOCK
    lock = FileLock(path, timeout=patience)
    while not lock.is_locked:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"{_holder(path)} is writing to {folder} now: wait until it is done, or choose another folder."
            ) from None
        except FileNotFoundError:  # somebody took the empty folder away just now
            continue
    try:
        with suppress(OSError):  # a full disk
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            path.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}), "utf-8")
        yield
    finally:
        with suppress(OSError):  # before it is released: whoever waits for this file notices that it is gone
            path.unlink()
        lock.release()
        if new:
            with suppress(OSError):  # it stays unless it is empty
                folder.rmdir()


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text("utf-8"))
        return f"Another process ({about['process']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "Another process"


# ---------------------------------------------------------------- what went wrong


@contextmanager
def foreign_errors(path: Path) -> Iterator[None]:
    """Turn what other libraries raise where a file cannot be written into an `OSError` that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not _WRITING.search(text):
            raise
        code = _code_in(text, path)
        raise OSError(code, os.strerror(code), str(path)) from error


def _code_in(text: str, path: Path) -> int:
    if found := _RUST_ERRNO.search(text):
        return int(found[1])
    full = shutil.disk_usage(path.parent).free < _NO_ROOM
    told = (code for code in (*_FULL, *_FORBIDDEN) if os.strerror(code) in text)
    return next(told, errno.ENOSPC if full else errno.EIO)


def explain(error: Exception, again: str = "run the same command again") -> str:
    """Say what went wrong and, if it was with a file, what mends it, for the person who typed the command."""
    if not isinstance(error, OSError):
        return str(error)
    place = error.filename2 or error.filename
    if error.errno in _FULL:
        where = f" where {place} lies" if place else ""
        return (
            f"There is no room left{where}: free some, or choose another folder, and {again}. What was "
            "there before is as it was."
        )
    if error.errno in _FORBIDDEN and place:
        return f"{place} may not be read or written ({error.strerror}): change its permissions, or choose another one."
    if error.errno in _IN_THE_WAY and place:
        return f"{place} is in the way ({error.strerror}): move it, or choose another folder, and {again}."
    return str(error)
