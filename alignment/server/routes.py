"""Server, routes: the addresses that the page and its API need. All others are answered by 404.

Gradio serves many more: one fetches any URL for a client (`file=https://...`), one returns an upload to any client that
knows its path, and some are tools for developers.
"""

import re
from collections.abc import Collection
from typing import Literal

RouteKind = Literal["asset", "page", "call", "upload", "stream", "health"]
"""A file of the page, the page or a description, work for the model, an upload, the stream of an answer, /healthz."""

HEARTBEAT = "/gradio_api/heartbeat/"
MCP = "/gradio_api/mcp"
QUEUE_DATA = "/gradio_api/queue/data"
UPLOAD = "/gradio_api/upload"

_ROUTES: dict[str, RouteKind] = {
    # method and address; Gradio requests startup-events from itself once it serves
    r"(GET|HEAD) /(assets|static|svelte|thumbnails)/.*": "asset",
    r"(GET|HEAD) /(theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon|scan)": "asset",
    r"(GET|HEAD) /gradio_api/(theme\.css|queue/status|startup-events)": "asset",
    r"(GET|HEAD) /(config|gradio_api/info|gradio_api/openapi\.json)?": "page",
    r"(GET|HEAD) /gradio_api/(queue/data|call/.*|heartbeat/.*)": "stream",
    r"(GET|HEAD) /healthz": "health",
    r"POST /gradio_api/(cancel|reset)": "asset",
    r"POST /gradio_api/upload": "upload",
    r"POST /gradio_api/(queue/join|call/.*|run/.*|mcp(/.*)?)": "call",
    r"(?!POST).* /gradio_api/mcp(/.*)?": "stream",
}

OWN_NAMES = frozenset(
    {"assets", "static", "svelte", "thumbnails", "config", "gradio_api", "healthz"}
    | {"theme.css", "favicon.ico", "manifest.json", "robots.txt", "pwa_icon"}
)
"""First parts of the addresses above; none may begin a root path."""


def route_kind(method: str, path: str) -> RouteKind | None:
    """Classify a request; None if there is nothing at its address."""
    request = f"{method} {path.rstrip('/') or '/'}"
    return next((kind for pattern, kind in _ROUTES.items() if re.fullmatch(pattern, request, re.DOTALL)), None)


def called_endpoint(path: str) -> str | None:
    """Return the API name in a call's address, such as "search_images"; None for other addresses."""
    found = re.match(r"/gradio_api/(?:call|run)/(?:v2/)?([^/]*)", path)
    return found[1] if found else None


def log_name(path: str, endpoints: Collection[str]) -> str:
    """Name what is requested, for the log; a name that is none of `endpoints` becomes "other"."""
    parts = path.removeprefix("/gradio_api").strip("/").split("/")
    if (endpoint := called_endpoint(path)) is not None:
        return f"{parts[0]}/{endpoint if endpoint in endpoints else 'other'}"
    return "/".join(parts[:2]) if parts[0] == "queue" else parts[0] or "page"
