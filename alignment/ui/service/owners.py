"""Top floor, whose session it is: what one browser began no other may look into, even if it learns the session's name.

The page gives a browser a cookie of random letters, which says nothing and ends with the browser. Whoever first uses a
session owns it by that cookie. Where a browser keeps none, the session's random name alone protects it.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import cookie_parser
from starlette.types import Scope

COOKIE = "alignment_visitor"
HEARTBEAT = "/gradio_api/heartbeat/"

_REMEMBERED = 20_000  # sessions; Gradio itself keeps fewer


class Owners:
    """Which cookie each session belongs to."""

    def __init__(self) -> None:
        self._cookies: OrderedDict[str, str] = OrderedDict()

    def admits(self, session: str, cookie: str) -> bool:
        """Tell whether a browser may use a session; the first with a cookie owns it. Programs have none."""
        owner = self._cookies.get(session, cookie)
        if owner:
            self._cookies[session] = owner
            self._cookies.move_to_end(session)
        if len(self._cookies) > _REMEMBERED:
            self._cookies.popitem(last=False)
        return secrets.compare_digest(owner, cookie)


def cookie_of(scope: Scope) -> str:
    """Read a browser's cookie; "" if it has none."""
    sent = b"; ".join(value for name, value in scope["headers"] if name == b"cookie").decode("latin-1")
    value = cookie_parser(sent).get(COOKIE, "")
    return value if value.isascii() else ""


def new_cookie(scope: Scope, root_path: str = "") -> str:
    """Write the header that gives a browser its cookie for a page, also where the page is framed by another one."""
    cookie = f"{COOKIE}={secrets.token_urlsafe(24)}; Path={root_path}/; HttpOnly"
    secure = scope["scheme"] == "https" or (b"x-forwarded-proto", b"https") in scope["headers"]
    return f"{cookie}; {'Secure; SameSite=None; Partitioned' if secure else 'SameSite=Lax'}"


def session_of(scope: Scope, queue: Any) -> str | None:
    """Find out which session a request wants to listen to; None where it listens to none.

    Args:
        scope: of the request.
        queue: Gradio's.
    """
    path, name = scope["path"].rstrip("/"), scope["path"].rstrip("/").rpartition("/")[2]
    if path == "/gradio_api/queue/data":
        return QueryParams(scope["query_string"]).get("session_hash", "")
    if path.startswith(HEARTBEAT):
        return name
    if not path.startswith("/gradio_api/call/"):
        return None  # agents' tools have sessions of their own
    event = queue.event_ids_to_events.get(name)
    owners = (session for session, ids in queue.pending_event_ids_session.items() if name in ids)
    return event.session_hash if event else next(owners, "")
