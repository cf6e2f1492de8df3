"""Server, service: what `app.py` passes to Gradio's `launch`, signals, and a stop that answers what is under way."""

import asyncio
import ctypes
import logging
import secrets
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from anyio.to_thread import run_sync
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from alignment import __version__
from alignment.server.errors import ServiceError, Translate
from alignment.server.gradio_internals import (
    LightSessions,
    PatientQueue,
    QueueJanitor,
    blocks_of,
    configure_uvicorn,
    harden_mcp,
    queue_status,
)
from alignment.server.logging import log_event
from alignment.server.middleware import GuardedRequest, RequestGuard
from alignment.server.routes import UPLOAD
from alignment.server.settings import Settings
from alignment.server.uploads import UploadQuota, expire_files, receive_upload
from alignment.signals import handle_signals

logger = logging.getLogger(__name__)

CLEAN_UP_PERIOD_S = 10.0
MAX_IDLE_SESSIONS = 2000  # with an answer that their client has not fetched
_ANSWER_AGE_S = 300.0  # for which an answer waits for a program to fetch it
_CONNECTIONS_PER_REQUEST = 2  # a browser opens some ahead
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


class Service:
    """What stands around the page: limits before it, clean-up behind it, and how it is stopped."""

    def __init__(self, settings: Settings | None = None, folder: Path | None = None) -> None:
        """Apply the settings; `folder` is where uploads lie, None where old files are not to be deleted."""
        self.settings, self.folder = settings or Settings(), folder
        self.uploads, self.token = UploadQuota(self.settings), secrets.token_urlsafe(24)
        self.stopping, self.since = threading.Event(), time.monotonic()
        self.requests = set[GuardedRequest]()  # calls and uploads under way

    def launch_options(
        self,
        describe: Callable[[], Mapping[str, Any]] = dict,
        routes: Sequence[Route] = (),
        *,
        translate: Translate = lambda accept_language, error: str(error),
        max_file_mb: int = 100,
    ) -> dict[str, Any]:
        """Return options for Gradio's `launch`.

        /healthz adds what `describe` returns of the model and the gallery; `routes` are the page's own. Errors are in
        English without `translate`.
        """
        settings = self.settings
        # Behind a reverse proxy all connections are the proxy's.
        configure_uvicorn(0 if settings.proxies else _CONNECTIONS_PER_REQUEST * settings.at_once)
        guard = Middleware(RequestGuard, self, translate)
        health = Route("/healthz", partial(self._health, describe))
        receive = partial(receive_upload, self.uploads, max_file_mb)
        upload = [Route(path, receive, methods=["POST"]) for path in (UPLOAD, f"{UPLOAD}/")]
        app = {"routes": [health, *upload, *routes], "middleware": [guard], "lifespan": self._clean_up}
        return {
            "app_kwargs": {**app, "exception_handlers": {RequestValidationError: _refuse, HTTPException: _refuse}},
            "root_path": settings.root_path,
        }

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop the service; a second signal ends the process as it does elsewhere."""

        def stop(*received: object) -> None:
            self.stopping.set()
            restore()

        with handle_signals(stop, signal.SIGTERM, signal.SIGINT) as restore:
            yield

    def serve(self, page: gr.Blocks) -> None:
        """Block until told to stop, wait `stop_seconds` at most for what is under way, and close the launched page.

        Raises:
            OSError: when the queue has broken down: requests are no longer answered.
        """
        while not self.stopping.wait(_POLL_S):
            if queue_status(page).broken:
                page.close(verbose=False)
                raise OSError("The queue of requests has broken down. Start the app again.")
        log_event(logger, "stopping")
        begun = busy_at = now = time.monotonic()
        while (now := time.monotonic()) - begun < self.settings.stop_seconds:
            status = queue_status(page)
            if status.waiting or status.active or self.requests:
                busy_at = now
            elif not status.undelivered or now - busy_at > _DELIVERY_S:
                break
            time.sleep(_POLL_S)
        status = queue_status(page)
        log_event(logger, "stopped", waited_s=round(now - begun, 1), unfinished=status.waiting + status.active)
        page.close(verbose=False)

    async def _health(self, describe: Callable[[], Mapping[str, Any]], request: Request) -> JSONResponse:
        """Answer 200 while requests are taken, 503 when the service is stopping or broken."""
        queue = queue_status(blocks_of(request.scope))
        status = "stopping" if self.stopping.is_set() else "broken" if queue.broken else "ok"
        uptime_s = round(time.monotonic() - self.since, 1)
        numbers = {"uptime_s": uptime_s, "queue": queue.waiting, "working": queue.active}
        body = {"status": status, "version": __version__, **describe(), **numbers}
        return JSONResponse(body, 200 if status == "ok" else 503, {"Cache-Control": "no-store"})

    @asynccontextmanager
    async def _clean_up(self, app: Any) -> AsyncIterator[None]:
        """Prepare the page before it is served, and clean up periodically for as long as it is."""
        page = blocks_of({"app": app})
        harden_mcp(page)
        PatientQueue.adopt(page)
        sessions = LightSessions(page, self.settings.sessions_mb * 2**20)
        janitor = QueueJanitor(page, _ANSWER_AGE_S, MAX_IDLE_SESSIONS)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._clean_up_forever(sessions, janitor))
            yield
            task.cancel()

    async def _clean_up_forever(self, sessions: LightSessions, janitor: QueueJanitor) -> None:
        seconds = 60 * self.settings.keep_minutes
        while True:
            await asyncio.sleep(CLEAN_UP_PERIOD_S)
            try:
                janitor.collect()
                sessions.expire(seconds)
                if self.folder:
                    await run_sync(expire_files, self.folder, seconds)
                self.uploads.collect_consumed()
                await run_sync(trim_memory)
            except Exception:  # logged whole; the loop goes on, or uploads and sessions would pile up until a restart
                logger.exception("A clean-up failed")


async def _refuse(request: Request, error: Exception) -> NoReturn:
    """Let the middleware answer what FastAPI or Gradio refuses, in the form of `ServiceError` and quoting nothing."""
    status = error.status_code if isinstance(error, HTTPException) else 422
    code = {404: "service.closed", 503: "service.queue"}.get(status, "internal" if status >= 500 else "service.request")
    raise ServiceError(code, status=status)
