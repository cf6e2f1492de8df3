"""Server, service: what `app.py` passes to Gradio's `launch`, put together from the other modules."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from anyio.to_thread import run_sync
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alignment import __version__
from alignment.server.errors import ServiceError, Translate, in_english
from alignment.server.gradio_internals import EventQueue, blocks_of, expire_sessions, limit_connections
from alignment.server.lifecycle import Lifecycle, QueueJanitor, run_every
from alignment.server.malloc import trim
from alignment.server.middleware import RequestGuard
from alignment.server.routes import UPLOAD
from alignment.server.settings import Settings
from alignment.server.upload_folder import expire_files
from alignment.server.uploads import UploadQuota, receive_upload

QUEUE_PERIOD_S, FILES_PERIOD_S = 5.0, 30.0
"""Between two clean-ups of the queue, and of files and sessions."""

MAX_IDLE_SESSIONS = 2000
"""Sessions with an answer that their client has not fetched."""

_ANSWER_AGE_S = 300.0  # for which an answer waits for a program to fetch it
_MAX_SESSIONS = 10_000
_CONNECTIONS_PER_REQUEST = 2  # a browser opens some ahead


class Service:
    """What stands around the page: limits before it, clean-up behind it."""

    def __init__(self, settings: Settings | None = None, folder: Path | None = None) -> None:
        """Prepare it.

        Args:
            settings: its limits.
            folder: of this process alone, where uploads lie; None where old files are not to be deleted.
        """
        self.settings, self.folder = settings or Settings(), folder
        self.lifecycle, self.uploads = Lifecycle(), UploadQuota(self.settings)
        self.token = secrets.token_urlsafe(24)

    def launch_options(
        self,
        describe: Callable[[], Mapping[str, Any]] = dict,
        routes: Sequence[Route] = (),
        *,
        translate: Translate = in_english,
        max_file_mb: int = 100,
    ) -> dict[str, Any]:
        """Return options for Gradio's `launch`.

        Args:
            describe: what /healthz says of the model and the gallery.
            routes: of the page, beside those of the service.
            translate: says errors in the client's language.
            max_file_mb: of an uploaded file.
        """
        settings, self.uploads = self.settings, UploadQuota(self.settings, max_file_mb)
        # Behind a reverse proxy all connections are the proxy's.
        limit_connections(0 if settings.proxies else _CONNECTIONS_PER_REQUEST * settings.at_once)
        guard = Middleware(
            RequestGuard,
            settings=settings,
            lifecycle=self.lifecycle,
            uploads=self.uploads,
            token=self.token,
            translate=translate,
        )
        ours = [
            Route("/healthz", partial(self._health, describe)),
            *(Route(path, receive_upload, methods=["POST"]) for path in (UPLOAD, f"{UPLOAD}/")),
        ]
        return {
            "app_kwargs": {
                "routes": [*ours, *routes],
                "middleware": [guard],
                "lifespan": self._clean_up,
                "exception_handlers": dict.fromkeys(
                    (RequestValidationError, HTTPException), partial(_framework_error, translate)
                ),
            },
            "root_path": settings.root_path,
            "state_session_capacity": _MAX_SESSIONS,
        }

    def serve(self, page: gr.Blocks) -> None:
        """Run a launched page until the process is told to stop; see `Lifecycle.serve`."""
        self.lifecycle.serve(page, self.settings.stop_seconds)

    async def _health(self, describe: Callable[[], Mapping[str, Any]], request: Request) -> JSONResponse:
        """Answer 200 while requests are taken, 503 when the service is stopping or broken."""
        queue = EventQueue(blocks_of(request.scope))
        status = "stopping" if self.lifecycle.is_stopping else "broken" if queue.is_broken else "ok"
        body = {
            "status": status,
            "version": __version__,
            **describe(),
            "uptime_s": round(time.monotonic() - self.lifecycle.since, 1),
            "queue": queue.num_waiting,
            "working": queue.num_unfinished - queue.num_waiting,
        }
        return JSONResponse(body, 200 if status == "ok" else 503, {"Cache-Control": "no-store"})

    @asynccontextmanager
    async def _clean_up(self, app: Any) -> AsyncIterator[None]:
        """Clean up periodically for as long as the server runs."""
        page = blocks_of({"app": app})
        janitor = QueueJanitor(EventQueue(page), _ANSWER_AGE_S, MAX_IDLE_SESSIONS)

        async def collect() -> None:
            janitor.collect()

        tasks = [
            asyncio.create_task(run_every(QUEUE_PERIOD_S, collect)),
            asyncio.create_task(run_every(FILES_PERIOD_S, partial(self._expire, page))),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _expire(self, page: gr.Blocks) -> None:
        seconds = 60 * self.settings.keep_minutes
        expire_sessions(page, seconds, int(self.settings.sessions_mb * 2**20))
        if self.folder:
            await run_sync(partial(expire_files, self.folder, seconds))
        self.uploads.collect_consumed()
        await run_sync(trim)


async def _framework_error(translate: Translate, request: Request, error: Exception) -> Response:
    """Answer a request that FastAPI refuses in the form of `ServiceError`, quoting nothing of it."""
    status = error.status_code if isinstance(error, HTTPException) else 422
    if isinstance(error, HTTPException) and status >= 500:
        return await http_exception_handler(request, error)
    known = ServiceError("service.closed") if status == 404 else ServiceError("service.request", status=status)
    return known.response(request.headers, translate)
