"""Top floor, what comes of each request that Gradio has taken: a line in the log, and no failure that says too much."""

from __future__ import annotations

import logging
import time
from typing import Any

import gradio as gr
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from alignment.ui.service import refusals
from alignment.ui.service.logs import note
from alignment.ui.service.owners import Owners, cookie_of

logger = logging.getLogger(__name__)

REQUEST_ID, OWNERS = "alignment.request", "alignment.owners"
"""Under which names the door puts them into the scope of a request."""

_FAILED = "That did not work, and it is not your fault; try again."
_ANOTHERS = "This session belongs to another browser; open the page again."


async def _say_what_is_wrong(request: Request, error: Exception) -> Response:
    """Answer a request that the framework refuses in our form, and quote nothing of it."""
    status = error.status_code if isinstance(error, HTTPException) else 422
    if isinstance(error, HTTPException) and status >= 500:
        return await http_exception_handler(request, error)
    return (refusals.closed() if status == 404 else refusals.unusable(status)).response(request.headers)


REFUSED_BY_THE_FRAMEWORK: dict[Any, Any] = dict.fromkeys((RequestValidationError, HTTPException), _say_what_is_wrong)
"""Its exception handlers."""


class Answers(gr.Blocks):
    """Gradio's page; how its functions end is logged, and what a visitor sent is not."""

    async def process_api(self, block_fn: Any, *args: Any, **more: Any) -> dict[str, Any]:
        """Do as Gradio does; what is nobody's fault ends in a sentence."""
        begun, outcome, answer = time.monotonic(), "cancelled", {}
        request = more.get("request")
        scope = getattr(getattr(request, "request", None), "scope", None) or {}
        try:
            _check_owner(scope, more.get("session_hash"))
            answer = await super().process_api(block_fn, *args, **more)
            outcome = "ok"
            return answer
        except gr.Error as error:
            outcome, error.print_exception = "refused", False
            raise
        except Exception as error:
            outcome = "error"
            logger.exception("A request failed")
            raise gr.Error(_FAILED, print_exception=False) from error
        finally:
            if not answer.get("is_generating"):
                self._log(block_fn, more.get("event_id"), scope, begun, outcome)

    def _log(self, block_fn: Any, event_id: str | None, scope: Any, begun: float, outcome: str) -> None:
        event = self._queue.event_ids_to_events.get(event_id or "")
        fn = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        note(
            logger,
            "answer",
            id=scope.get(REQUEST_ID, ""),
            endpoint=str(fn.api_name),
            ms=round((time.monotonic() - (event.enqueue_time if event else begun)) * 1000, 1),
            outcome=outcome,
        )


def _check_owner(scope: Any, session: str | None) -> None:
    owners: Owners | None = scope.get(OWNERS)
    if owners and session and not owners.admits(session, cookie_of(scope)):
        raise gr.Error(_ANOTHERS, print_exception=False)
