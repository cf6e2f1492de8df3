"""Top floor, how the service ends: what is under way is answered, what comes then is sent away, nothing stays."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import gradio as gr

from alignment.ui.service.logs import note

logger = logging.getLogger(__name__)

_LOOK = 0.1  # seconds between two looks
_LEFT = 2.0  # seconds an answer waits for a client that may never come for it
_MOST_LEFT = 2000  # answers that wait for whoever asked


class Running:
    """Whether the service runs, since when, and how it is told to stop."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self._stop = threading.Event()
        self._arriving = 0

    @property
    def stopping(self) -> bool:
        """Whether it has been told to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Begin to stop."""
        self._stop.set()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count a request that brings something as under way, from the server's own thread."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    @contextmanager
    def until_told(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop it while this lasts; a second one ends the process as it always does."""
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.getsignal(name) for name in names}

        def told(name: int, frame: FrameType | None) -> None:
            self.stop()
            for each, handler in before.items():
                signal.signal(each, handler)

        for name in names:
            signal.signal(name, told)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def serve(self, page: gr.Blocks, seconds: float) -> None:
        """Block until it is told to stop; then wait for what is under way, and close the page.

        Args:
            page: launched.
            seconds: to wait at most.

        Raises:
            OSError: when requests are answered no more, though nobody told it to stop.
        """
        while not self._stop.wait(_LOOK):
            if broken(page):
                page.close(verbose=False)
                raise OSError("The queue of requests has broken down. Start the app again.")
        note(logger, "stopping")
        begun = time.monotonic()
        idle_since = begun
        while time.monotonic() - begun < seconds:
            if working(page) or self._arriving:
                idle_since = time.monotonic()
            elif not undelivered(page) or time.monotonic() - idle_since > _LEFT:
                break
            time.sleep(_LOOK)
        note(logger, "stopped", waited_s=round(time.monotonic() - begun, 1), unfinished=working(page))
        page.close(verbose=False)


def waiting(page: gr.Blocks) -> int:
    """Count the requests that wait for their turn."""
    return len(page._queue)


def working(page: gr.Blocks) -> int:
    """Count the requests that wait, and those that are being answered."""
    return waiting(page) + page._queue.get_active_worker_count()


def undelivered(page: gr.Blocks) -> bool:
    """Tell whether an answer is there that nobody has come for yet."""
    return any(list(page._queue.pending_event_ids_session.values()))


def broken(page: gr.Blocks) -> bool:
    """Tell whether Gradio's queue has ended by itself, after a failure of its own."""
    return bool(page._queue.stopped)


class Leftovers:
    """What Gradio's queue keeps of requests that are over: an entry of each, for ever, which this clears away.

    Gradio keeps the answers of so many sessions and, where there are more, drops the one that came first, even one that
    still waits for its turn, at which its queue breaks down. Here only answers go that nobody comes for.
    """

    def __init__(self, page: gr.Blocks) -> None:
        self._queue: Any = page._queue
        self._queue.pending_messages_per_session = dict(self._queue.pending_messages_per_session)  # type: ignore[assignment]
        self._idle: dict[str, float] = {}  # session -> since when its answers wait for it

    def clear(self, seconds: float) -> None:
        """Drop what has been delivered, and what nobody has come for in so long; from the server's own loop only."""
        events, now = self._queue.pending_event_ids_session, time.monotonic()
        idle = {
            session: self._idle.get(session, now)
            for session, ids in events.items()
            if not any(id in self._queue.event_ids_to_events for id in ids)
        }
        too_many = len(idle) - _MOST_LEFT
        for number, (session, since) in enumerate(sorted(idle.items(), key=lambda entry: entry[1])):
            if not events[session] or now - since > seconds or number < too_many:
                del events[session], idle[session]
                self._queue.pending_messages_per_session.pop(session, None)
        self._idle = idle


async def every(seconds: float, work: Any) -> None:
    """Do something again and again; a failure is logged and does not end it."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            logger.exception("Tidying up failed")
