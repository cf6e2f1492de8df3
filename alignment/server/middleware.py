"""Server, middleware: every HTTP request passes here before Gradio sees it.

Place in the flow: `request -> known route? -> stopping? -> rate, number, size -> Gradio -> our headers, a log line`.
"""

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignment.server import routes
from alignment.server.errors import ServiceError, Translate
from alignment.server.gradio_internals import blocks_of, queue_status, streaming_session
from alignment.server.limits import client_address
from alignment.server.logging import log_event
from alignment.server.sessions import COOKIE, new_cookie

if TYPE_CHECKING:
    from alignment.server.service import Service

logger = logging.getLogger(__name__)

GUARDED = "alignment.request"  # key of the ASGI scope under which its `GuardedRequest` is passed on
INTERNAL_TOKEN_HEADER = "x-alignment-internal"  # for what this process requests of itself for MCP tools: no limits
BODY_TIMEOUT_S = 60.0  # for the first megabyte of a body, and for each that has arrived
_MB = 2**20
_MAX_BODIES = 4  # requests of the largest size that may be arriving at once
_SMALL = 2**16  # bytes; bodies of other requests
_HUB = "https://huggingface.co https://*.huggingface.co https://*.hf.space"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Gradio's scripts need eval; nothing may be loaded from, or sent to, another host.
    "Content-Security-Policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; "
        f"connect-src 'self' data: blob:{f' {_HUB}' if os.environ.get('SPACE_ID') else ''}; "
        f"frame-ancestors 'self' {_HUB}"
    ),
}


def guard_requests(app: ASGIApp, service: "Service", translate: Translate) -> ASGIApp:
    """Wrap Gradio's app in ASGI middleware with the limits of the service."""

    async def guarded_app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        if scope["type"] != "http":
            return  # nothing here answers a websocket
        path, root_path = scope["path"], service.settings.root_path
        if f"{path}/".startswith(f"{root_path}/"):  # a reverse proxy has left it on
            path = path.removeprefix(root_path)
        if not path:  # without the slash a browser would look for the page's files beside the root path
            query = scope["query_string"].decode("latin-1")
            await RedirectResponse(f"{root_path}/?{query}".rstrip("?"))(scope, receive, send)
            return
        scope.update(path=path, root_path="")  # Gradio has its root path from `launch`
        await GuardedRequest(app, service, scope, receive, send).answer(translate)

    return guarded_app


class GuardedRequest:
    """One request on its way through; sizes in bytes."""

    def __init__(self, app: ASGIApp, service: "Service", scope: Scope, receive: Receive, send: Send) -> None:
        self.id, self.begun = secrets.token_hex(8), time.monotonic()
        self.client = client_address(scope, service.settings.proxies)
        self.kind, self.received = routes.route_kind(scope["method"], scope["path"]), 0
        self.count_upload: Callable[[int], None] | None = None  # set by the upload route
        self._app, self._service, self._settings = app, service, service.settings
        self._scope, self._receive, self._send = scope, receive, send
        self._page, self._path, self._http = blocks_of(scope), scope["path"], HTTPConnection(scope)
        self._cookie = self._http.cookies.get(COOKIE, "")
        self._is_agents = self._path.startswith(routes.MCP)
        self._error: ServiceError | None = None
        self._sent = self._status = 0
        self._is_whole, self._body_end = False, b""
        scope[GUARDED] = self

    @cached_property
    def _endpoints(self) -> set[str]:
        return {str(fn.api_name) for fn in self._page.fns.values()}

    def may_use(self, session: str) -> bool:
        """Tell whether a session belongs to this request's browser."""
        return self._service.owners.admit(session, self._cookie)

    async def answer(self, translate: Translate) -> None:
        """Pass the request on to Gradio, or refuse it, and log it."""
        self._service.requests.add(self)
        try:
            self._check()
            if self._is_agents:  # its tool makes a request with these headers, which is not counted again
                headers = MutableHeaders(scope=self._scope)
                headers[INTERNAL_TOKEN_HEADER] = self._service.token
                del headers["cookie"]  # the session of that request is shared by all agents
            await self._app(self._scope, self._read, self._write)
        except Exception as error:
            self._error = self._error or self._service_error(error)
            if not self._status:  # the answer has not begun
                response = self._error.response(self._http.headers, translate)
                await response(self._scope, self._receive, self._respond)
        finally:
            self._service.requests.discard(self)
            self._log()

    def _check(self) -> None:
        """Raise ServiceError where the request is not served."""
        service, kind = self._service, self.kind
        token = self._http.headers.get(INTERNAL_TOKEN_HEADER, "").encode()
        if kind is None:
            raise ServiceError("service.closed")
        if kind == "health" or secrets.compare_digest(token, service.token.encode()):
            return
        if sum(other.client == self.client for other in service.requests) > self._settings.at_once > 0:
            raise ServiceError("service.open")
        if kind in ("call", "upload") and service.stopping.is_set():
            raise ServiceError("service.stopping")
        if kind in service.rates and (seconds := math.ceil(service.rates[kind].wait(self.client))):
            raise ServiceError("service.rate", retry_s=seconds, seconds=seconds)
        if kind == "call":
            self._check_size(int(self._http.headers.get("content-length", 0)))
            if queue_status(self._page).waiting >= self._settings.queue:
                raise ServiceError("service.queue")
            endpoint = routes.called_endpoint(self._path)
            if endpoint is not None and endpoint not in self._endpoints | {"predict"}:  # any function, by its number
                raise ServiceError("service.closed")
        if kind == "stream" and not self._is_agents and not self._may_stream():  # all agents share a session
            raise ServiceError("service.closed")

    def _may_stream(self) -> bool:
        """Tell whether the messages asked for are those of a known session, and of no other browser's."""
        name = self._path.rstrip("/").rpartition("/")[2]
        if self._path.startswith(routes.QUEUE_DATA):
            name = self._http.query_params.get("session_hash", "")
        session = name if self._path.startswith(routes.HEARTBEAT) else streaming_session(self._page, name)
        return bool(session) and self.may_use(session)

    def _check_size(self, size: int) -> None:
        if size > self._settings.request_mb * _MB:
            raise ServiceError("service.size", limit=f"{self._settings.request_mb:g}")

    async def _read(self) -> Message:
        """Receive a part of the body, in time and within its limit."""
        if self._is_whole:
            return await self._receive()  # waits for the client to disconnect
        due = self.begun + BODY_TIMEOUT_S * (1 + self.received // _MB)
        try:
            async with asyncio.timeout(due - time.monotonic()):
                message = await self._receive()
            self._is_whole = not message.get("more_body")
            self._count(message.get("body", b""))
        except (TimeoutError, ServiceError) as error:
            # The framework would answer in its own way; `_write` raises this instead.
            self._error = error if isinstance(error, ServiceError) else ServiceError("service.slow")
            raise self._error from None
        return message

    def _count(self, body: bytes) -> None:
        self.received += len(body)
        if self.kind == "call":
            arriving = sum(other.received for other in self._service.requests if other.kind == "call")
            if arriving > _MAX_BODIES * self._settings.request_mb * _MB:
                raise ServiceError("service.queue")
            self._check_size(self.received)
        elif self.count_upload:
            self.count_upload(len(body))
            self._body_end = (self._body_end + body)[-4:]
            if self._is_whole and not self._body_end.rstrip().endswith(b"--"):  # its last file is cut off
                raise ServiceError("upload.lost")
        elif self.received > _SMALL:
            raise ServiceError("service.request", status=413)

    async def _write(self, message: Message) -> None:
        if self._error and not self._status:
            raise self._error
        await self._respond(message)

    async def _respond(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update({**_HEADERS, "X-Request-ID": self.id})
            if self._path == "/" and not self._cookie:
                headers.append("Set-Cookie", new_cookie(self._scope, self._settings.root_path))
        self._sent += len(message.get("body", b""))
        await self._send(message)

    def _service_error(self, error: Exception) -> ServiceError:
        """Tell the client's mistakes from failures of ours; Gradio lets both escape as exceptions.

        Listeners do not fail here: `GuardedBlocks` answers for them. What escapes from a call before is Gradio failing
        to read its arguments: an unknown function, an argument too many.
        """
        if isinstance(error, ServiceError):
            return error
        if isinstance(error, OSError) and self.kind == "asset":  # a name that no file can have
            return ServiceError("service.closed")
        if self.kind == "call" and not isinstance(error, OSError | RuntimeError | MemoryError):
            logger.info("Gradio could not read a call", exc_info=error)
            return ServiceError("service.request")
        logger.exception("A request failed")
        return ServiceError("internal")

    def _log(self) -> None:
        if self._error is None and self.kind not in ("call", "upload") and self._status < 500:
            return
        outcome = self._error.word if self._error else "ok" if self._status < 400 else "error"
        endpoint = routes.log_name(self._path, self._endpoints) if self.kind else "none"
        ms = round((time.monotonic() - self.begun) * 1000, 1)
        numbers = {"ms": ms, "outcome": outcome, "status": self._status}
        log_event(logger, "request", id=self.id, endpoint=endpoint, **numbers, received=self.received, sent=self._sent)
