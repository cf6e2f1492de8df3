"""Top floor, what arrives from the visitor's device: uploads are read once, and then their files are deleted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from alignment.engine import MAX_ZIP_MB, AlignmentEngine, Photos, Skipped
from alignment.engine.photo_zip import Added, add_archive
from alignment.model import chunk_size
from alignment.preprocess import InputError, sanitize_text
from alignment.server.errors import ServiceError
from alignment.server.page import MAX_PATH
from alignment.server.sessions import Immutable
from alignment.server.uploads import upload_folder
from alignment.ui.strings import count_text, error_text, text
from alignment.ui.widgets import user_errors

logger = logging.getLogger(__name__)

MAX_FILE_MB = 30
MAX_NAME = 120
CHUNK = 4  # pictures between two signs of progress
SHOWN_PROBLEMS = 10

_serial = count()  # the page redraws on a new value only, also when the same file is wrong twice


@dataclass(frozen=True)
class Upload:
    """One file as the page announced it: where the server put it, or why it never arrived."""

    name: str
    path: str = ""
    problem: str = ""

    @property
    def is_zip(self) -> bool:
        """Whether it is called a zip file."""
        return self.name.lower().endswith(".zip")


@dataclass(frozen=True)
class PhotoState(Immutable):
    """Pictures beside each other, kept in the visitor's session.

    Attributes:
        photos: what is there.
        sample: whether these are still the page's own.
        added: how many came last.
        skipped: what was left out then.
    """

    photos: Photos
    sample: bool = True
    added: int = 0
    skipped: tuple[Skipped, ...] = field(default=())


def uploads_of(data: object) -> list[Upload]:
    """Read the event of `drop.js`; a page could send anything."""
    files = data.get("files") if isinstance(data, dict) else None
    uploads = []
    for file in files if isinstance(files, list) else []:
        if isinstance(file, dict):
            name, path, problem = (str(file.get(key) or "") for key in ("name", "path", "problem"))
            uploads.append(Upload(sanitize_text(name, MAX_NAME) or "?", path, problem))
    return uploads


def read_upload(upload: Upload, limit: int) -> bytes:
    """Read an upload.

    Raises:
        InputError: when it is not there, or too large.
    """
    try:
        return validate_upload(upload, limit).read_bytes()
    except OSError as error:
        raise lost() from error


def validate_upload(upload: Upload, limit: int = 1, limit_mb: int = MAX_FILE_MB) -> Path:
    """Find the file of an upload.

    Args:
        upload: as the page announced it.
        limit: of files; what there are more of never arrived.
        limit_mb: of its size; the page keeps to it, but the page may be anybody's.

    Raises:
        InputError: when it is not there, or too large.
    """
    if upload.problem == "limit":
        raise InputError("There is room for {limit} pictures only.", "photo.limit", limit=limit)
    if upload.problem.startswith("refused."):
        raise _refused(upload.problem.removeprefix("refused."))
    if upload.problem == "empty":
        raise InputError("The file is empty; choose one with a picture in it.", "image.empty")
    try:
        size = limit_mb * 2**20 + 1 if upload.problem == "size" else _path(upload).stat().st_size
    except (OSError, ValueError) as error:
        raise lost() from error
    if size > limit_mb * 2**20:
        raise InputError("The file has more than {limit} MB; make it smaller.", "upload.size", limit=limit_mb)
    return _path(upload)


def _refused(code: str) -> InputError:
    """Return the error of an upload that the service refused; the page sends back its code alone."""
    later = {
        "rate": InputError("Too many requests from your address; try again in a minute.", "upload.rate"),
        "waiting": InputError("There are too many files from your address waiting; try again soon.", "upload.waiting"),
    }
    known = map(ServiceError, ("upload.name", "service.open", "service.full", "service.stopping", "service.slow"))
    return {**later, **{error.code: error.error for error in known}}.get(code, lost())


def lost() -> InputError:
    """Say that a file is not where it should be."""
    return ServiceError("upload.lost").error


def delete_uploads(uploads: Sequence[Upload]) -> None:
    """Delete the files of uploads that have been dealt with."""
    for upload in uploads:
        try:
            _path(upload).unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            logger.debug("Nothing to delete: %s", error)


def _path(upload: Upload) -> Path:
    """Find the file of an upload; nothing but the upload folder is ever touched, whatever a page may send."""
    if not 0 < len(upload.path) <= MAX_PATH:  # to resolve a very long one takes minutes
        raise ValueError("not an upload")
    folder, path = upload_folder(), Path(upload.path).resolve()
    if path == folder or not path.is_relative_to(folder):
        raise ValueError("not an upload")
    return path


def fill(
    engine: AlignmentEngine, shelf: PhotoState, uploads: Sequence[Upload], limit: int
) -> Iterator[tuple[PhotoState, int]]:
    """Add uploads to a shelf a few at a time; the first make way for the sample.

    Yields:
        The shelf so far, and how many uploads have been dealt with; at first as it was, and 0.
    """
    for filled, done, _ in gather(engine, shelf, uploads, limit, zips=False):
        yield filled, done


def gather(
    engine: AlignmentEngine,
    shelf: PhotoState,
    uploads: Sequence[Upload],
    limit: int,
    *,
    zips: bool = True,
    more: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[PhotoState, int, int]]:
    """Add uploads to a shelf a few at a time, and what is in zip files; the first make way for the sample.

    Args:
        engine: embeds.
        shelf: what is there.
        uploads: files; they are deleted afterwards, whatever happens.
        limit: of pictures in all.
        zips: whether zip files are opened.
        more: whether these belong to what came last, and are counted with it.
        stopped: whether to leave it at that.

    Yields:
        The shelf so far, what has been dealt with, and of how much; at first as it was, and 0.
    """
    shelf = shelf if more else replace(shelf, added=0, skipped=())
    photos = engine.no_photos(both=shelf.photos.second_embeds is not None) if shelf.sample else shelf.photos
    before, skipped = len(photos) - shelf.added, list(shelf.skipped)
    try:
        yield shelf, 0, max(len(uploads), 1)
        for step in _steps(engine, photos, uploads, limit, zips):
            photos, skipped = step.photos, skipped + step.skipped
            now = PhotoState(photos, False, len(photos) - before, tuple(skipped))
            # Where no file was any good, the sample stays.
            yield now if len(photos) else replace(shelf, skipped=tuple(skipped)), step.done, step.total
            if stopped():
                return
    finally:
        delete_uploads(uploads)  # only now: two files alike are one file here


def _steps(
    engine: AlignmentEngine, photos: Photos, uploads: Sequence[Upload], limit: int, zips: bool
) -> Iterator[Added]:
    plain = [upload for upload in uploads if not (zips and upload.is_zip)]
    at_once = chunk_size(CHUNK)
    for start in range(0, len(plain), at_once):
        chunk = plain[start : start + at_once]
        photos, skipped = _add(engine, photos, chunk, limit)
        yield Added(photos, skipped, start + len(chunk), len(uploads))
    for upload in uploads:
        if zips and upload.is_zip:
            for step in _add_zip(engine, photos, upload, limit):
                photos = step.photos
                yield step


def _add(
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
            photos, bad = engine.add_photos(photos, files, limit=limit)
        return photos, skipped + bad
    except InputError as error:
        return photos, [*skipped, *(Skipped(name, error) for name, _ in files)]


def _add_zip(engine: AlignmentEngine, photos: Photos, upload: Upload, limit: int) -> Iterator[Added]:
    try:
        with user_errors():
            for step in add_archive(engine, photos, validate_upload(upload, limit, MAX_ZIP_MB), limit=limit):
                photos = step.photos
                yield step
    except InputError as error:
        yield Added(photos, [Skipped(upload.name, error)], 1, 1)


def drop_value(lang: str, title: str, *, max_files: int = 1, **more: Any) -> dict[str, Any]:
    """Lay the place for files out for `drop.js`; `more` is what else its value may hold."""
    many = max_files > 1
    return {
        "serial": next(_serial),
        "title": title,
        "how": text(lang, "drop.how.many" if many else "drop.how"),
        "many": many,
        "maxFiles": max_files,
        "maxBytes": MAX_FILE_MB * 2**20,
        "busy": text(lang, "drop.busy"),
        "uploading": text(lang, "drop.uploading", done="{done}", total="{total}"),
        **more,
    }


def shelf_drop_value(lang: str, title: str, shelf: PhotoState, max_files: int) -> dict[str, Any]:
    """Lay it out for a shelf, with what became of the last files."""
    shown = [[skip.name, error_text(lang, skip.error)] for skip in shelf.skipped[:SHOWN_PROBLEMS]]
    if rest := len(shelf.skipped) - len(shown):
        shown.append(["…", text(lang, "drop.more", count=rest)])
    return drop_value(
        lang,
        title,
        max_files=max_files,
        status=count_text(lang, "drop.added", shelf.added) if shelf.added else "",
        skippedTitle=count_text(lang, "drop.skipped", len(shelf.skipped)) if shelf.skipped else "",
        skipped=shown,
    )


def progress_value(lang: str, title: str, done: int, total: int, max_files: int) -> dict[str, Any]:
    """Lay it out while uploads are being read."""
    say = text(lang, "drop.reading", done=done, total=total)
    return drop_value(lang, title, max_files=max_files, progress={"done": done, "total": total, "text": say})
