"""Server, uploads: a folder of this process alone, quotas for each client and all of them, and the upload route.

Place in the flow: `POST upload -> receive_upload (here) -> a folder of random name -> alignment.ui.uploads`. Gradio's
own route stores a file under its hash: a client could find out whether another had sent a file, and two clients that
sent the same would share it, until the first one answered deleted it.
"""

import logging
import math
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
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync
from filelock import FileLock, Timeout
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from alignment.server.errors import ServiceError
from alignment.server.gradio_internals import temp_folder
from alignment.server.middleware import GUARDED, GuardedRequest
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


@contextmanager
def process_folder() -> Iterator[Path]:
    """Make a folder of random name for Gradio and all temporary files of this process, and delete it at the end.

    It lies in GRADIO_TEMP_DIR or the system's temporary folder, and only this user may read it. Folders of processes
    that were killed are deleted first. A file lock, which the system releases with its process, tells them from those
    of living ones, across containers too. Raises OSError when it cannot be made there.
    """
    base = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()).resolve()
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


@dataclass(eq=False)
class UploadBatch:
    """The files of one request, as far as they have arrived."""

    client: str
    folder: Path
    bytes: int = 0
    files: int = 0
    received_at: float = math.inf  # when the last of them had arrived


class UploadQuota:
    """Limits on the files that wait to be read, per client and in all; used in the server's event loop only."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self.batches = settings, list[UploadBatch]()
        self._files, self._bytes = Counter[str](), Counter[str]()  # by client

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
        self.batches.append(batch)
        self._add(batch, 1, 0)
        try:
            yield batch
            batch.received_at = time.monotonic()
        except BaseException:
            self._discard(batch)
            raise

    def count(self, batch: UploadBatch, files: int, bytes: int) -> None:
        """Count what has arrived for a batch; raises ServiceError where that is too much."""
        self._check(batch.client, files, bytes)
        self._add(batch, files, bytes)

    def collect(self, max_age_s: float = math.inf) -> None:
        """Forget batches that have been read, and delete those that have waited for longer."""
        for batch in [batch for batch in self.batches if batch.received_at < math.inf]:
            is_read = not any(files for _, _, files in os.walk(batch.folder))  # its reader deletes meanwhile
            if is_read or time.monotonic() - batch.received_at > max_age_s:
                self._discard(batch)
        self._files, self._bytes = +self._files, +self._bytes  # without clients that have nothing here

    def _discard(self, batch: UploadBatch) -> None:
        shutil.rmtree(batch.folder, ignore_errors=True)
        self.batches.remove(batch)
        self._add(batch, -batch.files, -batch.bytes)

    def _add(self, batch: UploadBatch, files: int, bytes: int) -> None:
        batch.files, batch.bytes = batch.files + files, batch.bytes + bytes
        self._files[batch.client] += files
        self._bytes[batch.client] += bytes

    def _check(self, client: str, files: int, bytes: int) -> None:
        if self._refusal(client, files, bytes):
            self.collect()
            if refusal := self._refusal(client, files, bytes):
                raise refusal

    def _refusal(self, client: str, files: int, bytes: int) -> ServiceError | None:
        """Return why so much more of a client has no room."""
        limits = self._settings
        if self._files[client] + files > limits.client_files or self._bytes[client] + bytes > limits.client_mb * _MB:
            return ServiceError("service.waiting", files=limits.client_files, limit=f"{limits.client_mb:g}")
        is_full = self._bytes.total() + bytes > limits.disk_mb * _MB or len(self.batches) > _MAX_BATCHES
        if is_full or shutil.disk_usage(upload_folder()).free < bytes + _SPARE_MB * _MB:
            return ServiceError("service.full")
        return None


async def receive_upload(quota: UploadQuota, max_file_mb: int, request: Request) -> JSONResponse:
    """Store the files of a request, and answer with their paths as Gradio's own route does.

    A request with anything but whole files in fields called "files" is refused, and nothing of it stays.
    """
    guarded: GuardedRequest = request.scope[GUARDED]
    with quota.batch(guarded.client, int(request.headers.get("content-length", 0))) as batch:
        guarded.count_upload = partial(quota.count, batch, 0)
        try:
            async with request.form(max_files=_MAX_FILES, max_fields=0) as form:
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


def _store(file: UploadFile, folder: Path) -> Path:
    """Write a parsed file into a folder of its own, under a name that any file system takes, with its suffix."""
    name = re.sub(r"[^\w.,() -]", "", re.split(r"[/\\]", file.filename or "")[-1]).strip(". ")
    path = folder / secrets.token_hex(4) / (name.encode()[-_MAX_NAME:].decode(errors="ignore") or "upload")
    path.parent.mkdir()
    with path.open("xb") as target:
        shutil.copyfileobj(file.file, target)
    return path
