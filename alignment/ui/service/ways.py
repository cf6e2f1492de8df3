"""Top floor, which addresses the service answers at: those that its page and its API need, and no other.

Gradio serves many more, among them one that fetches any address on the network for a visitor (`file=https://...`), one
that hands an upload to whoever knows its path, and tools for those who develop pages.
"""

from __future__ import annotations

from typing import Literal

Way = Literal["asset", "look", "ask", "upload", "answer", "health"]
"""What a request is: a file of the page, a description, something to work on, a picture, the wait for an answer."""

_ASSETS = ("/assets/", "/static/", "/svelte/", "/thumbnails/")
_START = "/gradio_api/startup-events"  # Gradio asks itself for this once it serves
_FILES = (_START, "/theme.css", "/gradio_api/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon")
_LOOKS = ("/", "/config", "/gradio_api/info", "/gradio_api/openapi.json")
_STREAMS = ("/gradio_api/call/", "/gradio_api/heartbeat/")
_ASKS = ("/gradio_api/call/", "/gradio_api/run/")
_TOOLS = "/gradio_api/mcp"

OWN_NAMES = frozenset(path.split("/")[1] for path in (*_ASSETS, *_FILES, *_LOOKS, "/healthz") if path != "/")
"""First parts of the addresses above."""


def below(root_path: str, path: str) -> str | None:
    """Take the path of the page off an address, where a server in front has left it on.

    Returns:
        The address as the page knows it; None for the page's own path without a slash, relative to which its files
        would be looked for in the wrong place.
    """
    if not root_path or not f"{path}/".startswith(f"{root_path}/"):
        return path
    return path[len(root_path) :] or None


def way_of(method: str, path: str) -> Way | None:
    """Tell what a request is; None if there is nothing at its address."""
    path = path.rstrip("/") or "/"
    if path == "/healthz":
        return "health" if method in ("GET", "HEAD") else None
    if path == _TOOLS or path.startswith(f"{_TOOLS}/"):
        return "ask" if method == "POST" else "answer"
    return _read(path) if method in ("GET", "HEAD") else _sent(path) if method == "POST" else None


def _read(path: str) -> Way | None:
    if path.startswith(_ASSETS) or path in _FILES or path == "/gradio_api/queue/status":
        return "asset"
    if path in _LOOKS:
        return "look"
    return "answer" if path.startswith(_STREAMS) or path == "/gradio_api/queue/data" else None


def _sent(path: str) -> Way | None:
    if path == "/gradio_api/upload":
        return "upload"
    if path in ("/gradio_api/cancel", "/gradio_api/reset"):
        return "asset"
    return "ask" if path.startswith(_ASKS) or path == "/gradio_api/queue/join" else None


def endpoint_of(path: str, known: set[str]) -> str:
    """Name what is asked for, for the log; of what a visitor made up only that they did.

    Args:
        path: of the request.
        known: names of endpoints.
    """
    parts = [part for part in path.split("/") if part]
    place = parts[1:] if parts[:1] == ["gradio_api"] else parts
    if place[:1] in (["call"], ["run"]):
        name = next((part for part in place[1:] if part in known), "other")
        return f"{place[0]}/{name}"
    return place[0] if len(place) == 1 else "/".join(place[:2]) if place[:1] == ["queue"] else (place or ["page"])[0]
