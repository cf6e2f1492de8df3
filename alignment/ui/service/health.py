"""Top floor, what a supervisor asks: whether the service is well."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse

from alignment import __version__
from alignment.engine import AlignmentEngine
from alignment.ui.service.running import Running, broken, waiting, working

HEALTH_ROUTE = "/healthz"


def health(engine: AlignmentEngine, running: Running) -> Callable[[Request], JSONResponse]:
    """Make the endpoint: 200 while requests are taken, 503 once the service is stopping or has broken down."""

    def answer(request: Request) -> JSONResponse:
        page = request.app.get_blocks()
        status = "stopping" if running.stopping else "broken" if broken(page) else "ok"
        said = {
            "status": status,
            "version": __version__,
            "model": Path(engine.encoder.name).name,
            "fingerprint": engine.encoder.fingerprint,
            "images": len(engine.gallery.pictures),
            "captions": len(engine.gallery.captions),
            "uptime_s": round(time.monotonic() - running.since, 1),
            "queue": waiting(page),
            "working": working(page) - waiting(page),
        }
        return JSONResponse(said, 200 if status == "ok" else 503, {"Cache-Control": "no-store"})

    return answer
