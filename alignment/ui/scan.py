"""Top floor, `app.py --photos`: how far the scan of the folder is, what came of it, and the button for the next one.

Of a new model's starter gallery it says how far that is.

Place in the flow: `PhotoFolder.scan -> words (here) -> scan.js`, which asks for them again while a scan goes on, and
says so to the page when another gallery is searched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from alignment.engine import PhotoFolder, Scan
from alignment.preprocess import sanitize_text
from alignment.ui.results import Value
from alignment.ui.strings import DEFAULT_LANGUAGE, LANGUAGES, count_text, error_text, text

SCAN_ROUTE = "scan"
SHOWN_SKIPPED = 20


def scan_value(photos: PhotoFolder | None, lang: str, *, ready: bool = False) -> Value:
    """Lay a scan out for `scan.js`.

    Args:
        photos: the folder; None where there is none, and then nothing is shown.
        lang: of the page.
        ready: whether the page has found its language, and may ask how the scan goes on.
    """
    if photos is None:
        return {}
    version, scan = photos.version, photos.scan  # in this order: what is newer than it says is asked for again
    if scan.state == "none" and photos.engine.starter.folder is None:  # not begun yet
        scan = replace(scan, state="starter")
    engine = photos.engine
    count = 0 if engine.gallery is engine.starter else len(engine.gallery.pictures)
    numbers = {"folder": sanitize_text(Path(photos.source).name, 60), "count": f"{count:,}"}
    numbers |= {"done": f"{scan.done:,}", "total": f"{scan.total:,}"}
    value: Value = {"lang": lang, "version": version, "ready": ready, "running": scan.running, "url": SCAN_ROUTE}
    value |= {"text": text(lang, _stage(photos.source, scan, count), **numbers)}
    value["more"] = _more(lang, scan, count) if photos.source or scan.running else ""
    if photos.source and scan.state == "starter":
        value["more"] += " " + text(lang, "scan.starter.then", **numbers)
    value |= {"button": text(lang, "scan.rescan") if photos.source else "", "done": scan.done, "total": scan.total}
    shown = [[sanitize_text(skip.name, 200), error_text(lang, skip.error)] for skip in scan.skipped[:SHOWN_SKIPPED]]
    if rest := len(scan.skipped) - len(shown):
        shown.append(["…", text(lang, "drop.more", count=rest)])
    return value | {"skippedTitle": count_text(lang, "drop.skipped", len(scan.skipped)), "skipped": shown}


def scan_route(photos: PhotoFolder) -> Route:
    """Make the endpoint that a page asks while a scan goes on."""

    def answer(request: Request) -> JSONResponse:
        lang = request.query_params.get("lang", "")
        value = scan_value(photos, lang if lang in LANGUAGES else DEFAULT_LANGUAGE, ready=True)
        return JSONResponse(value, headers={"Cache-Control": "no-store"})

    return Route(f"/{SCAN_ROUTE}", answer)


def _stage(source: str, scan: Scan, count: int) -> str:
    """Choose what is said first; the key of a sentence."""
    if scan.state == "starter":
        stages = ("scan.starter.listing", "scan.starter.running", "scan.starter.finishing")
        return stages[0 if not scan.total else 1 if scan.done < scan.total else 2]
    if not source:
        return "scan.starter.failed" if scan.state == "failed" else "scan.starter.ready"
    if scan.state == "running":
        return "scan.listing" if not scan.total else "scan.running" if scan.done < scan.total else "scan.finishing"
    stuck = {"waiting": "scan.waiting", "empty": "scan.empty", "failed": "scan.failed"}
    if scan.state in stuck:
        return stuck[scan.state]
    return "scan.none" if not count else "scan.ready.one" if count == 1 else "scan.ready"


def _more(lang: str, scan: Scan, count: int) -> str:
    """Say what is searched while a scan goes on or has failed, or what the last one has changed."""
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
