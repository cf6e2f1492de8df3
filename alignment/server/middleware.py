"""Server, middleware: every HTTP request passes here before Gradio sees it.

Place in the flow: `request -> known route? -> stopping? -> rate, number, size -> Gradio -> our headers, a log line`.
"""

import asyncio
import logging
import math
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignment.server import routes
from alignment.server.errors import PAGE_LANGUAGE, ServiceError, Translate
from alignment.server.gradio_internals import blocks_of, has_messages, queue_status, session_of_event
from alignment.server.limits import ConcurrencyLimiter, TokenBucket, client_address
from alignment.server.logging import log_event
from alignment.server.page import BEGUN, OWNERS, REQUEST_ID
from alignment.server.sessions import SessionOwners, cookie_of, new_cookie
from alignment.server.uploads import CLIENT

if TYPE_CHECKING:
    from alignment.server.service import Service

logger = logging.getLogger(__name__)

INTERNAL_TOKEN_HEADER = "x-alignment-internal"
"""Carries a random token in requests that this process makes to itself for its MCP tools; they pass without limits."""

BODY_TIMEOUT_S = 60.0
"""For each megabyte of a body."""

_MB = 2**20
_MAX_BODIES = 4  # requests of the largest size that may be arriving at once
_UPLOAD_RATE = 4  # times the rate: a client's photos come one by one
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


@dataclass
class RequestContext:
    """One request on its way through; sizes in bytes."""

    scope: Scope
    page: gr.Blocks
    kind: routes.RouteKind | None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    begun: float = field(default_factory=time.monotonic)
    received: int = 0
    sent: int = 0
    status: int = 0
    error: ServiceError | None = None

    @property
    def endpoints(self) -> set[str]:
        """Names of the page's functions."""
        return {str(fn.api_name) for fn in self.page.fns.values()}


class RequestGuard:
    """ASGI middleware with the limits of the service."""

    def __init__(self, app: ASGIApp, service: "Service", translate: Translate) -> None:
        """Wrap Gradio's app."""
        self._app, self._service, self._translate = app, service, translate
        self._settings, self._token = service.settings, service.token.encode()
        rate = self._settings.rate
        self._rate, self._upload_rate = TokenBucket(rate), TokenBucket(rate * _UPLOAD_RATE)
        self._open, self._owners = ConcurrencyLimiter(self._settings.at_once), SessionOwners()
        self._arriving = 0  # bytes of bodies that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return  # nothing here answers a websocket
        path = routes.strip_root_path(self._settings.root_path, scope["path"])
        if path is None:
            query = scope["query_string"].decode("latin-1")
            await RedirectResponse(f"{self._settings.root_path}/?{query}".rstrip("?"))(scope, receive, send)
            return
        scope.update(path=path, root_path="")  # Gradio has its root path from `launch`
        context = self._context(scope)
        is_work = False
        with self._open.request(scope[CLIENT]) as has_room:
            try:
                self._check(context, has_room)
                is_work = context.kind in ("call", "upload")
                self._service.requests += is_work
                await self._app(scope, self._reading(context, receive), self._writing(context, send))
            except Exception as error:
                context.error = _service_error(error, context)
                await self._refuse(context, receive, send)
            finally:
                self._service.requests -= is_work
                self._arriving -= context.received if context.kind == "call" else 0
                self._log(context)

    def _context(self, scope: Scope) -> RequestContext:
        context = RequestContext(scope, blocks_of(scope), routes.route_kind(scope["method"], scope["path"]))
        client = client_address(scope, self._settings.proxies)
        scope.update({CLIENT: client, REQUEST_ID: context.id, BEGUN: context.begun, OWNERS: self._owners})
        if scope["path"].startswith(routes.MCP):
            # Gradio passes an agent's headers on to its own requests for the tool: they have been counted here, and
            # their session is shared by all agents.
            headers = [(name, value) for name, value in scope["headers"] if name != b"cookie"]
            scope["headers"] = [*headers, (INTERNAL_TOKEN_HEADER.encode(), self._token)]
        return context

    def _check(self, context: RequestContext, has_room: bool) -> None:
        headers, kind = Headers(scope=context.scope), context.kind
        token, is_agent = headers.get(INTERNAL_TOKEN_HEADER, ""), context.scope["path"].startswith(routes.MCP)
        if kind is None:
            raise ServiceError("service.closed")
        if kind == "health" or (not is_agent and secrets.compare_digest(token.encode(), self._token)):
            return
        if not has_room:
            raise ServiceError("service.open")
        if kind in ("call", "upload") and self._service.stopping.is_set():
            raise ServiceError("service.stopping")
        announced = headers.get("content-length", "")
        if kind == "call" and announced.isdecimal() and int(announced) > self._settings.request_mb * _MB:
            raise self._too_large()
        if kind in ("call", "upload", "page"):
            rate = self._upload_rate if kind == "upload" else self._rate
            if seconds := math.ceil(rate.wait(context.scope[CLIENT])):
                raise ServiceError("service.rate", retry_s=seconds, seconds=seconds)
        if kind == "call":
            self._check_call(context)
        if kind == "stream" and not is_agent:  # all agents share a session
            self._check_session(context)

    def _check_call(self, context: RequestContext) -> None:
        if queue_status(context.page).waiting >= self._settings.queue:
            raise ServiceError("service.queue")
        endpoint = routes.called_endpoint(context.scope["path"])
        if endpoint is not None and endpoint not in context.endpoints | {"predict"}:  # any function, by its number
            raise ServiceError("service.closed")

    def _check_session(self, context: RequestContext) -> None:
        """Refuse messages of unknown sessions, and those of other browsers' sessions."""
        path = context.scope["path"].rstrip("/")
        name, is_heartbeat = path.rpartition("/")[2], path.startswith(routes.HEARTBEAT)
        if path == routes.QUEUE_DATA:
            session = QueryParams(context.scope["query_string"]).get("session_hash", "")
        else:
            session = name if is_heartbeat else session_of_event(context.page, name)
        is_known = is_heartbeat or has_messages(context.page, session)
        if not is_known or not self._owners.admit(session, cookie_of(context.scope)):
            raise ServiceError("service.closed")

    def _too_large(self) -> ServiceError:
        return ServiceError("service.size", limit=f"{self._settings.request_mb:g}")

    def _reading(self, context: RequestContext, receive: Receive) -> Receive:
        is_whole, left = False, BODY_TIMEOUT_S

        async def read() -> Message:
            nonlocal is_whole, left
            if is_whole:
                return await receive()  # waits for the client to disconnect
            begun, megabytes = time.monotonic(), context.received // _MB
            try:
                message = await asyncio.wait_for(receive(), left)
                self._count(context, len(message.get("body", b"")))
            except (TimeoutError, ServiceError) as error:
                # The framework would answer in its own way; `_writing` raises this instead.
                context.error = error if isinstance(error, ServiceError) else ServiceError("service.slow")
                raise context.error from None
            waited = time.monotonic() - begun
            left = BODY_TIMEOUT_S if context.received // _MB > megabytes else left - waited
            is_whole = not message.get("more_body")
            return message

        return read

    def _count(self, context: RequestContext, size: int) -> None:
        context.received += size
        limit = self._settings.request_mb * _MB
        if context.kind == "call":
            self._arriving += size
            if self._arriving > _MAX_BODIES * limit:
                raise ServiceError("service.queue")
            if context.received > limit:
                raise self._too_large()
        elif context.kind != "upload" and context.received > _SMALL:  # `UploadQuota` counts uploads
            raise ServiceError("service.request", status=413)

    def _writing(self, context: RequestContext, send: Send) -> Send:
        async def write(message: Message) -> None:
            if context.error and not context.status:
                raise context.error
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({**_HEADERS, "X-Request-ID": context.id})
                if context.scope["path"] == "/" and not cookie_of(context.scope):
                    headers.append("Set-Cookie", new_cookie(context.scope, self._settings.root_path))
            context.sent += len(message.get("body", b""))
            await send(message)

        return write

    async def _refuse(self, context: RequestContext, receive: Receive, send: Send) -> None:
        error, headers = context.error, Headers(scope=context.scope)
        if error is None or context.status:  # the answer has begun
            return
        if error.status == 503 and PAGE_LANGUAGE in headers:
            error.status = 429  # for a 503 Gradio's page shows a message of its own, in English
        context.error = None  # lets the answer pass
        await error.response(headers, self._translate)(context.scope, receive, self._writing(context, send))
        context.error = error

    def _log(self, context: RequestContext) -> None:
        if context.error is None and context.kind not in ("call", "upload") and context.status < 500:
            return
        outcome = context.error.code if context.error else "ok" if context.status < 400 else "error"
        endpoint = routes.log_name(context.scope["path"], context.endpoints) if context.kind else "none"
        ms, status = round((time.monotonic() - context.begun) * 1000, 1), context.status
        numbers = {"ms": ms, "outcome": outcome, "status": status, "received": context.received, "sent": context.sent}
        log_event(logger, "request", id=context.id, endpoint=endpoint, **numbers)


def _service_error(error: Exception, context: RequestContext) -> ServiceError:
    """Tell the client's mistakes from failures of ours; Gradio lets both escape as exceptions.

    Listeners do not fail here: `GuardedBlocks` answers for them. What escapes from a call before is Gradio failing to
    read its arguments: an unknown function, an argument too many.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, OSError) and context.kind == "asset":  # a name that no file can have
        return ServiceError("service.closed")
    if context.kind == "call" and not isinstance(error, OSError | RuntimeError | MemoryError):
        logger.info("Gradio could not read a call", exc_info=error)
        return ServiceError("service.request")
    logger.exception("A request failed")
    return ServiceError("internal")
