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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from anyio.to_thread import run_sync
from filelock import FileLock, Timeout
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive

from alignment.server.errors import ServiceError
from alignment.server.gradio_internals import temp_folder
from alignment.server.middleware import GUARDED
from alignment.server.settings import Settings

logger = logging.getLogger(__name__)

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
    base = Path(base or os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()).resolve()
    base.mkdir(parents=True, exist_ok=True)
    path = base / f"{_PREFIX}{secrets.token_hex(8)}"
    lock_file = Path(f"{path}{_LOCK}")
    with ExitStack() as stack:
        stack.callback(lock_file.unlink, missing_ok=True)
        stack.enter_context(FileLock(lock_file))  # before the folder, or another process could take it for an orphan
        path.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        _remove_orphans(base)
        stack.enter_context(temp_folder(str(path)))
        yield path


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
    files: int = 0
    complete: bool = False


class UploadQuota:
    """Limits on the files that wait to be read, per client and in all; used in the server's event loop only."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._batches = settings, list[UploadBatch]()
        self._files, self._bytes = Counter[str](), Counter[str]()  # by client

    def __len__(self) -> int:
        return len(self._batches)

    @contextmanager
    def batch(self, client: str, announced: int) -> Iterator[UploadBatch]:
        """Admit a request that announces so many bytes; nothing of it stays if it fails.

        Raises:
            ServiceError: where the quota is used up.
        """
        batch = UploadBatch(client, upload_folder() / secrets.token_urlsafe(16))
        batch.folder.parent.mkdir(parents=True, exist_ok=True)
        self._check(client, 1, announced)
        batch.folder.mkdir(mode=0o700)
        self._batches.append(batch)
        self._add(batch, 1, 0)
        try:
            yield batch
            batch.complete = True
        except BaseException:
            self._discard(batch)
            raise

    def count(self, batch: UploadBatch, files: int, bytes: int) -> None:
        """Count what has arrived for a batch; raises ServiceError where that is too much."""
        self._check(batch.client, files, bytes)
        self._add(batch, files, bytes)

    def collect_consumed(self) -> None:
        """Forget batches that have been read, with their empty folders."""
        for batch in [batch for batch in self._batches if batch.complete]:
            if not any(path.is_file() for path in batch.folder.rglob("*")):
                self._discard(batch)
        self._files, self._bytes = +self._files, +self._bytes  # without clients that have nothing here

    def _discard(self, batch: UploadBatch) -> None:
        shutil.rmtree(batch.folder, ignore_errors=True)
        self._batches.remove(batch)
        self._add(batch, -batch.files, -batch.bytes)

    def _add(self, batch: UploadBatch, files: int, bytes: int) -> None:
        batch.files, batch.bytes = batch.files + files, batch.bytes + bytes
        self._files[batch.client] += files
        self._bytes[batch.client] += bytes

    def _check(self, client: str, files: int, bytes: int) -> None:
        if self._refusal(client, files, bytes):
            self.collect_consumed()
            if refusal := self._refusal(client, files, bytes):
                raise refusal

    def _refusal(self, client: str, files: int, bytes: int) -> ServiceError | None:
        """Return why so much more of a client has no room."""
        limits = self._settings
        if self._files[client] + files > limits.client_files or self._bytes[client] + bytes > limits.client_mb * _MB:
            return ServiceError("service.waiting", files=limits.client_files, limit=f"{limits.client_mb:g}")
        is_full = self._bytes.total() + bytes > limits.disk_mb * _MB or len(self._batches) > _MAX_BATCHES
        if is_full or shutil.disk_usage(upload_folder()).free < bytes + _SPARE_MB * _MB:
            return ServiceError("service.full")
        return None


# ---------------------------------------------------------------- the route


async def receive_upload(quota: UploadQuota, max_file_mb: int, request: Request) -> JSONResponse:
    """Store the files of a request, and answer with their paths as Gradio's own route does.

    A request with anything but whole files in fields called "files" is refused, and nothing of it stays.
    """
    with quota.batch(request.scope[GUARDED].client, int(request.headers.get("content-length", 0))) as batch:
        counted = Request(request.scope, _counting(request, quota, batch))
        try:
            async with counted.form(max_files=_MAX_FILES, max_fields=0) as form:
                files = [part for name, part in form.multi_items() if name == "files" and isinstance(part, UploadFile)]
                if not files or len(files) != len(form.multi_items()):
                    raise ServiceError("upload.lost")
                sizes = [file.size or 0 for file in files]
                if max(sizes) > max_file_mb * _MB:
                    raise ServiceError("upload.size", limit=f"{max_file_mb:g}")
                quota.count(batch, len(sizes) - batch.files, sum(sizes) - batch.bytes)  # without the parts' headers
                paths = [await run_sync(_store, file, batch.folder) for file in files]
        except ServiceError:
            raise
        except (HTTPException, KeyError, ValueError, ClientDisconnect) as error:
            cause = str(getattr(error.__context__, "__cause__", None))  # what the parser said
            is_name = "header" in cause.lower()  # the longest word of a part's header is the file's name
            raise ServiceError("upload.name" if is_name else "upload.lost") from error
    return JSONResponse([str(path) for path in paths])


def _counting(request: Request, quota: UploadQuota, batch: UploadBatch) -> Receive:
    """Count what arrives of a body, and refuse one without its closing boundary, of which a file is cut off."""
    tail = b""

    async def receive() -> Message:
        nonlocal tail
        message = await request.receive()
        body = message.get("body", b"")
        tail = (tail + body)[-4:]
        quota.count(batch, 0, len(body))
        if message["type"] == "http.request" and not message.get("more_body") and not tail.rstrip().endswith(b"--"):
            raise ServiceError("upload.lost")
        return message

    return receive


def _store(file: UploadFile, folder: Path) -> Path:
    """Write a parsed file into a folder of its own, under a name that any file system takes, with its suffix."""
    name = re.sub(r"[^\w.,() -]", "", re.split(r"[/\\]", file.filename or "")[-1]).strip(". ")
    path = folder / secrets.token_hex(4) / (name.encode()[-_MAX_NAME:].decode(errors="ignore") or "upload")
    path.parent.mkdir()
    with path.open("xb") as target:
        shutil.copyfileobj(file.file, target)
    return path
