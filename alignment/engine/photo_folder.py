"""A folder of photos that is searched while its gallery is built or updated in the background.

Place in the flow: `folder -> build_gallery, in a thread (here) -> engine.show`. The engine searches the old gallery
until the new one is complete; during the first scan, what is embedded so far. The photos are only read. For a model
without a complete starter gallery, that is built first, also if there are no photos.
"""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from alignment.data import describe_issues
from alignment.data.files import walk
from alignment.engine.core import AlignmentEngine, Skipped
from alignment.engine.starter import build_starter, cached_folder
from alignment.file_errors import describe_error
from alignment.gallery import BuildReport, Gallery, build_gallery
from alignment.model import DualEncoder
from alignment.model.dual_encoder import Progress
from alignment.preprocess import IMAGE_SUFFIXES, InputError, message_with_option, sanitize_text

logger = logging.getLogger(__name__)

Bar: TypeAlias = Callable[[str], AbstractContextManager[Progress]]  # opens a progress bar of that name
State = Literal["none", "starter", "running", "waiting", "done", "empty", "failed"]

_WITH_OPTION = {"image.too_large": "photo.too_large", "image.too_narrow": "photo.too_narrow"}
_STOP_TIMEOUT_S = 5.0  # to wait for the batch under way


@dataclass(frozen=True)
class Scan:
    """Progress of a scan, or the outcome of the last one.

    It is "starter" while the starter gallery is built, "waiting" for another process that writes to the same gallery,
    and "empty" when the folder holds no pictures. `skipped` are pictures, folders and captions files not read.
    """

    state: State = "none"
    done: int = 0
    total: int = 0  # until the items are listed
    added: int = 0
    changed: int = 0
    removed: int = 0
    skipped: tuple[Skipped, ...] = field(default=(), repr=False)

    @property
    def running(self) -> bool:
        """Whether the scan is under way."""
        return self.state in ("starter", "running", "waiting")


class _Stopped(Exception):
    """The app ends; the next scan continues."""


class PhotoFolder:
    """A folder of photos, `source`, and its gallery in the cache folder `out`; or the starter gallery of a model.

    `scan` is replaced at each step; `version` counts the galleries shown so far.
    """

    retry = 3.0  # seconds between two attempts to lock a gallery that another process writes

    def __init__(self, engine: AlignmentEngine, source: str | os.PathLike[str] | None, bar: Bar) -> None:
        """Show the gallery of a folder, if there is one; `bar` is opened for each scan, for its progress."""
        self.engine, self.bar = engine, bar
        self.source = photo_folder(source) if source else ""
        self.out = cached_folder(engine.encoder, self.source)
        self.scan, self.version = Scan(), 0
        self._lock, self._stopping, self._thread = threading.Lock(), threading.Event(), threading.Thread()
        self._last = _load(self.out, engine.encoder) if self.source else None  # gallery of the last scan
        if self._last is not None:
            self._show(self._last)

    def start(self) -> bool:
        """Begin a scan in the background; False if one is under way."""
        with self._lock:
            if self.scan.running or self._stopping.is_set():
                return False
            self.scan = Scan("running")
            self._thread = threading.Thread(target=self._run, name="scan", daemon=True)
            self._thread.start()
        return True

    def stop(self) -> None:
        """End a scan; the next one reuses what is embedded so far."""
        self._stopping.set()
        self.wait(_STOP_TIMEOUT_S)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the scan has ended."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            if self.engine.starter.folder is None:  # incomplete
                self._build_starter()
            if self.source:
                self._scan()
        except _Stopped:
            self.scan = Scan()
        except Exception:
            logger.exception("The scan failed")
            self.scan = Scan("failed")

    def _build_starter(self) -> None:
        """Build the starter gallery; photos are scanned even if that fails."""
        begun, self.scan = self.engine.starter, Scan("starter")
        state: State = "running" if self.source else "none"
        try:
            with self.bar("Embedding the starter gallery") as show:
                self.engine.starter = build_starter(self.engine.encoder, partial(self._progress, "starter", show))
            if self.engine.gallery is begun:
                self.engine.show(self.engine.starter)
                self.version += 1
        except (OSError, ValueError) as error:
            logger.warning("The starter gallery could not be made: %s", describe_error(error))
            state = "running" if self.source else "failed"
        self.scan = Scan(state)

    def _scan(self) -> None:
        report = BuildReport()
        try:
            before = _files(self._last) if self._last else {}  # now: the build deletes records of the last one
            self._last = self._build(report)
        except (OSError, ValueError) as error:
            logger.warning("The scan failed: %s", describe_error(error))
            is_empty = isinstance(error, ValueError) and not any(
                path.suffix.lower() in IMAGE_SUFFIXES for path in walk(Path(self.source))
            )
            self.scan = Scan("empty" if is_empty else "failed", skipped=_skipped(report, self.source))
            return
        self._show(self._last)
        for line in describe_issues(report.reading):
            logger.warning("%s: %s", self.source, line)
        now, skipped = _files(self._last), _skipped(report, self.source)
        both = before.keys() & now.keys()
        changed = sum(before[name] != now[name] for name in both)
        numbers = {"added": len(now) - len(both), "changed": changed, "removed": len(before) - len(both)}
        self.scan = Scan("done", **numbers, skipped=skipped)
        message = "%s: %d pictures can be searched; %d new, %d changed, %d gone, %d could not be read."
        logger.info(message, self.source, len(now), *numbers.values(), len(skipped))

    def _build(self, report: BuildReport) -> Gallery:
        """Build as soon as no other process does."""
        while True:
            try:
                with self.bar(f"Reading {self.source}") as show:
                    return build_gallery(
                        self.source, self.out, self.engine.encoder, report=report, like=self.engine.starter,
                        progress=partial(self._progress, "running", show),
                        growing=None if self._last else self._show,
                    )  # fmt: skip
            except BlockingIOError:
                self.scan = replace(self.scan, state="waiting")
                if self._stopping.wait(self.retry):
                    raise _Stopped from None

    def _progress(self, state: State, show: Progress, done: int, total: int) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self.scan = Scan(state, done, total)
        show(done, total)

    def _show(self, gallery: Gallery) -> None:
        """Search this gallery from now on; without captions of its own, with those of the starter gallery."""
        self.engine.show(gallery if gallery.captions else gallery.with_captions_of(self.engine.starter))
        self.version += 1


def photo_folder(source: str | os.PathLike[str]) -> str:
    """Resolve `~` and links; FileNotFoundError or NotADirectoryError when it is no folder."""
    folder = Path(os.path.expanduser(source))
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the folder that your photos lie in.")
    return os.path.realpath(folder)


def _load(folder: Path, encoder: DualEncoder) -> Gallery | None:
    try:
        return Gallery.load(folder, encoder)
    except (FileNotFoundError, ValueError) as error:  # the scan builds it
        if isinstance(error, ValueError):
            logger.warning("%s", str(error).partition(" Rebuild it with")[0])
        return None


def _skipped(report: BuildReport, source: str) -> tuple[Skipped, ...]:
    unlisted = InputError("This folder cannot be listed; its pictures stay as they were.", "photo.unlisted")
    unreadable = InputError("This file cannot be read.", "photo.unreadable")
    skipped = [Skipped(os.path.relpath(folder, source), unlisted) for folder in report.reading.unlisted]
    for name, reason in report.reading.unread.items():
        message = "Its captions cannot be read: {reason}."
        skipped.append(Skipped(name, InputError(message, "photo.captions", reason=sanitize_text(reason, 200))))
    for name, _ in report.skipped:
        error = report.errors.get(name, unreadable)
        if code := _WITH_OPTION.get(error.code):
            error = InputError(message_with_option(error), code, **error.values)
        skipped.append(Skipped(name, error))
    return tuple(skipped)


def _files(gallery: Gallery) -> dict[str, str]:
    """Map each picture's source to the SHA-256 of its file."""
    return {picture.source: picture.file.sha256 if picture.file else "" for picture in gallery.pictures}
