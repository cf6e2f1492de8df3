"""Server, uploads: a folder of this process alone, quotas for each client and all of them, and the upload route.

Place in the flow: `POST upload -> receive_upload (here) -> a folder of random name -> alignment.ui.uploads`. Gradio's
own route stores a file under its hash: a client could find out whether another had sent a file, and two clients that
sent the same would share it, until the first one answered deleted it.
"""

import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from anyio.to_thread import run_sync
from filelock import FileLock, Timeout
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message

from alignment.server.errors import ServiceError
from alignment.server.gradio_internals import set_temp_folder
from alignment.server.settings import Settings

logger = logging.getLogger(__name__)

CLIENT = "alignment.client"
"""Key of the ASGI scope under which the middleware passes the client's address on."""

_MB = 2**20
_SPARE_MB = 200  # of the disk that stays free
_MAX_BATCHES = 10_000  # however small
_MAX_FILES = 1000  # in a request
_MAX_NAME = 200  # bytes of a file's name on disk
_PREFIX, _LOCK = "alignment-uploads-", ".lock"


def upload_folder() -> Path:
    """Return the folder that Gradio keeps uploads in: GRADIO_TEMP_DIR, or its default."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()


# ---------------------------------------------------------------- the folder of this process


@contextmanager
def process_folder(base: Path | None = None) -> Iterator[Path]:
    """Make a folder of random name for Gradio and all temporary files of this process, and delete it at the end.

    It lies in `base`, else in GRADIO_TEMP_DIR or the system's temporary folder, and only this user may read it. Folders
    of processes that were killed are deleted first. A file lock, which the system releases with its process, tells them
    from those of living ones, across containers too. Raises OSError when it cannot be made there.
    """
    variable, temp = os.environ.get("GRADIO_TEMP_DIR"), tempfile.tempdir
    base = Path(base or variable or tempfile.gettempdir()).resolve()
    base.mkdir(parents=True, exist_ok=True)
    path, lock = _claim(base)
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(path)
    inside = set_temp_folder(str(path))
    _remove_orphans(base)
    try:
        yield path
    finally:
        set_temp_folder(inside)
        del os.environ["GRADIO_TEMP_DIR"]
        if variable is not None:
            os.environ["GRADIO_TEMP_DIR"] = variable
        tempfile.tempdir = temp
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _claim(base: Path) -> tuple[Path, FileLock]:
    """Lock a new name, then make its folder; a process that removes orphans may take the lock first."""
    while True:
        path = base / f"{_PREFIX}{secrets.token_hex(8)}"
        lock = FileLock(f"{path}{_LOCK}", timeout=0)
        with suppress(Timeout):
            lock.acquire()
            if os.path.exists(lock.lock_file):
                path.mkdir(mode=0o700)
                return path, lock
            lock.release()


def _remove_orphans(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*{_LOCK}"):
        with suppress(Timeout, OSError):  # its process lives, another one deletes it, or it is another user's
            with FileLock(path, timeout=0):
                shutil.rmtree(path.with_name(path.name.removesuffix(_LOCK)), ignore_errors=True)
                path.unlink(missing_ok=True)
            logger.info("Deleted the uploads of a process that was killed")


def expire_files(folder: Path, seconds: float) -> None:
    """Delete files below a folder that were not read or written for so long, and folders that are empty by then."""
    limit = time.time() - seconds
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
        with suppress(OSError):  # it is gone, or not empty
            status = path.lstat()
            if max(status.st_mtime, status.st_atime, status.st_ctime) <= limit:
                remove = path.rmdir if path.is_dir() and not path.is_symlink() else path.unlink
                remove()


# ---------------------------------------------------------------- quotas


@dataclass(eq=False)
class UploadBatch:
    """The files of one request, as far as they have arrived."""

    client: str
    folder: Path
    bytes: int = 0
    files: int = 1
    complete: bool = False


class UploadQuota:
    """Limits on the files that wait to be read, per client and in all; used in the server's event loop only."""

    def __init__(self, settings: Settings, max_file_mb: int = 100) -> None:
        self.settings, self.max_file_mb = settings, max_file_mb
        self._batches: list[UploadBatch] = []
        self._files, self._bytes = Counter[str](), Counter[str]()  # by client

    def __len__(self) -> int:
        return len(self._batches)

    def collect_consumed(self) -> None:
        """Forget batches that have been read, with their empty folders."""
        for batch in [batch for batch in self._batches if batch.complete]:
            if not any(path.is_file() for path in batch.folder.rglob("*")):
                self.discard(batch)
        self._files, self._bytes = +self._files, +self._bytes  # without clients that have nothing here

    def begin(self, client: str, announced: int) -> UploadBatch:
        """Admit a request that announces so many bytes; raises ServiceError where the quota is used up."""
        folder = upload_folder() / secrets.token_urlsafe(16)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._check(client, announced, is_new=True)
        except ServiceError:
            self.collect_consumed()
            self._check(client, announced, is_new=True)
        folder.mkdir(mode=0o700)
        batch = UploadBatch(client, folder)
        self._batches.append(batch)
        self._files[client] += batch.files
        return batch

    def count(self, batch: UploadBatch, arrived: int) -> None:
        """Count bytes that have arrived for a batch; raises ServiceError where that is too much."""
        batch.bytes += arrived
        self._bytes[batch.client] += arrived
        self._check(batch.client)

    def finish(self, batch: UploadBatch, sizes: list[int]) -> None:
        """Count the files that a request had; raises ServiceError where they are too many."""
        self.count(batch, sum(sizes) - batch.bytes)  # without the headers of the parts
        self._files[batch.client] += len(sizes) - batch.files
        batch.files, batch.complete = len(sizes), True
        if batch.files > self.settings.client_files:
            raise self._waiting()

    def discard(self, batch: UploadBatch) -> None:
        """Forget a batch and delete its folder."""
        shutil.rmtree(batch.folder, ignore_errors=True)
        self._batches.remove(batch)
        self._files[batch.client] -= batch.files
        self._bytes[batch.client] -= batch.bytes

    def _check(self, client: str, more: int = 0, *, is_new: bool = False) -> None:
        limits = self.settings
        has_many = is_new and self._files[client] >= limits.client_files
        if has_many or self._bytes[client] + more > limits.client_mb * _MB:
            raise self._waiting()
        is_full = self._bytes.total() + more > limits.disk_mb * _MB or len(self._batches) > _MAX_BATCHES
        if is_full or shutil.disk_usage(upload_folder()).free < more + _SPARE_MB * _MB:
            raise ServiceError("service.full")

    def _waiting(self) -> ServiceError:
        return ServiceError("service.waiting", files=self.settings.client_files, limit=f"{self.settings.client_mb:g}")


# ---------------------------------------------------------------- the route


async def receive_upload(quota: UploadQuota, request: Request) -> JSONResponse:
    """Store the files of a request, and answer with their paths as Gradio's own route does.

    A request with anything but whole files in fields called "files" is refused, and nothing of it stays.
    """
    announced = request.headers.get("content-length", "")
    batch = quota.begin(request.scope[CLIENT], int(announced) if announced.isdecimal() else 0)
    try:
        files = await _parse(request, quota, batch)
        paths = [await run_sync(_store, file, batch.folder, quota.max_file_mb) for file in files]
        quota.finish(batch, [path.stat().st_size for path in paths])
    except BaseException as error:
        quota.discard(batch)
        if isinstance(error, HTTPException):
            is_name = "header" in _root_cause(error).lower()  # the longest word of a part's header is the file's name
            raise ServiceError("upload.name" if is_name else "upload.lost") from error
        if isinstance(error, KeyError | ValueError | ClientDisconnect):
            raise ServiceError("upload.lost") from error
        raise
    return JSONResponse([str(path) for path in paths])


async def _parse(request: Request, quota: UploadQuota, batch: UploadBatch) -> list[UploadFile]:
    """Count what arrives; refuse all but files, and a body without its closing boundary, of which a file is cut off."""
    tail = b""

    async def receive() -> Message:
        nonlocal tail
        message = await request.receive()
        body = message.get("body", b"")
        tail = (tail + body)[-4:]
        quota.count(batch, len(body))
        if message["type"] == "http.request" and not message.get("more_body") and not tail.rstrip().endswith(b"--"):
            raise ServiceError("upload.lost")
        return message

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ServiceError("upload.lost")
    form = await Request(request.scope, receive).form(max_files=_MAX_FILES, max_fields=0)
    files = [part for name, part in form.multi_items() if name == "files" and isinstance(part, UploadFile)]
    if not files or len(files) != len(form.multi_items()):
        await form.close()
        raise ServiceError("upload.lost")
    return files


def _store(file: UploadFile, folder: Path, max_mb: int) -> Path:
    """Write a parsed file into a folder of its own; raises ServiceError where it is too large."""
    with file.file as source:
        if (file.size or 0) > max_mb * _MB:
            raise ServiceError("upload.size", limit=f"{max_mb:g}")
        path = folder / secrets.token_hex(4) / _safe_name(file.filename or "")
        path.parent.mkdir()
        with path.open("xb") as target:
            shutil.copyfileobj(source, target)
    return path


def _safe_name(name: str) -> str:
    """Return a name that any file system takes, with the suffix of the client's name."""
    cleaned = re.sub(r"[^\w.,() -]", "", PurePosixPath(name.replace("\\", "/")).name).strip(". ")
    return cleaned.encode()[-_MAX_NAME:].decode(errors="ignore") or "upload"


def _root_cause(error: BaseException) -> str:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error)
