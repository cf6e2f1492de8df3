"""Server, page: every event of the page and every API call passes here before Gradio touches its inputs.

Place in the flow: `middleware -> Gradio's queue -> GuardedBlocks (owner, files, log) -> listener`.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from alignment.preprocess import InputError
from alignment.server.errors import ServiceError
from alignment.server.logging import log_event
from alignment.server.middleware import GUARDED, GuardedRequest

logger = logging.getLogger(__name__)

MAX_PATH = 4096  # characters
_MAX_NAME = 255  # bytes of a part of a path


class GuardedBlocks(gr.Blocks):
    """Gradio's page, but it fetches nothing from the network for a client, and fails without quoting the inputs.

    HTTP middleware does not see events: a request only puts one into the queue. Gradio passes each to `process_api`,
    which by itself downloads any URL in the inputs, prints exceptions that quote them, and answers events of other
    browsers' sessions.
    """

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Check an event, let Gradio process it, and log how long it took and how it ended."""
        scope = getattr(getattr(options.get("request"), "request", None), "scope", None) or {}  # of the HTTP request
        request: GuardedRequest | None = scope.get(GUARDED)
        begun, outcome, answer = request.begun if request else time.monotonic(), "cancelled", {}
        try:
            _check(inputs, options.get("session_hash"), request)
            answer = await super().process_api(block_fn, inputs, *args, **options)
            outcome = "ok"
            return answer
        except InputError as error:
            outcome = "refused"
            raise gr.Error(str(error), print_exception=False) from error
        except gr.Error as error:
            outcome, error.print_exception = "refused", False
            raise
        except Exception as error:
            outcome = "error"
            logger.exception("A request failed")
            raise gr.Error(str(ServiceError("internal")), print_exception=False) from error
        finally:
            if not answer.get("is_generating"):
                endpoint = str((self.fns[block_fn] if isinstance(block_fn, int) else block_fn).api_name)
                ms = round((time.monotonic() - begun) * 1000, 1)
                log_event(logger, "answer", id=request.id if request else "", endpoint=endpoint, ms=ms, outcome=outcome)


def _check(inputs: list[Any], session: str | None, request: GuardedRequest | None) -> None:
    """Raise InputError on another browser's session, and on files that Gradio would fetch or cannot look for."""
    if request and session and not request.may_use(session):
        raise ServiceError("service.session")
    for path in _paths(inputs):
        if is_http_url_like(path):  # by which Gradio decides whether to download it
            raise ServiceError("api.address")
        if isinstance(path, str) and not is_possible_path(path):
            raise ServiceError("upload.lost")


def _paths(value: object) -> Iterator[object]:
    """Yield what Gradio could take for a file's path, at any depth."""
    if isinstance(value, dict):
        yield value.get("path")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _paths(part)


def is_possible_path(path: str) -> bool:
    """Tell whether a file system could have this path; to resolve one of a megabyte takes minutes."""
    if len(path) > MAX_PATH or "\0" in path:
        return False
    return all(len(part.encode(errors="replace")) <= _MAX_NAME for part in path.split("/"))
