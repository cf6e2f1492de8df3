"""Top floor, the door: every request passes here before Gradio sees it.

Place in the flow: `request -> is there anything? -> are we open? -> how often, how many, how large? -> Gradio -> answer
with our headers, and a line in the log`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import gradio as gr
from gradio.route_utils import FnIndexInferError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignment.ui.service import refusals
from alignment.ui.service.answers import OWNERS, REQUEST_ID
from alignment.ui.service.limits import Open, Rates, address_of
from alignment.ui.service.logs import note
from alignment.ui.service.owners import HEARTBEAT, Owners, cookie_of, new_cookie, session_of
from alignment.ui.service.refusals import PAGE_LANGUAGE, Refusal
from alignment.ui.service.room import CLIENT, ROOM, Room
from alignment.ui.service.running import Running, waiting
from alignment.ui.service.settings import Settings
from alignment.ui.service.ways import Way, below, endpoint_of, way_of

logger = logging.getLogger(__name__)

PASSWORD = "x-alignment-inside"
"""What this process itself asks, for its agents, comes with this header."""

_MB = 2**20
_PATIENCE = 60.0  # seconds that are waited for each megabyte of what is being sent
_BODIES = 4  # requests of the largest size that may be arriving at once
_UPLOADS = 4  # times as often as anything else: a visitor's photos come one by one
_SMALL = 2**16  # bytes; what nobody would send more of than this
_HUB = "https://huggingface.co https://*.huggingface.co https://*.hf.space"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Gradio's scripts make functions from text; whatever they do, nothing is loaded from, or sent to, anywhere else.
    "Content-Security-Policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; "
        f"connect-src 'self' data: blob:{f' {_HUB}' if os.environ.get('SPACE_ID') else ''}; "
        f"frame-ancestors 'self' {_HUB}"
    ),
}


def _mistake(error: Exception, way: Way | None) -> Refusal | None:
    """Tell what the client did wrong, where Gradio breaks off instead of saying so; None for a failure of ours.

    Our own functions fail in `Answers`.
    """
    if isinstance(error, KeyError | FnIndexInferError):  # no such function
        return refusals.closed()
    if isinstance(error, OSError) and way == "asset":  # a name that no file can have
        return refusals.closed()
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if isinstance(error, TypeError) and last and last.tb_frame.f_code.co_name == "construct_args":
        return refusals.unusable()  # an argument too many or too few
    return None


@dataclass
class _Passage:
    """One request on its way through."""

    scope: Scope
    way: Way | None
    page: gr.Blocks  # as the scope is passed on, parts of Gradio put themselves into the page's place
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    begun: float = field(default_factory=time.monotonic)
    received: int = 0
    sent: int = 0
    status: int = 0
    refusal: Refusal | None = None


class Door:
    """See the module; ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings, running: Running, room: Room, password: str) -> None:
        self._app, self._settings, self._running, self._room = app, settings, running, room
        self._password = password
        self._rates, self._upload_rates = Rates(settings.rate), Rates(settings.rate * _UPLOADS)
        self._open, self._owners = Open(settings.at_once), Owners()
        self._arriving = 0  # bytes of requests that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # a websocket: nothing here speaks it
        path = below(self._settings.root_path, scope["path"])
        if path is None:
            await RedirectResponse(
                f"{self._settings.root_path}/?{scope['query_string'].decode('latin-1')}".rstrip("?")
            )(scope, receive, send)
            return
        # From here on the page lies at the top; Gradio itself adds its path to the addresses that it tells.
        scope.update(path=path, root_path="")
        passage = _Passage(scope, way_of(scope["method"], scope["path"]), scope["app"].get_blocks())
        address = address_of(scope, self._settings.proxies)
        scope.update({ROOM: self._room, CLIENT: address, REQUEST_ID: passage.id, OWNERS: self._owners})
        with self._open.one(address) as room:
            try:
                self._check(passage, address, room)
                with self._running.one_more() if passage.way in ("ask", "upload") else nullcontext():
                    await self._app(scope, self._reading(passage, receive), self._writing(passage, send))
            except Refusal as refusal:
                passage.refusal = refusal
                await self._refuse(passage, receive, send)
            except Exception as error:
                passage.refusal = _mistake(error, passage.way)
                if passage.refusal is None:
                    logger.exception("A request failed")
                    passage.refusal = refusals.failed()
                await self._refuse(passage, receive, send)
            finally:
                self._arriving -= passage.received if passage.way == "ask" else 0
                self._log(passage)

    # ------------------------------------------------------------ who may pass

    def _check(self, passage: _Passage, address: str, room: bool) -> None:
        headers = Headers(scope=passage.scope)
        if passage.way is None:
            raise refusals.closed()
        if passage.way == "health" or self._is_inside(headers):
            return
        if not room:
            raise refusals.too_many_open()
        if passage.way in ("ask", "upload"):
            if self._running.stopping:
                raise refusals.stopping()
            self._check_size(passage)
        if passage.way in ("ask", "upload", "look"):
            rates = self._upload_rates if passage.way == "upload" else self._rates
            if wait := rates.wait(address):
                raise refusals.too_often(wait)
        self._check_turn(passage)

    def _is_inside(self, headers: Headers) -> bool:
        return secrets.compare_digest(headers.get(PASSWORD, "").encode(), self._password.encode())

    def _check_turn(self, passage: _Passage) -> None:
        page = passage.page
        if passage.way == "ask" and waiting(page) >= self._settings.queue:
            raise refusals.queue_full()
        if passage.way == "answer":
            session = session_of(passage.scope, page._queue)
            if session is None:
                return
            known = HEARTBEAT in passage.scope["path"] or session in page._queue.pending_messages_per_session
            if not known or not self._owners.admits(session, cookie_of(passage.scope)):
                raise refusals.closed()  # of a session that is not there Gradio breaks off half-way

    def _check_size(self, passage: _Passage) -> None:
        announced = Headers(scope=passage.scope).get("content-length", "")
        if passage.way == "ask" and announced.isdecimal() and int(announced) > self._settings.request_mb * _MB:
            raise refusals.too_large(self._settings.request_mb)

    # ------------------------------------------------------------ what comes in

    def _reading(self, passage: _Passage, receive: Receive) -> Receive:
        whole, patience = False, _PATIENCE

        async def read() -> Message:
            nonlocal whole, patience
            if whole:
                return await receive()  # waits for the client to hang up
            try:
                begun, before = time.monotonic(), passage.received // _MB
                message = await asyncio.wait_for(receive(), patience)
                waited = time.monotonic() - begun  # what is done with it meanwhile is not the sender's time
                self._count(passage, len(message.get("body", b"")))
                patience = _PATIENCE if passage.received // _MB > before else patience - waited
            except TimeoutError:
                passage.refusal = refusals.too_slow()
                raise passage.refusal from None
            except Refusal as refusal:
                passage.refusal = refusal  # Gradio's framework makes something else of it
                raise
            whole = not message.get("more_body")
            return message

        return read

    def _count(self, passage: _Passage, size: int) -> None:
        passage.received += size
        if passage.way == "upload":
            return  # the room counts
        limit = self._settings.request_mb * _MB
        if passage.way == "ask":
            self._arriving += size
            if self._arriving > _BODIES * limit:
                raise refusals.queue_full()
            if passage.received > limit:
                raise refusals.too_large(self._settings.request_mb)
        elif passage.received > _SMALL:
            raise refusals.unusable(413)

    # ------------------------------------------------------------ what goes out

    def _writing(self, passage: _Passage, send: Send) -> Send:
        async def write(message: Message) -> None:
            if passage.refusal and not passage.status:
                raise passage.refusal
            if message["type"] == "http.response.start":
                passage.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({**_HEADERS, "X-Request-ID": passage.id})
                if passage.scope["path"] == "/" and not cookie_of(passage.scope):
                    headers.append("Set-Cookie", new_cookie(passage.scope, self._settings.root_path))
            passage.sent += len(message.get("body", b""))
            await send(message)

        return write

    async def _refuse(self, passage: _Passage, receive: Receive, send: Send) -> None:
        refusal, headers = passage.refusal, Headers(scope=passage.scope)
        if refusal is None or passage.status:  # too late to say anything
            return
        if refusal.status == 503 and PAGE_LANGUAGE in headers:
            refusal.status = 429  # of 503 Gradio's page makes a sentence of its own, in English
        passage.refusal = None  # the answer itself may pass
        await refusal.response(headers)(passage.scope, receive, self._writing(passage, send))
        passage.refusal = refusal

    def _log(self, passage: _Passage) -> None:
        if passage.refusal is None and passage.way not in ("ask", "upload") and passage.status < 500:
            return
        known = {str(fn.api_name) for fn in passage.page.fns.values()}
        note(
            logger,
            "request",
            id=passage.id,
            endpoint=endpoint_of(passage.scope["path"], known) if passage.way else "none",
            ms=round((time.monotonic() - passage.begun) * 1000, 1),
            outcome=passage.refusal.reason if passage.refusal else "ok" if passage.status < 400 else "error",
            status=passage.status,
            received=passage.received,
            sent=passage.sent,
        )
