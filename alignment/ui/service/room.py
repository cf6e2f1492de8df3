"""Top floor, how uploads come in: so many of each address and of all, each to where only its sender can find it.

Place in the flow: `POST upload -> upload (here) -> a folder of random name -> alignment.ui.uploads`. Gradio itself puts
a file where its content says: whoever knew a file could find out whether somebody had sent it, and two who sent the
same shared one file, which the first to be answered deleted.
"""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from anyio.to_thread import run_sync
from gradio import route_utils
from gradio.route_utils import GradioMultiPartParser, MultiPartException, upload_fn
from gradio.utils import get_upload_folder
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive

from alignment.engine import MAX_ZIP_MB
from alignment.ui.service.refusals import Refusal, bad_upload, file_too_large, name_too_long, no_space, too_many_files
from alignment.ui.service.settings import Settings

UPLOAD_ROUTE = "/gradio_api/upload"
ROOM, CLIENT = "alignment.room", "alignment.client"
"""Under which names the door puts them into the scope of a request."""

_MB = 2**20
_PIECE = _MB  # of an upload, for which place is made as it arrives: who announces much has nothing of it yet
_SPARE_MB = 200  # of the disk that is not ours to fill
_LOTS = 10_000  # requests whose files lie here, however small; they are counted at each upload


@dataclass
class _Lot:
    """What came in one request, or is about to; `size` is what is there, and a piece more."""

    client: str
    folder: Path
    announced: int
    size: int = 0
    files: int = 1
    complete: bool = False

    @property
    def gone(self) -> bool:
        """Whether it has been read, and deleted."""
        return self.complete and not any(path.is_file() for path in self.folder.rglob("*"))


class _OnlyFiles(GradioMultiPartParser):
    """Gradio's reader of uploads, but it takes whole files called "files", or refuses.

    Gradio keeps a field that is no file in memory, however long, and other files on the disk, which nobody asks for.
    """

    def on_headers_finished(self) -> None:
        """Begin a part."""
        super().on_headers_finished()
        if self._current_part.file is None or self._current_part.field_name != "files":
            raise MultiPartException("There is something beside the files.")

    async def parse(self) -> FormData:
        """Read all parts; whatever goes wrong, no file stays open."""
        try:
            form = await super().parse()
            if len(self._files_to_close_on_error) != len(form.getlist("files")) or not form:
                raise MultiPartException("A file is cut off, or there is none.")
            return form
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
            raise


class Room:
    """Who has how much lying here. Looked over only where it seems to be too much: who reads an upload deletes it."""

    def __init__(self, settings: Settings) -> None:
        route_utils.GradioMultiPartParser = _OnlyFiles  # type: ignore[misc]  # `upload_fn` asks for no other
        self._settings = settings
        self._lots: list[_Lot] = []

    def tidy(self) -> None:
        """Forget what has been read, with its empty folders."""
        for lot in [lot for lot in self._lots if lot.gone]:
            self._lots.remove(lot)
            shutil.rmtree(lot.folder, ignore_errors=True)

    def enter(self, client: str, announced: int) -> _Lot:
        """Make place for an upload.

        Raises:
            Refusal: where there is none.
        """
        try:
            self._check(client, announced, is_new=True)
        except Refusal:
            self.tidy()
            self._check(client, announced, is_new=True)
        lot = _Lot(client, Path(get_upload_folder()) / secrets.token_urlsafe(16), announced)
        lot.folder.mkdir(parents=True, mode=0o700)
        self._lots.append(lot)
        return lot

    def grow(self, lot: _Lot, arrived: int) -> None:
        """Let an upload become as large as it is; Refusal where that is too much."""
        if arrived > lot.size:
            more = max(arrived - lot.size, min(_PIECE, lot.announced - lot.size))
            self._check(lot.client, more)
            lot.size += more

    def leave(self, lot: _Lot) -> None:
        """Forget an upload that came to nothing."""
        shutil.rmtree(lot.folder, ignore_errors=True)
        self._lots.remove(lot)

    def _check(self, client: str, more: int, *, is_new: bool = False) -> None:
        limits = self._settings
        files, sizes = Counter[str](), Counter[str]()
        for lot in self._lots:
            files[lot.client] += lot.files
            sizes[lot.client] += lot.size
        many = is_new and files[client] >= limits.client_files
        if many or sizes[client] + more > limits.client_mb * _MB:
            raise too_many_files(limits.client_files, limits.client_mb)
        free = shutil.disk_usage(get_upload_folder()).free
        full = sizes.total() + more > limits.disk_mb * _MB or len(self._lots) > _LOTS
        if full or more > free - _SPARE_MB * _MB:
            raise no_space()


async def upload(request: Request) -> JSONResponse:
    """Take files as Gradio's own route does, and answer where they lie."""
    room: Room = request.scope[ROOM]
    announced = request.headers.get("content-length", "")
    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    lot = room.enter(request.scope[CLIENT], int(announced) if announced.isdecimal() else 0)
    async with _kept_if_whole(room, lot):
        counted = Request(request.scope, _counting(request, room, lot))
        # Nobody is told how far it is: Gradio would remember every name it was ever asked for.
        paths, staying, places = await upload_fn(counted, str(lot.folder), MAX_ZIP_MB * _MB, None, force_move=False)
        for source, target in zip(staying, places, strict=True):
            await run_sync(shutil.move, source, target)
        lot.files, lot.size = len(paths), sum(Path(path).stat().st_size for path in paths)
        if lot.files > room._settings.client_files:
            raise too_many_files(room._settings.client_files, room._settings.client_mb)
    return JSONResponse(paths)


@asynccontextmanager
async def _kept_if_whole(room: Room, lot: _Lot) -> AsyncIterator[None]:
    """Delete what has arrived of an upload that is refused or breaks off."""
    try:
        yield
    except BaseException as error:
        room.leave(lot)
        if isinstance(error, MultiPartException):
            if "header" in error.message.lower():  # of a part: its longest word is the file's name
                raise name_too_long() from error
            raise (file_too_large(MAX_ZIP_MB) if "size" in error.message else bad_upload()) from error
        if isinstance(error, HTTPException | KeyError | FormParserError | UnicodeError | ClientDisconnect):
            raise bad_upload() from error
        raise
    lot.complete = True


def _counting(request: Request, room: Room, lot: _Lot) -> Receive:
    arrived = 0

    async def receive() -> Message:
        nonlocal arrived
        message = await request.receive()
        arrived += len(message.get("body", b""))
        room.grow(lot, arrived)
        return message

    return receive
