"""A folder of photos that is searched while its gallery is made, or brought up to date, in the background.

Place in the flow: `folder -> build_gallery, in a thread (here) -> engine.show`. The engine answers from the old gallery
until the new one is whole; at the first scan, from what is embedded so far. The photos themselves are only read. Where
the model has only begun the starter gallery, that is made whole first, also without any photos.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from alignment.atomic import describe_error
from alignment.engine.core import AlignmentEngine
from alignment.engine.photos import Skipped
from alignment.gallery import BuildReport, Gallery, Show, build_gallery, build_starter, cached_folder
from alignment.gallery.starter import Bar
from alignment.model import DualEncoder
from alignment.pairs import told
from alignment.pairs.files import PICTURES, walk
from alignment.preprocess import InputError, advised, legible

logger = logging.getLogger(__name__)

State = Literal["none", "starter", "running", "waiting", "done", "empty", "failed"]

_LIFTABLE = {"image.too_large": "photo.too_large", "image.too_narrow": "photo.too_narrow"}
_STOP = 5.0  # seconds that a stop waits for the batch under way


@dataclass(frozen=True)
class Scan:
    """How far a scan is, or what came of the last one.

    Attributes:
        state: "starter" while the starter gallery is made; "waiting" for another process that writes to the same
            gallery; "empty": the folder holds no pictures.
        done: items that are dealt with.
        total: items in all; 0 until they are listed.
        added: pictures that are new.
        changed: pictures whose files have changed.
        removed: pictures that are gone.
        skipped: each picture, folder or captions file that could not be read, and why.
        problem: why the scan failed.
    """

    state: State = "none"
    done: int = 0
    total: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    skipped: tuple[Skipped, ...] = field(default=(), repr=False)
    problem: str = ""

    @property
    def running(self) -> bool:
        """Whether the scan goes on."""
        return self.state in ("starter", "running", "waiting")


class _Stopped(Exception):
    """The app ends; the next scan goes on from here."""


class PhotoFolder:
    """A folder of photos, and its gallery in the cache folder; or the starter gallery of a model, alone.

    Attributes:
        engine: searches the gallery; the starter gallery until there is one.
        source: the folder; "" where only the starter gallery is to be made.
        out: the gallery's folder.
        scan: how far the scan is; replaced as it goes.
        version: how many galleries have been shown.
    """

    retry = 3.0
    """Seconds between two looks whether another process is done with the gallery."""

    def __init__(self, engine: AlignmentEngine, source: str | os.PathLike[str] | None, bar: Bar) -> None:
        """Take over a folder; show the gallery that an earlier start has made of it, if there is one.

        Args:
            engine: shows the gallery of this folder from now on.
            source: the folder; None for the starter gallery alone.
            bar: opened for each scan, to show how far it is on the terminal.
        """
        self.engine, self.bar = engine, bar
        self.source = photo_folder(source) if source else ""
        self.out = cached_folder(engine.encoder, self.source)
        self.scan, self.version = Scan(), 0
        self._lock, self._stopping, self._thread = threading.Lock(), threading.Event(), threading.Thread()
        self._last = _load(self.out, engine.encoder) if self.source else None  # gallery of the last scan
        if self._last is not None:
            self._show(self._last)

    def start(self) -> bool:
        """Begin a scan in the background; False where one is under way already."""
        with self._lock:
            if self.scan.running or self._stopping.is_set():
                return False
            self.scan = Scan("running")
            self._thread = threading.Thread(target=self._run, name="scan", daemon=True)
            self._thread.start()
        return True

    def stop(self) -> None:
        """End a scan; what is embedded so far is kept for the next one."""
        self._stopping.set()
        self.wait(_STOP)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the scan has ended."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            self._make_starter()
            if self.source:
                self._scan()
        except _Stopped:
            self.scan = Scan()
        except Exception:
            logger.exception("The scan failed")
            self.scan = Scan("failed")

    def _make_starter(self) -> None:
        """Make the starter gallery whole where this model has only begun it; photos are scanned even if that fails."""
        begun = self.engine.starter
        if begun.folder is not None:
            return
        self.scan, after = Scan("starter"), Scan("running" if self.source else "none")
        try:
            with self.bar("Embedding the starter gallery") as show:
                self.engine.starter = build_starter(self.engine.encoder, partial(self._go_on, "starter", show))
            if self.engine.gallery is begun:
                self.engine.show(self.engine.starter)
                self.version += 1
        except (OSError, ValueError) as error:
            logger.warning("The starter gallery could not be made: %s", describe_error(error))
            after = after if self.source else Scan("failed", problem=describe_error(error))
        self.scan = after

    def _scan(self) -> None:
        report = BuildReport()
        try:
            before = _files(self._last) if self._last else {}  # now: the build deletes records of the last one
            self._last = self._build(report)
            self._show(self._last)
            now = _files(self._last)
            both = before.keys() & now.keys()
            skipped = _skipped(report, self.source)
            for line in told(report):
                logger.warning("%s: %s", self.source, line)
            self.scan = Scan(
                "done",
                added=len(now) - len(both),
                changed=sum(before[name] != now[name] for name in both),
                removed=len(before) - len(both),
                skipped=skipped,
            )
            logger.info(
                "%s: %d pictures can be searched; %d new, %d changed, %d gone, %d could not be read.",
                self.source,
                len(now),
                self.scan.added,
                self.scan.changed,
                self.scan.removed,
                len(skipped),
            )
        except (OSError, ValueError) as error:
            empty = isinstance(error, ValueError) and not holds_pictures(self.source)
            logger.warning("The scan failed: %s", describe_error(error))
            state: State = "empty" if empty else "failed"
            self.scan = Scan(state, skipped=_skipped(report, self.source), problem=describe_error(error))

    def _build(self, report: BuildReport) -> Gallery:
        """Build as soon as no other process does."""
        while True:
            try:
                with self.bar(f"Reading {self.source}") as show:
                    return build_gallery(
                        self.source,
                        self.out,
                        self.engine.encoder,
                        progress=partial(self._go_on, "running", show),
                        report=report,
                        growing=None if self._last else self._show,
                        like=self.engine.starter,
                    )
            except BlockingIOError:
                self.scan = replace(self.scan, state="waiting")
                if self._stopping.wait(self.retry):
                    raise _Stopped from None

    def _go_on(self, state: State, show: Show, done: int, total: int) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self.scan = Scan(state, done, total)
        show(done, total)

    def _show(self, gallery: Gallery) -> None:
        """Search this gallery from now on; where it has no captions, the starter gallery lends its own."""
        self.engine.show(gallery if gallery.captions else gallery.with_captions_of(self.engine.starter))
        self.version += 1


def photo_folder(source: str | os.PathLike[str]) -> str:
    """Find a folder, also by `~`, with links followed.

    Raises:
        FileNotFoundError: when there is none.
        NotADirectoryError: when it is a file.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the folder that your photos lie in.")
    return os.path.realpath(folder)


def holds_pictures(folder: str) -> bool:
    """Tell whether a folder holds a file that is called like a picture."""
    return any(path.suffix.lower() in PICTURES for path in walk(Path(folder)))


def _load(folder: Path, encoder: DualEncoder) -> Gallery | None:
    try:
        return Gallery.load(folder, encoder)
    except FileNotFoundError:
        return None
    except ValueError as error:  # the scan makes it anew
        logger.warning("%s", str(error).partition(" Rebuild it with")[0])
        return None


def _skipped(report: BuildReport, source: str) -> tuple[Skipped, ...]:
    unreadable = InputError("This file cannot be read.", "photo.unreadable")
    closed = InputError("This folder cannot be listed; its pictures stay as they were.", "photo.unlisted")
    files = [Skipped(name, _advised(report.errors.get(name, unreadable))) for name, _ in report.skipped]
    unread = [Skipped(name, _unread(reason)) for name, reason in report.unread.items()]
    return *(Skipped(os.path.relpath(folder, source), closed) for folder in report.unlisted), *unread, *files


def _unread(reason: str) -> InputError:
    return InputError("Its captions cannot be read: {reason}.", "photo.captions", reason=legible(reason, 200))


def _advised(error: InputError) -> InputError:
    """Say of a photo that is too large by which option the app takes it in."""
    code = _LIFTABLE.get(error.code)
    return InputError(advised(error), code, **error.values) if code else error


def _files(gallery: Gallery) -> dict[str, str]:
    """Map each picture's source to the SHA-256 of its file."""
    return {picture.source: picture.file.sha256 if picture.file else "" for picture in gallery.pictures}
