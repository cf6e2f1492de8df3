"""Top floor, connections before there is a request: how long one may take to ask, and how many an address may open.

Place in the flow: `connection -> is somebody asking? (here) -> door`. The door counts requests; whoever connects and
never asks would not be seen by it, and hold a file of the process for good.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import ClassVar

import uvicorn.config
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignment.ui.service.settings import Settings

PATIENCE = 20.0
"""Seconds from a connection, or the end of an answer, to the last header of a request."""

_MORE = 2  # times as many connections as requests: a browser opens some ahead


def connect_carefully(settings: Settings) -> None:
    """Let uvicorn, which Gradio starts with none of its limits, take connections by these."""
    # Behind another server all connections are its own, and visitors are told apart by the door alone.
    most = 0 if settings.proxies else _MORE * settings.at_once
    protocol = type("Careful", (_Careful,), {"most": most, "open": Counter[str]()})
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol  # type: ignore[assignment]  # a class is taken as well


class _Careful(H11Protocol):
    """A connection that is ended when nobody asks for anything."""

    most: ClassVar = 0
    open: ClassVar = Counter[str]()
    _timer: asyncio.TimerHandle | None = None
    _address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and begin to wait."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.open[self._address] += 1
        if self.open[self._address] > self.most > 0:
            transport.abort()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on waiting until there is a whole request."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        self._stop_waiting()
        self.open[self._address] -= 1
        if not self.open[self._address]:
            del self.open[self._address]
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
