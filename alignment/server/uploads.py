"""Server, uploads: quotas for each client and all of them, and a folder of random name for each request.

Place in the flow: `POST upload -> receive_upload (here) -> a folder of random name -> alignment.ui.uploads`. Gradio's
own route stores a file under its hash: a client could find out whether another had sent a file, and two clients that
sent the same would share it, until the first one answered deleted it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from anyio.to_thread import run_sync
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message

from alignment.server.errors import ServiceError
from alignment.server.settings import Settings

UPLOADS, CLIENT = "alignment.uploads", "alignment.client"
"""Keys of the ASGI scope under which the middleware passes the quota and the client's address on."""

_MB = 2**20
_STEP = _MB  # bytes that are reserved ahead of what arrives: an announced size reserves nothing
_SPARE_MB = 200  # of the disk that stays free
_MAX_BATCHES = 10_000  # however small; they are counted at each upload
_MAX_FILES = 1000  # in a request
_MAX_NAME = 200  # bytes of a file's name on disk


def upload_folder() -> Path:
    """Return the folder that Gradio keeps uploads in: GRADIO_TEMP_DIR, or its default."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()


@dataclass
class UploadBatch:
    """The files of one request; `reserved` bytes have arrived or may arrive next."""

    client: str
    folder: Path
    announced: int
    reserved: int = 0
    files: int = 1
    complete: bool = False

    @property
    def is_consumed(self) -> bool:
        """Whether all files have been read and deleted."""
        return self.complete and not any(path.is_file() for path in self.folder.rglob("*"))


class UploadQuota:
    """Limits on the files that wait to be read, per client and in all."""

    def __init__(self, settings: Settings, max_file_mb: int = 100) -> None:
        """Make the quota.

        Args:
            settings: its limits.
            max_file_mb: of one file.
        """
        self.settings, self.max_file_mb = settings, max_file_mb
        self._batches: list[UploadBatch] = []

    def __len__(self) -> int:
        return len(self._batches)

    def collect_consumed(self) -> None:
        """Forget batches that have been read, with their empty folders."""
        for batch in [batch for batch in self._batches if batch.is_consumed]:
            self.discard(batch)

    def begin(self, client: str, announced: int) -> UploadBatch:
        """Admit a request; raises ServiceError where the quota is used up."""
        try:
            self._check(client, announced, is_new=True)
        except ServiceError:
            self.collect_consumed()
            self._check(client, announced, is_new=True)
        batch = UploadBatch(client, upload_folder() / secrets.token_urlsafe(16), announced)
        batch.folder.mkdir(parents=True, mode=0o700)
        self._batches.append(batch)
        return batch

    def reserve(self, batch: UploadBatch, arrived: int) -> None:
        """Count `arrived` bytes in all for a batch; raises ServiceError where that is too much."""
        if arrived > batch.reserved:
            more = max(arrived - batch.reserved, min(_STEP, batch.announced - batch.reserved))
            self._check(batch.client, more)
            batch.reserved += more

    def finish(self, batch: UploadBatch, sizes: list[int]) -> None:
        """Count the files that a request had; raises ServiceError where they are too many."""
        batch.files, batch.reserved, batch.complete = len(sizes), sum(sizes), True
        if batch.files > self.settings.client_files:
            raise self._waiting()

    def discard(self, batch: UploadBatch) -> None:
        """Forget a batch and delete its folder."""
        shutil.rmtree(batch.folder, ignore_errors=True)
        self._batches.remove(batch)

    def _check(self, client: str, more: int, *, is_new: bool = False) -> None:
        limits = self.settings
        files, sizes = Counter[str](), Counter[str]()
        for batch in self._batches:
            files[batch.client] += batch.files
            sizes[batch.client] += batch.reserved
        if (is_new and files[client] >= limits.client_files) or sizes[client] + more > limits.client_mb * _MB:
            raise self._waiting()
        upload_folder().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(upload_folder()).free - _SPARE_MB * _MB
        is_full = sizes.total() + more > limits.disk_mb * _MB or len(self._batches) > _MAX_BATCHES
        if is_full or more > free:
            raise ServiceError("service.full")

    def _waiting(self) -> ServiceError:
        return ServiceError("service.waiting", files=self.settings.client_files, limit=f"{self.settings.client_mb:g}")


async def receive_upload(request: Request) -> JSONResponse:
    """Store the files of a request, and answer with their paths as Gradio's own route does.

    A request with anything but whole files in fields called "files" is refused, and nothing of it stays.
    """
    quota: UploadQuota = request.scope[UPLOADS]
    announced = request.headers.get("content-length", "")
    batch = quota.begin(request.scope[CLIENT], int(announced) if announced.isdecimal() else 0)
    try:
        files = await _parse(Request(request.scope, _counted(request, quota, batch)))
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


async def _parse(request: Request) -> list[UploadFile]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ServiceError("upload.lost")
    form = await request.form(max_files=_MAX_FILES, max_fields=0)
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


def _counted(request: Request, quota: UploadQuota, batch: UploadBatch) -> Callable[[], Awaitable[Message]]:
    """Reserve room for what arrives, and refuse a body without its closing boundary, of which a file is cut off."""
    arrived, tail = 0, b""

    async def receive() -> Message:
        nonlocal arrived, tail
        message = await request.receive()
        body = message.get("body", b"")
        arrived, tail = arrived + len(body), (tail + body)[-4:]
        quota.reserve(batch, arrived)
        if message["type"] == "http.request" and not message.get("more_body") and not tail.rstrip().endswith(b"--"):
            raise ServiceError("upload.lost")
        return message

    return receive


def _root_cause(error: BaseException) -> str:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error)
