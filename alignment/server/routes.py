"""Server, routes: the addresses that the page and its API need. All others are answered by 404.

Gradio serves many more: one fetches any URL for a client (`file=https://...`), one returns an upload to any client that
knows its path, and some are tools for developers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

RouteKind = Literal["asset", "page", "call", "upload", "stream", "health"]
"""A file of the page, the page or a description, work for the model, an upload, the stream of an answer, /healthz."""

HEARTBEAT = "/gradio_api/heartbeat/"
MCP = "/gradio_api/mcp"
QUEUE_DATA = "/gradio_api/queue/data"
UPLOAD = "/gradio_api/upload"

_ASSETS = ("/assets/", "/static/", "/svelte/", "/thumbnails/")
_START = "/gradio_api/startup-events"  # Gradio requests this from itself once it serves
_FILES = (_START, "/theme.css", "/gradio_api/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/pwa_icon")
_STATUS = ("/gradio_api/queue/status", "/scan")
_PAGES = ("/", "/config", "/gradio_api/info", "/gradio_api/openapi.json")
_STREAMS = ("/gradio_api/call/", HEARTBEAT)
_CALLS = ("/gradio_api/call/", "/gradio_api/run/")

OWN_NAMES = frozenset(path.split("/")[1] for path in (*_ASSETS, *_FILES, *_PAGES, "/healthz") if path != "/")
"""First parts of the addresses above; none may begin a root path."""


def strip_root_path(root_path: str, path: str) -> str | None:
    """Take the page's own path off an address where a reverse proxy has left it on.

    Returns:
        The address as the page knows it; None for the root path without its slash, relative to which a browser would
        look for the page's files in the wrong place.
    """
    if not root_path or not f"{path}/".startswith(f"{root_path}/"):
        return path
    return path[len(root_path) :] or None


def route_kind(method: str, path: str) -> RouteKind | None:
    """Classify a request; None if there is nothing at its address."""
    path = path.rstrip("/") or "/"
    if path == "/healthz":
        return "health" if method in ("GET", "HEAD") else None
    if path == MCP or path.startswith(f"{MCP}/"):
        return "call" if method == "POST" else "stream"
    return _read(path) if method in ("GET", "HEAD") else _sent(path) if method == "POST" else None


def _read(path: str) -> RouteKind | None:
    if path.startswith(_ASSETS) or path in (*_FILES, *_STATUS):
        return "asset"
    if path in _PAGES:
        return "page"
    return "stream" if path.startswith(_STREAMS) or path == QUEUE_DATA else None


def _sent(path: str) -> RouteKind | None:
    if path == UPLOAD:
        return "upload"
    if path in ("/gradio_api/cancel", "/gradio_api/reset"):
        return "asset"
    return "call" if path.startswith(_CALLS) or path == "/gradio_api/queue/join" else None


def called_endpoint(path: str) -> str | None:
    """Return the API name in a call's address, such as "search_images"; None for other addresses."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] != ["gradio_api"] or parts[1:2] not in (["call"], ["run"]):
        return None
    return next(iter(parts[3:] if parts[2:3] == ["v2"] else parts[2:]), "")


def log_name(path: str, endpoints: Collection[str]) -> str:
    """Name what is requested, for the log; a name that the client made up becomes "other".

    Args:
        path: of the request.
        endpoints: names of the API.
    """
    parts = [part for part in path.split("/") if part]
    if (endpoint := called_endpoint(path)) is not None:
        return f"{parts[1]}/{endpoint if endpoint in endpoints else 'other'}"
    place = parts[1:] if parts[:1] == ["gradio_api"] else parts
    return "/".join(place[:2]) if place[:1] == ["queue"] else (place or ["page"])[0]
