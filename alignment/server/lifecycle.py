"""Server, lifecycle: the memory of the process, signals, and a stop that answers what is under way."""

import ctypes
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from alignment.server.gradio_internals import queue_status
from alignment.server.logging import log_event

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_DELIVERY_S = 2.0  # for which an answer waits at the end for a client that may never fetch it
_MAX_ARENAS, _M_ARENA_MAX = 4, -8


def limit_arenas() -> None:
    """Let all threads share a few of glibc's arenas; to be called before there are threads.

    Each of forty threads would get one, and each keep what its largest request needed: a gigabyte that is not in use.
    """
    _call_libc("mallopt", _M_ARENA_MAX, _MAX_ARENAS)


def trim_memory() -> None:
    """Return memory that is free at present to the system."""
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *args: int) -> None:
    """Call a function of glibc, if there is one: not on other systems, nor with musl."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*args)


class Lifecycle:
    """Since when the service runs, how many calls and uploads are under way, and how it is stopped."""

    def __init__(self) -> None:
        self.since, self.requests = time.monotonic(), 0
        self.stopping = threading.Event()

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop the service; a second signal ends the process as it does elsewhere."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def handle(*received: object) -> None:
            self.stopping.set()
            restore()

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            restore()

    def serve(self, page: gr.Blocks, timeout_s: float) -> None:
        """Block until a launched page is told to stop, wait at most `timeout_s` for what is under way, and close it.

        Raises:
            OSError: when the queue has broken down: requests are no longer answered.
        """
        while not self.stopping.wait(_POLL_S):
            if queue_status(page).broken:
                page.close(verbose=False)
                raise OSError("The queue of requests has broken down. Start the app again.")
        log_event(logger, "stopping")
        begun = busy_at = now = time.monotonic()
        while (now := time.monotonic()) - begun < timeout_s:
            status = queue_status(page)
            if status.waiting or status.active or self.requests:
                busy_at = now
            elif not status.undelivered or now - busy_at > _DELIVERY_S:
                break
            time.sleep(_POLL_S)
        status = queue_status(page)
        log_event(logger, "stopped", waited_s=round(now - begun, 1), unfinished=status.waiting + status.active)
        page.close(verbose=False)
