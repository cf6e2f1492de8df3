"""UI, uploads: files from the visitor's device are read once and then deleted; what the area for them shows.

Place in the flow: `event of drop.js -> Upload -> bytes (here) -> engine`; `add_uploads` fills a photo collection, and
`*_value` lay the area out.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from alignment.engine import MAX_ZIP_MB, AlignmentEngine, Photos, Skipped
from alignment.engine.photo_zip import Added, add_archive
from alignment.gallery import Picture
from alignment.model import chunk_size
from alignment.preprocess import InputError, sanitize_text
from alignment.server.errors import ServiceError
from alignment.server.page import MAX_PATH
from alignment.server.sessions import Immutable
from alignment.server.uploads import upload_folder
from alignment.ui.strings import count_text, error_text, labels, text
from alignment.ui.widgets import Value, user_errors

logger = logging.getLogger(__name__)

MAX_FILE_MB = 30
MAX_NAME = 120
CHUNK = 4  # pictures between two signs of progress
SHOWN_PROBLEMS, MAX_SKIPPED_NAME = 10, 200

_serial = count()  # the page redraws on a new value only, also when the same file is wrong twice


@dataclass(frozen=True)
class Upload:
    """One file as the page announced it."""

    name: str
    path: str = ""  # where the server put it
    problem: str = ""  # why it did not arrive


@dataclass(frozen=True)
class PhotoState(Immutable):
    """A photo collection in the visitor's session."""

    photos: Photos
    sample: bool = True  # whether these are the page's own pictures
    added: int = 0  # how many came last
    skipped: tuple[Skipped, ...] = ()  # what was left out then

    def name(self, picture: Picture, lang: str) -> str:
        """Return what a picture is called: the visitor's by its file's name."""
        return (picture.caption(lang) if self.sample else picture.source) or picture.id


def uploads_of(sent: Mapping[str, Any]) -> list[Upload]:
    """Parse the untrusted event "files" of `drop.js`."""
    files = sent.get("files")
    uploads = []
    for file in files if isinstance(files, list) else []:
        if isinstance(file, dict):
            name, path, problem = (str(file.get(key) or "") for key in ("name", "path", "problem"))
            uploads.append(Upload(sanitize_text(name, MAX_NAME) or "?", path, problem))
    return uploads


def read_upload(upload: Upload, limit: int) -> bytes:
    """Read an upload. Raises InputError when it is not there, or too large."""
    try:
        return upload_path(upload, limit).read_bytes()
    except OSError as error:
        raise ServiceError("upload.lost") from error


def upload_path(upload: Upload, limit: int = 1, limit_mb: int = MAX_FILE_MB) -> Path:
    """Find the file of an upload. Raises InputError when it is not there, or too large.

    The page checks the limits of files and of megabytes too, but a program may pose as the page.
    """
    if upload.problem == "limit":
        raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=limit)
    if upload.problem.startswith("refused."):
        raise _refusal(upload.problem.removeprefix("refused."))
    if upload.problem == "empty":
        raise InputError("The file is empty; choose one with a picture in it.", "image.empty")
    try:
        size = limit_mb * 2**20 + 1 if upload.problem == "size" else _path(upload).stat().st_size
    except (OSError, ValueError) as error:
        raise ServiceError("upload.lost") from error
    if size > limit_mb * 2**20:
        raise InputError("The file has more than {limit} MB; make it smaller.", "upload.size", limit=limit_mb)
    return _path(upload)


def _refusal(code: str) -> InputError:
    """Return the error of an upload that the service refused; the page reports only its code."""
    if code == "rate":
        return InputError("Too many requests from your address; try again in a minute.", "upload.rate")
    if code == "waiting":
        return InputError("There are too many files from your address waiting; try again soon.", "upload.waiting")
    known = map(ServiceError, ("upload.name", "service.open", "service.full", "service.stopping", "service.slow"))
    return next((error for error in known if error.word == code), ServiceError("upload.lost"))


def delete_uploads(uploads: Sequence[Upload]) -> None:
    """Delete the files of uploads that have been dealt with."""
    for upload in uploads:
        try:
            _path(upload).unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            logger.debug("Nothing to delete: %s", error)


def _path(upload: Upload) -> Path:
    """Find the file of an upload; ValueError for a path outside the upload folder."""
    if not 0 < len(upload.path) <= MAX_PATH:  # to resolve a very long one takes minutes
        raise ValueError("not an upload")
    folder, path = upload_folder(), Path(upload.path).resolve()
    if path == folder or not path.is_relative_to(folder):
        raise ValueError("not an upload")
    return path


def add_uploads(
    engine: AlignmentEngine,
    state: PhotoState,
    uploads: Sequence[Upload],
    limit: int,
    *,
    zips: bool = False,
    more: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[PhotoState, int, int]]:
    """Add uploads to a collection a few at a time, then delete them; the visitor's first pictures replace the sample.

    `limit` is that of the whole collection; with `zips`, zip files are opened; with `more`, these files are a further
    part of the last ones and counted with them. Yields the collection so far, how many files have been dealt with, and
    of how many; first unchanged, with 0.
    """
    state = state if more else replace(state, added=0, skipped=())
    photos = engine.no_photos(both=state.photos.second_embeds is not None) if state.sample else state.photos
    before, skipped = len(photos) - state.added, state.skipped
    try:
        yield state, 0, max(len(uploads), 1)
        for step in _steps(engine, photos, uploads, limit, zips):
            skipped += tuple(step.skipped)
            own = PhotoState(step.photos, False, len(step.photos) - before, skipped)
            # The sample stays where no file was good.
            yield own if len(step.photos) else replace(state, skipped=skipped), step.done, step.total
            if stopped():
                return
    finally:
        delete_uploads(uploads)  # not earlier: the server stores two equal files as one


def _steps(
    engine: AlignmentEngine, photos: Photos, uploads: Sequence[Upload], limit: int, zips: bool
) -> Iterator[Added]:
    archives = [upload for upload in uploads if zips and upload.name.lower().endswith(".zip")]
    pictures = [upload for upload in uploads if upload not in archives]
    size = chunk_size(CHUNK)
    for start in range(0, len(pictures), size):
        chunk = pictures[start : start + size]
        photos, skipped = _add_pictures(engine, photos, chunk, limit)
        yield Added(photos, skipped, start + len(chunk), len(uploads))
    for upload in archives:
        try:
            with user_errors():
                for step in add_archive(engine, photos, upload_path(upload, limit, MAX_ZIP_MB), limit=limit):
                    photos = step.photos
                    yield step
        except InputError as error:
            yield Added(photos, [Skipped(upload.name, error)], 1, 1)


def _add_pictures(
    engine: AlignmentEngine, photos: Photos, uploads: Sequence[Upload], limit: int
) -> tuple[Photos, list[Skipped]]:
    files: list[tuple[str, bytes]] = []
    skipped: list[Skipped] = []
    for upload in uploads:
        try:
            files.append((upload.name, read_upload(upload, limit)))
        except InputError as error:
            skipped.append(Skipped(upload.name, error))
    try:
        with user_errors():
            photos, refused = engine.add_photos(photos, files, limit=limit)
    except InputError as error:
        refused = [Skipped(name, error) for name, _ in files]
    return photos, skipped + refused


@dataclass
class Job:
    """Requests to an upload that is being processed, which checks them between two steps."""

    stopped: bool = False
    removed: set[str] = field(default_factory=set)  # ids of photos to leave out


class Jobs:
    """The running jobs, one for each session."""

    def __init__(self) -> None:
        self._jobs: dict[str | None, Job] = {}

    @contextmanager
    def start(self, session: str | None) -> Iterator[Job]:
        """Register a job for as long as it runs."""
        job = self._jobs[session] = Job()
        try:
            yield job
        finally:
            if self._jobs.get(session) is job:
                del self._jobs[session]

    def stop(self, request: gr.Request) -> None:
        """Let the session's job end early."""
        self.of(request.session_hash).stopped = True

    def of(self, session: str | None) -> Job:
        """Return the session's job; a new one, without effect, if there is none."""
        return self._jobs.get(session, Job())


def drop_value(lang: str, title: str, *, max_files: int = 1, **more: Any) -> Value:
    """Lay the area out; `more` replaces or adds to its value."""
    many = max_files > 1
    return {
        "serial": next(_serial),
        "title": title,
        "how": text(lang, "drop.how.many" if many else "drop.how"),
        "many": many,
        "maxFiles": max_files,
        "maxBytes": MAX_FILE_MB * 2**20,
        "labels": labels(lang, "drop."),
        **more,
    }


def photos_drop_value(
    lang: str, title: str, state: PhotoState, max_files: int, busy: tuple[int, int] | None = None
) -> Value:
    """Lay the area of a photo collection out, `busy` with files (done, of how many) or with the outcome of the last."""
    if busy:
        done, total = busy
        progress = {"done": done, "total": total, "text": text(lang, "drop.reading", done=done, total=total)}
        return drop_value(lang, title, max_files=max_files, progress=progress)
    status = count_text(lang, "drop.added", state.added) if state.added else ""
    skipped = skipped_value(lang, state.skipped, SHOWN_PROBLEMS)
    return drop_value(lang, title, max_files=max_files, status=status, **skipped)


def skipped_value(lang: str, skipped: Sequence[Skipped], most: int) -> Value:
    """Name files that were left out, `most` of them, and count the rest."""
    shown = [[sanitize_text(skip.name, MAX_SKIPPED_NAME), error_text(lang, skip.error)] for skip in skipped[:most]]
    if rest := len(skipped) - len(shown):
        shown.append(["…", text(lang, "drop.more", count=rest)])
    return {"skippedTitle": count_text(lang, "drop.skipped", len(skipped)) if skipped else "", "skipped": shown}


def parts_value(batch: int, run: int) -> Value:
    """Let the area send files in parts of `batch`, which it can stop; `run` is the last part that was dealt with."""
    return {"batch": batch, "run": run, "maxZipBytes": MAX_ZIP_MB * 2**20}


def part_of(sent: Mapping[str, Any]) -> tuple[int, bool]:
    """Parse the number of the part that the untrusted event "files" brings, and whether it is the first."""
    run = sent.get("run")
    return run if type(run) is int and 0 <= run < 2**31 else 0, sent.get("first") is not False
