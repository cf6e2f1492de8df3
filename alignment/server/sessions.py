"""Server, sessions: values that the page keeps for each visitor, and the browser that a session belongs to.

A browser gets a cookie of random letters with the page. The first cookie that uses a session owns it; other browsers
are refused, even with the session's hash. A client without cookies is protected by the random hash alone.
"""

import secrets
from collections import OrderedDict
from dataclasses import is_dataclass
from typing import Any, Self

import gradio as gr
from starlette.types import Scope
from torch import Tensor

COOKIE = "alignment_visitor"

_MAX_SESSIONS = 20_000  # twice as many as Gradio keeps


class Immutable:
    """A value that is replaced and never changed, so that a copy of it may be itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def session_state(value: Immutable) -> gr.State:
    """Make a component that keeps a value for each session; `value` at first."""
    state = gr.State()
    state.value = lambda: value  # Gradio takes a dataclass itself apart and copies it at every event that renews it
    return state


def estimate_bytes(value: object) -> int:
    """Estimate the memory of a session's value: strings, bytes and tensors, at any depth."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return sum(map(estimate_bytes, parts))


class SessionOwners:
    """The cookie that each session belongs to, in bounded memory."""

    def __init__(self) -> None:
        self.cookies = OrderedDict[str, str]()  # session -> cookie, the least recently used first

    def admit(self, session: str, cookie: str) -> bool:
        """Tell whether a client may use a session; the first with a cookie becomes its owner."""
        owner = self.cookies.pop(session, cookie)
        if owner:
            self.cookies[session] = owner
        if len(self.cookies) > _MAX_SESSIONS:
            self.cookies.popitem(last=False)
        return secrets.compare_digest(owner.encode(), cookie.encode())


def new_cookie(scope: Scope, root_path: str = "") -> str:
    """Return a Set-Cookie header with a new cookie, valid also where another site frames the page."""
    cookie = f"{COOKIE}={secrets.token_urlsafe(24)}; Path={root_path}/; HttpOnly"
    secure = scope["scheme"] == "https" or (b"x-forwarded-proto", b"https") in scope["headers"]
    return f"{cookie}; {'Secure; SameSite=None; Partitioned' if secure else 'SameSite=Lax'}"
