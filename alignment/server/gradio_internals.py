"""Server, Gradio's insides: the only module that touches private parts of Gradio, Starlette and uvicorn.

Each part says why it is needed, and tests/test_gradio_internals.py has a test for each that fails when an upgrade moves
it. `check_gradio` refuses a version that these tests have not passed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, ClassVar

import gradio as gr
import uvicorn.config
from gradio import routes
from gradio.state_holder import SessionState, StateHolder
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignment.server.sessions import estimate_bytes

SUPPORTED_GRADIO = ("6.31", "6.32")
"""First supported version, first unsupported one; requirements.txt says the same."""

HEADER_TIMEOUT_S = 20.0
"""From a connection, or the end of a response, to the last header of the next request."""


def check_gradio(installed: str = "") -> None:
    """Raise ValueError when the installed Gradio is none that this module was tested with.

    Args:
        installed: a version; by default that of the installed package.
    """
    installed = installed or version("gradio")
    first, last = SUPPORTED_GRADIO
    if not _numbers(first) <= _numbers(installed) < _numbers(last):
        raise ValueError(f"Gradio {installed} is not supported; run: pip install 'gradio>={first},<{last}'")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def blocks_of(scope: Mapping[str, Any]) -> gr.Blocks:
    """Return the page that an ASGI scope belongs to: the middleware is made before Gradio creates its app."""
    return scope["app"].get_blocks()


def set_temp_folder(folder: str) -> str:
    """Let Gradio make its own folders in this one; returns the one before.

    Gradio reads GRADIO_TEMP_DIR when it is imported, and would leave an empty folder in the one of the system.
    """
    before, routes.DEFAULT_TEMP_DIR = routes.DEFAULT_TEMP_DIR, folder
    return before


def event_data(event: gr.EventData) -> dict[str, Any]:
    """Return what a script sent with its event, {} if it is no object; the public attributes fail on other values."""
    return event._data if isinstance(event._data, dict) else {}


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Event:
    """One call of a listener or an API endpoint.

    Attributes:
        endpoint: its API name.
        inputs: as the client sent them; files are not fetched yet.
        session: hash of the client's session, if it has one.
        scope: of the HTTP request that asked for it; empty for none.
        queued_at: `time.monotonic()` when it joined the queue, or now.
    """

    endpoint: str
    inputs: list[Any]
    session: str | None
    scope: MutableMapping[str, Any]
    queued_at: float


class EventBlocks(gr.Blocks):
    """A page whose events pass through `handle_event` before Gradio preprocesses them.

    HTTP middleware does not see events: a request only puts one into the queue. Without this hook Gradio would download
    any URL in the inputs, print exceptions that quote them, and answer events of other browsers' sessions.
    """

    async def handle_event(self, event: Event, proceed: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """Answer an event; `proceed` runs Gradio's own processing. To be overridden."""
        return await proceed()

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Pass the event to `handle_event`."""
        fn = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        queued = self._queue.event_ids_to_events.get(options.get("event_id") or "")
        event = Event(
            endpoint=str(fn.api_name),
            inputs=inputs,
            session=options.get("session_hash"),
            scope=getattr(getattr(options.get("request"), "request", None), "scope", None) or {},
            queued_at=queued.enqueue_time if queued else time.monotonic(),
        )
        return await self.handle_event(event, partial(super().process_api, block_fn, inputs, *args, **options))

    def launch(self, *args: Any, **options: Any) -> Any:
        """Launch as Gradio does, with `LightSessions`."""
        served = super().launch(*args, **options)
        LightSessions.install(self)
        return served


# ---------------------------------------------------------------- queue


class EventQueue:
    """Gradio's queue of events: its lengths, for /healthz, the queue limit and a clean stop, and its leftovers."""

    def __init__(self, page: gr.Blocks) -> None:
        self._queue: Any = page._queue

    @property
    def num_waiting(self) -> int:
        """Events that wait for a worker."""
        return len(self._queue)

    @property
    def num_unfinished(self) -> int:
        """Events that wait, and those being answered."""
        return self.num_waiting + self._queue.get_active_worker_count()

    @property
    def has_undelivered(self) -> bool:
        """Whether an answer is ready that its client has not fetched."""
        return any(list(self._queue.pending_event_ids_session.values()))

    @property
    def is_broken(self) -> bool:
        """Whether the queue has ended by itself, after an error of its own."""
        return bool(self._queue.stopped)

    def has_session(self, session: str) -> bool:
        """Tell whether there are messages for a session; Gradio breaks off the answer to a client without any."""
        return session in self._queue.pending_messages_per_session

    def session_of(self, event_id: str) -> str:
        """Return the session of an event, "" if the event is unknown."""
        if event := self._queue.event_ids_to_events.get(event_id):
            return str(event.session_hash)
        return next((name for name, ids in self._queue.pending_event_ids_session.items() if event_id in ids), "")

    def keep_every_session(self) -> None:
        """Let no session be evicted by Gradio.

        Gradio keeps messages of 2,000 sessions and evicts the oldest, even one with an event in the queue, whose turn
        then ends the whole queue with a KeyError. `QueueJanitor` evicts idle ones instead.
        """
        self._queue.pending_messages_per_session = dict(self._queue.pending_messages_per_session)

    def idle_sessions(self) -> dict[str, bool]:
        """List sessions without an unfinished event -> whether an answer waits for its client."""
        unfinished = self._queue.event_ids_to_events
        pending = self._queue.pending_event_ids_session.items()
        return {name: bool(ids) for name, ids in pending if not any(id in unfinished for id in ids)}

    def drop_session(self, session: str) -> None:
        """Forget a session's messages; Gradio itself never does. In the server's event loop only."""
        self._queue.pending_event_ids_session.pop(session, None)
        self._queue.pending_messages_per_session.pop(session, None)


# ---------------------------------------------------------------- sessions


class LightSessions(StateHolder):
    """Gradio's sessions, without a configuration of every component for each, and bounded in bytes.

    Gradio describes every component of the page for each new session, and opens one for every API call that names none:
    15 ms and 0.3 MB for a query of 1 ms. The descriptions serve deep links, which this page does not make.
    """

    max_bytes = 10**9
    """Estimated bytes of all sessions; beyond it the least recently used ones are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, int] = {}

    @classmethod
    def install(cls, page: gr.Blocks) -> LightSessions:
        """Replace the sessions of a launched page."""
        sessions = cls()
        sessions.set_blocks(page)
        page.app.state_holder = sessions
        return sessions

    def __getitem__(self, session_id: str) -> SessionState:
        """Return a session, new where it is unknown."""
        if session_id in self.session_data:
            return super().__getitem__(session_id)
        session = SessionState(SimpleNamespace(default_config=self.blocks.default_config, blocks={}))  # type: ignore[arg-type]
        if session_id in self.blocks._queue.event_ids_to_events:  # a call without a session: its id is the event's
            return session
        self.session_data[session_id] = session
        return super().__getitem__(session_id)

    def update(self, session_id: str) -> None:
        """Mark a session as used, measure it, and evict the least recently used where there is too much."""
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
                # The components hold a state's content twice more: as a value and in their configuration.
                self._sizes[session_id] = 3 * estimate_bytes(list(self.session_data[session_id].state_data.values()))
            while len(self.session_data) > 1 and (self._is_heavy() or len(self.session_data) > self.capacity):
                self._drop(self._least_valuable(session_id))

    def expire(self, seconds: float) -> None:
        """Drop sessions that were not used for so long, and keep to `max_bytes`."""
        limit = datetime.now() - timedelta(seconds=seconds)
        with self.lock:
            for session_id in [name for name, used in self.time_last_used.items() if used < limit]:
                self._drop(session_id)

    def _is_heavy(self) -> bool:
        return sum(self._sizes.values()) > self.max_bytes

    def _least_valuable(self, current: str) -> str:
        """Choose a session to evict: empty ones first, so that opening many does not evict others' uploads."""
        oldest = next(iter(self.session_data))
        empty = (name for name in self.session_data if not self._sizes.get(name) and name != current)
        return oldest if self._is_heavy() else next(empty, oldest)

    def _drop(self, session_id: str) -> None:
        for table in (self.session_data, self._sizes, self.time_last_used):
            table.pop(session_id, None)


def expire_sessions(page: gr.Blocks, seconds: float, max_bytes: int) -> None:
    """Drop a page's sessions that were not used for so long, and bound the memory of the others from now on."""
    if isinstance(page.state_holder, LightSessions):
        page.state_holder.max_bytes = max_bytes
        page.state_holder.expire(seconds)


# ---------------------------------------------------------------- tools for agents


def harden_mcp(page: gr.Blocks) -> None:
    """Let a launched page's MCP tools answer in JSON, and open no file of this machine that an agent names.

    Gradio writes answers as Python's `str`. Its client in this process uploads the file at any path in the arguments;
    here only the bare path is passed on, which is an earlier upload or refused.
    """
    tools: Any = page.mcp_server_obj
    if tools is None:
        return
    text = tools.types.TextContent

    def to_json(answers: list[Any], root_url: str) -> list[Any]:
        return [text(type="text", text=json.dumps(answer, ensure_ascii=False)) for answer in answers]

    tools.convert_strings_to_filedata = lambda value, positions: _bare_paths(value)
    tools.postprocess_output_data = to_json


def _bare_paths(value: Any) -> Any:
    """Replace each file object by its path, at any depth."""
    if isinstance(value, dict):
        path = value.get("path")
        return path if isinstance(path, str) else {name: _bare_paths(part) for name, part in value.items()}
    return [_bare_paths(part) for part in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- connections


def limit_connections(max_per_address: int) -> None:
    """Let uvicorn serve with `HeaderTimeoutProtocol`; `launch` does not pass options on to it.

    Args:
        max_per_address: connections of one address; 0 for any number.
    """
    protocol = type("LimitedProtocol", (HeaderTimeoutProtocol,), {"limit": max_per_address, "open": Counter[str]()})
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]  # uvicorn takes a class as well


class HeaderTimeoutProtocol(H11Protocol):
    """A connection that is closed when no request arrives in time.

    uvicorn limits the time between requests, not the time that one takes to arrive: a client that sends a header a
    minute would hold a socket of the process for ever, before any middleware sees it.
    """

    limit: ClassVar = 0
    open: ClassVar = Counter[str]()
    _timer: asyncio.TimerHandle | None = None
    _address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection and start the timer."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.open[self._address] += 1
        if self.open[self._address] > self.limit > 0:
            transport.abort()
        else:
            self._restart()

    def data_received(self, data: bytes) -> None:
        """Stop the timer once a request is complete, start it after the response."""
        super().data_received(data)
        self._restart()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the count."""
        self._stop()
        self.open[self._address] -= 1
        if not self.open[self._address]:
            del self.open[self._address]
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _restart(self) -> None:
        if self._is_answering():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._time_out)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if not self._is_answering():
            self.transport.abort()
