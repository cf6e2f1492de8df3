"""Server, Gradio's insides: the only module that touches private parts of Gradio, Starlette and uvicorn.

Each part says what breaks without it; tests/test_gradio_internals.py has a test for each that fails when an upgrade
moves it. `check_gradio` refuses a version that these tests have not passed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple


def _import_gradio() -> None:
    """Import Gradio, but let it write no type stubs: it makes those of all its components anew at every start.

    They are 1.1 s of the 5.1 s that all imports of the app take. No editor needs them where the app runs.
    """
    spec = find_spec("gradio")
    if "gradio" in sys.modules or spec is None or spec.loader is None:
        return
    sys.modules["gradio"] = package = module_from_spec(spec)  # its modules can be imported now, before it is run
    component_meta: Any = import_module("gradio.component_meta")
    component_meta.create_or_modify_pyi = lambda *of: None
    spec.loader.exec_module(package)


_import_gradio()

import gradio as gr
import uvicorn.config
from gradio import routes
from gradio.state_holder import SessionState, StateHolder
from gradio_client.utils import is_file_obj
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignment.server.sessions import estimate_bytes

SUPPORTED_GRADIO = ("6.31", "6.32")  # the minor version that was tested, and the next one; as in requirements.txt
_POLL_S, _PROGRESS_POLL_S = 0.005, 0.2  # Gradio polls its queue each 0.001 and 0.01 s: a twentieth of a core when idle
HEADER_TIMEOUT_S = 20.0  # from a connection, or the end of a response, to the last header of the next request


def check_gradio(installed: str = gr.__version__) -> None:
    """Raise ValueError when the installed Gradio is none that this module was tested with."""
    first, last = SUPPORTED_GRADIO
    if not installed.startswith(f"{first}."):
        raise ValueError(f"Gradio {installed} is not supported; run: pip install 'gradio>={first},<{last}'")


def blocks_of(scope: Mapping[str, Any]) -> gr.Blocks:
    """Return the page that an ASGI scope belongs to: the middleware is made before Gradio creates its app."""
    return scope["app"].get_blocks()


@contextmanager
def temp_folder(folder: str) -> Iterator[None]:
    """Let Gradio, and the rest of this process, make temporary files in this folder.

    Gradio reads GRADIO_TEMP_DIR when it is imported, and would leave an empty folder in the one of the system.
    """
    before = os.environ.get("GRADIO_TEMP_DIR", ""), tempfile.tempdir, routes.DEFAULT_TEMP_DIR
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = routes.DEFAULT_TEMP_DIR = folder
    try:
        yield
    finally:
        os.environ["GRADIO_TEMP_DIR"], tempfile.tempdir, routes.DEFAULT_TEMP_DIR = before


def event_data(event: gr.EventData) -> dict[str, Any]:
    """Return what a script sent with its event, {} if it is no object; the public attributes fail on other values."""
    return event._data if isinstance(event._data, dict) else {}


class QueueStatus(NamedTuple):
    """Numbers of events that wait and that are being answered; whether an answer is not fetched yet; a broken queue."""

    waiting: int
    active: int
    undelivered: bool
    broken: bool


def queue_status(page: gr.Blocks) -> QueueStatus:
    """Read a page's queue, for /healthz, the queue limit and a clean stop."""
    queue = page._queue
    undelivered = any(list(queue.pending_event_ids_session.values()))
    return QueueStatus(len(queue), queue.get_active_worker_count(), undelivered, queue.stopped)


def streaming_session(page: gr.Blocks, name: str) -> str:
    """Return the session of this name, or of the event with this id, if messages of it are left to fetch, else "".

    Gradio breaks off the streams of others.
    """
    queue = page._queue
    session = next((session for session, ids in queue.pending_event_ids_session.items() if name in ids), name)
    return session if session in queue.pending_messages_per_session else ""


class QueueJanitor:
    """Forgets sessions whose answers are delivered, or not fetched for long, in the place of Gradio's queue.

    Gradio never forgets a session's entry, and keeps messages of 2,000 sessions: it evicts the oldest, even one with an
    event in the queue, whose turn then ends the whole queue with a KeyError.
    """

    def __init__(self, page: gr.Blocks, max_age_s: float, max_idle: int) -> None:
        """Let an answer wait for `max_age_s` to be fetched, in `max_idle` sessions; beyond that forget the oldest."""
        queue: Any = page._queue
        queue.pending_messages_per_session = dict(queue.pending_messages_per_session)
        queue.sleep_when_free, queue.progress_update_sleep_when_free = _POLL_S, _PROGRESS_POLL_S
        self._queue, self._max_age_s, self._max_idle = queue, max_age_s, max_idle
        self._since: dict[str, float] = {}  # idle session -> first seen

    def collect(self) -> None:
        """Forget what is due; in the server's event loop only."""
        ids, messages = self._queue.pending_event_ids_session, self._queue.pending_messages_per_session
        unfinished, now = self._queue.event_ids_to_events.keys(), time.monotonic()
        idle = [name for name in messages | ids if unfinished.isdisjoint(ids.get(name, ()))]
        self._since = {name: self._since.get(name, now) for name in idle}
        excess = len(idle) - self._max_idle
        for place, name in enumerate(sorted(idle, key=self._since.__getitem__)):
            if not ids.get(name) or now - self._since[name] > self._max_age_s or place < excess:
                for table in (ids, messages, self._since):
                    table.pop(name, None)


class LightSessions(StateHolder):
    """Gradio's sessions, without a configuration of every component for each, and bounded in bytes and in age.

    Gradio describes every component of the page for each new session, and opens one for every API call that names none:
    15 ms and 0.3 MB for a query of 1 ms. The descriptions serve deep links, which this page does not make.
    """

    def __init__(self, page: gr.Blocks, max_bytes: float, max_idle_s: float) -> None:
        """Drop a page's sessions after `max_idle_s`, and beyond `max_bytes`, as estimated, those used longest ago."""
        super().__init__()
        self.max_bytes, self.max_idle_s, self._sizes = max_bytes, max_idle_s, dict[str, int]()
        self._unfinished = page._queue.event_ids_to_events
        self.set_blocks(page)
        page.app.state_holder = self
        self.blocks: Any = SimpleNamespace(default_config=page.default_config, blocks={})  # that a session describes

    def __getitem__(self, session_id: str) -> SessionState:
        """Return a session, new where it is unknown."""
        if session_id not in self.session_data and session_id in self._unfinished:
            return SessionState(self.blocks)  # is not kept: a call without a session has its event's id for one
        return super().__getitem__(session_id)

    def update(self, session_id: str) -> None:
        """Mark a session as used, measure it, and evict the least recently used where there is too much."""
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
                # The components hold a state's content twice more: as a value and in their configuration.
                self._sizes[session_id] = 3 * estimate_bytes(list(self.session_data[session_id].state_data.values()))
            while (surplus := self._surplus(session_id)) is not None:
                self._drop(surplus)

    def delete_all_expired_state(self) -> None:
        """Drop sessions that were idle for too long; Gradio calls this every second."""
        limit = datetime.now() - timedelta(seconds=self.max_idle_s)
        with self.lock:
            for session_id in [name for name, used in self.time_last_used.items() if used < limit]:
                self._drop(session_id)

    def _surplus(self, current: str) -> str | None:
        """Choose a session to evict, if any; of too many an empty one, so that opening many evicts no uploads."""
        oldest = next((name for name in self.session_data if name != current), None)
        if sum(self._sizes.values()) > self.max_bytes:
            return oldest
        empty = (name for name in self.session_data if not self._sizes.get(name) and name != current)
        return next(empty, oldest) if len(self.session_data) > self.capacity else None

    def _drop(self, session_id: str) -> None:
        for table in (self.session_data, self._sizes, self.time_last_used):
            table.pop(session_id, None)


def harden_mcp(page: gr.Blocks) -> None:
    """Let a page's MCP tools answer in JSON, and open no file of this machine that an agent names.

    Gradio writes answers as Python's `str`. Its client in this process uploads what is a file object in the arguments
    from any path; here only the bare path is passed on, which is an earlier upload or refused.
    """
    tools: Any = page.mcp_server_obj
    if tools is None:
        return
    text = partial(tools.types.TextContent, type="text")
    tools.convert_strings_to_filedata = lambda value, positions: _bare_paths(value)
    tools.postprocess_output_data = lambda answers, root_url: [
        text(text=json.dumps(answer, ensure_ascii=False)) for answer in answers
    ]


def _bare_paths(value: Any) -> Any:
    """Replace each file object by its path, the innermost first: what its path becomes could make another of it."""
    if isinstance(value, dict):
        value = {name: _bare_paths(part) for name, part in value.items()}
        return value["path"] if is_file_obj(value) else value
    return [_bare_paths(part) for part in value] if isinstance(value, list) else value


def configure_uvicorn(max_connections: int) -> None:
    """Let uvicorn serve with `HeaderTimeoutProtocol`, and log as the process does; `launch` passes it no options.

    An address may hold so many connections, 0 for any number. uvicorn's own handlers would write another format.
    """
    HeaderTimeoutProtocol.max_connections = max_connections
    uvicorn.config.HTTP_PROTOCOLS["auto"] = HeaderTimeoutProtocol  # type: ignore[assignment]  # a class does as well
    uvicorn.config.LOGGING_CONFIG["loggers"] = {}


class HeaderTimeoutProtocol(H11Protocol):
    """A connection that is closed when no request arrives in time, or when its address has too many.

    uvicorn limits the time between requests, not the time that one takes to arrive: a client that sends a header a
    minute would hold a socket of the process for ever, before any middleware sees it.
    """

    max_connections: ClassVar = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer, or close a connection too many."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        held = sum(getattr(other, "address", None) == self.address for other in self.connections)
        if held > self.max_connections > 0:
            transport.abort()
        else:
            self._set_timer(True)

    def data_received(self, data: bytes) -> None:
        """Stop the timer once a request is complete, start it after the response."""
        super().data_received(data)
        self._set_timer(self.cycle is None or self.cycle.response_complete)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._set_timer(False)
        super().connection_lost(exc)

    def _set_timer(self, runs: bool) -> None:
        if runs and self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)
        elif self._timer and not runs:
            self._timer.cancel()
            self._timer = None
