"""Top floor, the parts of the service put together: what `app.py` gives to Gradio, and how it runs it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from anyio.to_thread import run_sync
from starlette.middleware import Middleware
from starlette.routing import Route

from alignment.engine import AlignmentEngine
from alignment.ui.service.answers import REFUSED_BY_THE_FRAMEWORK
from alignment.ui.service.connections import connect_carefully
from alignment.ui.service.door import PASSWORD, Door
from alignment.ui.service.folder import sweep
from alignment.ui.service.health import HEALTH_ROUTE, health
from alignment.ui.service.memory import give_back
from alignment.ui.service.room import UPLOAD_ROUTE, Room, upload
from alignment.ui.service.running import Leftovers, Running, every
from alignment.ui.service.settings import Settings
from alignment.ui.sessions import Sessions
from alignment.ui.widgets import ASSETS

_OFTEN, _SELDOM = 5.0, 30.0  # seconds between two looks at the queue, and at files and sessions
_ANSWERS_KEPT = 300.0  # seconds that an answer waits for a program to come for it
_MOST_SESSIONS = 10_000


class Service:
    """What stands around the page: limits before it, tidiness behind it."""

    def __init__(self, settings: Settings | None = None, folder: Path | None = None) -> None:
        """Prepare it.

        Args:
            settings: its limits.
            folder: of this process alone, where uploads lie; None where it is not for this process to tidy up.
        """
        self.settings, self.folder = settings or Settings(), folder
        self.running = Running()
        self._room = Room(self.settings)
        self._password = secrets.token_urlsafe(24)

    def launch_options(self, engine: AlignmentEngine, *routes: Route) -> dict[str, Any]:
        """Say to Gradio's `launch` what it needs.

        Args:
            engine: the service is asked about.
            routes: of the page, beside ours.
        """
        ours = [
            Route(HEALTH_ROUTE, health(engine, self.running)),
            Route(UPLOAD_ROUTE, upload, methods=["POST"]),
            Route(f"{UPLOAD_ROUTE}/", upload, methods=["POST"]),
        ]
        connect_carefully(self.settings)
        door = Middleware(Door, settings=self.settings, running=self.running, room=self._room, password=self._password)
        return {
            "app_kwargs": {
                "routes": [*ours, *routes],
                "middleware": [door],
                "lifespan": self._tidying,
                "exception_handlers": REFUSED_BY_THE_FRAMEWORK,
            },
            "root_path": self.settings.root_path,
            "head": "<link rel='icon' href='favicon.ico'>\n"
            f"<script>\n{(ASSETS / 'refusals.js').read_text('utf-8')}</script>",
            "state_session_capacity": _MOST_SESSIONS,
        }

    def let_tools_in(self, page: gr.Blocks) -> None:
        """Let a launched page's MCP tools ask without limits: each agent's request has been counted before it asks."""
        tools: Any = page.mcp_server_obj
        if tools is None:
            return
        make = tools._get_or_create_client

        def known() -> Any:
            client = make()
            client.headers[PASSWORD] = self._password
            return client

        tools._get_or_create_client = known

    def serve(self, page: gr.Blocks) -> None:
        """Run a launched page until the process is told to stop."""
        self.running.serve(page, self.settings.stop_seconds)

    @asynccontextmanager
    async def _tidying(self, app: Any) -> AsyncIterator[None]:
        """Tidy up for as long as the server runs."""
        leftovers = Leftovers(app.get_blocks())

        async def often() -> None:
            leftovers.clear(_ANSWERS_KEPT)

        async def seldom() -> None:
            await self._forget(app)

        tasks = [asyncio.create_task(every(seconds, work)) for seconds, work in ((_OFTEN, often), (_SELDOM, seldom))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forget(self, app: Any) -> None:
        seconds = 60 * self.settings.keep_minutes
        if isinstance(app.state_holder, Sessions):
            app.state_holder.most_bytes = int(self.settings.sessions_mb * 2**20)
            app.state_holder.forget(seconds)
        if self.folder:
            await run_sync(partial(sweep, self.folder, seconds))
        self._room.tidy()
        await run_sync(give_back)
