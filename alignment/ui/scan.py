"""UI, scan: the progress of `app.py --photos`, or of a new model's starter gallery, and the button for another scan.

Place in the flow: `PhotoFolder.scan -> words (here) -> scan.js`. The script asks the route for them while a scan runs,
and sends "renew" when another gallery is searched.
"""

from dataclasses import replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from alignment.engine import PhotoFolder, Scan
from alignment.preprocess import sanitize_text
from alignment.ui.strings import DEFAULT_LANGUAGE, LANGUAGES, text
from alignment.ui.uploads import skipped_value
from alignment.ui.widgets import Value

SCAN_ROUTE = "scan"
SHOWN_SKIPPED = 20


def scan_value(photos: PhotoFolder | None, lang: str, *, ready: bool = False) -> Value:
    """Lay a scan out for `scan.js`; `ready` tells that the page has chosen its language, and may ask for progress."""
    if photos is None:
        return {}
    version, scan = photos.version, photos.scan  # in this order: a newer gallery is then asked for again
    if scan.state == "none" and photos.engine.starter.folder is None:  # not begun yet
        scan = replace(scan, state="starter")
    engine = photos.engine
    count = 0 if engine.gallery is engine.starter else len(engine.gallery.pictures)
    numbers = {"folder": sanitize_text(Path(photos.source).name, 60), "count": f"{count:,}"}
    numbers |= {"done": f"{scan.done:,}", "total": f"{scan.total:,}"}
    more = _details(lang, scan, count) if photos.source or scan.running else ""
    if photos.source and scan.state == "starter":
        more += " " + text(lang, "scan.starter.then", **numbers)
    return {
        "lang": lang,
        "version": version,
        "ready": ready,
        "running": scan.running,
        "url": SCAN_ROUTE,
        "text": text(lang, _stage(photos.source, scan, count), **numbers),
        "more": more,
        "button": text(lang, "scan.rescan") if photos.source else "",
        "done": scan.done,
        "total": scan.total,
        **skipped_value(lang, scan.skipped, SHOWN_SKIPPED),
    }


def scan_route(photos: PhotoFolder) -> Route:
    """Make the endpoint that a page asks while a scan runs."""

    def answer(request: Request) -> JSONResponse:
        lang = request.query_params.get("lang", "")
        value = scan_value(photos, lang if lang in LANGUAGES else DEFAULT_LANGUAGE, ready=True)
        return JSONResponse(value, headers={"Cache-Control": "no-store"})

    return Route(f"/{SCAN_ROUTE}", answer)


def _stage(source: str, scan: Scan, count: int) -> str:
    """Return the key of the first sentence."""
    step = 0 if not scan.total else 1 if scan.done < scan.total else 2
    if scan.state == "starter":
        return ("scan.starter.listing", "scan.starter.running", "scan.starter.finishing")[step]
    if not source:
        return "scan.starter.failed" if scan.state == "failed" else "scan.starter.ready"
    if scan.state == "running":
        return ("scan.listing", "scan.running", "scan.finishing")[step]
    ready = "scan.none" if not count else "scan.ready.one" if count == 1 else "scan.ready"
    return {"waiting": "scan.waiting", "empty": "scan.empty", "failed": "scan.failed"}.get(scan.state, ready)


def _details(lang: str, scan: Scan, count: int) -> str:
    """Say what is searched while a scan runs or has failed, else what it has changed."""
    if scan.state == "starter":
        return text(lang, "scan.starter.search")
    if scan.state != "done":
        return text(lang, "scan.search", count=f"{count:,}") if count else text(lang, "scan.search.starter")
    changes = {"added": scan.added, "changed": scan.changed, "removed": scan.removed}
    if scan.added == count:  # the first scan
        return ""
    if not any(changes.values()):
        return text(lang, "scan.unchanged")
    return text(lang, "scan.changes", **{name: f"{number:,}" for name, number in changes.items()})
