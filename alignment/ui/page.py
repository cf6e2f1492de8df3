"""UI, page: puts header, tabs, dialog and footer together, and binds the events that concern all of them.

An address such as `?tab=pictures&q=a+red+bicycle&lang=en` opens a tab: `q` is a query, captions (one a line), or the id
of a gallery picture. While a scan of `PhotoFolder` runs, `scan.js` asks the route "scan" for its progress, and sends
"renew" when another gallery is searched.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from alignment.engine import AlignmentEngine, PhotoFolder, Scan
from alignment.preprocess import sanitize_text
from alignment.server import GuardedBlocks, Settings
from alignment.server.gradio_internals import event_data
from alignment.ui.api import add_api
from alignment.ui.captions_tab import CaptionsTab
from alignment.ui.evaluate_tab import EvaluateTab
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog, ExplanationState
from alignment.ui.matrix_tab import MatrixTab
from alignment.ui.photos_tab import PhotosTab
from alignment.ui.pictures_tab import PicturesTab
from alignment.ui.strings import DEFAULT_LANG, LANGUAGES, labels, pick_language, strings, text
from alignment.ui.tab import Tab
from alignment.ui.uploads import skipped_value
from alignment.ui.widgets import Changes, Value, on_event, widget

SCAN_ROUTE = "scan"
SHOWN_SKIPPED = 20


def build_page(
    engine: AlignmentEngine, lang: str = DEFAULT_LANG, queue: int = Settings.queue, photos: PhotoFolder | None = None
) -> gr.Blocks:
    """Lay the page out in the language `lang`; a browser that prefers the other one changes it on loading.

    `queue` requests may wait. `photos` is the folder whose gallery the engine searches, if it is one.
    """
    with GuardedBlocks(title=text(lang, "title"), analytics_enabled=False) as page:
        content = PageContent(engine, lang, photos)
        content.bind_events(page)
        add_api(engine)
    # The service refuses requests beyond `queue` in the visitor's language; those that arrive just then fit in here.
    page.queue(max_size=2 * queue, default_concurrency_limit=4, api_open=False)
    return page


class PageContent:
    """What is on the page; made inside a Gradio block."""

    def __init__(self, engine: AlignmentEngine, lang: str, photos: PhotoFolder | None) -> None:
        self.engine, self.lang, self.photos = engine, lang, photos
        self.first_version = photos.version if photos else 0  # of the gallery that the page is built with
        self.dialog = ExplanationDialog(engine)
        of_gallery, of_starter = Examples(engine), Examples(engine, engine.starter)
        self.searching: list[Tab] = [kind(engine, of_gallery, self.dialog) for kind in (CaptionsTab, PicturesTab)]
        kinds = (MatrixTab, PhotosTab, EvaluateTab)
        self.tabs: list[Tab] = [*self.searching, *(kind(engine, of_starter, self.dialog) for kind in kinds)]
        with gr.Row(elem_classes=["al-header"]):
            self.header = widget("plain", _header_value(lang), elem_id="header")
            choices = [(name, code) for code, name in LANGUAGES.items()]
            self.link = widget("link", self._link_value(lang), elem_id="link", min_width=0)
            look: dict[str, Any] = {"elem_id": "language", "min_width": 0, "scale": 0}
            self.language = gr.Radio(choices, value=lang, label=_language_label(lang), **look)
        self.dialog.build(lang)
        self.scan = widget("scan", scan_value(photos, lang), elem_id="scan", visible=photos is not None)
        with gr.Tabs(selected=PicturesTab.key if photos and photos.source else None) as self.row:
            for tab in self.tabs:
                tab.build(self.language, lang)
        self.footer = widget("plain", _footer_value(engine, lang), elem_id="footer")

    def bind_events(self, page: gr.Blocks) -> None:
        """Bind the handlers."""
        everything = [part for tab in self.tabs for part in tab.outputs]
        places = [tab.place for tab in self.tabs]
        frame = [self.header, self.link, self.language, *places, self.scan, self.footer, self.dialog.dialog]
        inputs = [self.language, self.dialog.state, *(part for tab in self.tabs for part in tab.inputs)]
        on_event(self.language.change, self._translate, inputs, [*frame, *everything])

        renewed = [self.scan, self.footer, *(part for tab in self.searching for part in tab.outputs)]
        queries = [self.language, *(part for tab in self.searching for part in tab.inputs)]
        on_event(self.scan.renew, self._renew, queries, renewed, work="search")
        on_event(self.scan.rescan, self._rescan, [self.language], [self.scan])

        linked = [part for tab in self.tabs for part in tab.url_outputs]
        on_event(page.load, self._load, [], [self.language, self.scan, self.row, *linked], work="search")
        for tab in self.tabs:
            if isinstance(tab, PicturesTab):
                on_event(tab.sample.pick, lambda: {self.row: gr.Tabs(selected=PhotosTab.key)}, [], [self.row])

    def _translate(self, lang: str, explained: ExplanationState, *values: Any) -> Changes:
        """Draw everything at once: several listeners would run in turn and overwrite what is typed meanwhile."""
        return {
            self.header: _header_value(lang),
            self.link: self._link_value(lang),
            self.language: gr.update(label=_language_label(lang)),
            **{tab.place: gr.update(label=text(lang, f"{tab.key}.tab")) for tab in self.tabs},
            **self._gallery_status(lang),
            self.dialog.dialog: self.dialog.translate(lang, explained),
            **_translate_tabs(self.tabs, lang, values),
        }

    def _renew(self, event: gr.EventData, lang: str, *values: Any) -> Changes:
        """Show the gallery that has replaced the one before; the visitor's queries stay."""
        lang = pick_language(event_data(event), "", lang)
        status = self._gallery_status(lang)  # before the tabs: a gallery that comes meanwhile is asked for again
        return {**status, **_translate_tabs(self.searching, lang, values)}

    def _rescan(self, lang: str) -> Changes:
        if self.photos is not None:
            self.photos.start()
        return {self.scan: scan_value(self.photos, lang, ready=True)}

    def _load(self, request: gr.Request) -> Changes:
        """Show what the address asks for, in the browser's language."""
        query = request.query_params
        lang = pick_language(query, request.headers.get("accept-language", ""), self.lang)
        changes: Changes = {self.scan: scan_value(self.photos, lang, ready=True) | {"version": self.first_version}}
        if lang != self.lang:
            changes[self.language] = lang
        for tab in self.tabs:
            if tab.key == query.get("tab"):
                changes[self.row] = gr.Tabs(selected=tab.key)
                if asked := query.get("q", "").strip():
                    changes |= tab.load_from_url(lang, asked)
        return changes

    def _gallery_status(self, lang: str) -> Changes:
        scan = scan_value(self.photos, lang, ready=True)
        return {self.scan: scan, self.footer: _footer_value(self.engine, lang)}

    def _link_value(self, lang: str) -> Value:
        return {"tabs": [tab.key for tab in self.tabs], "lang": lang, "labels": labels(lang, "link.")}


def _translate_tabs(tabs: Sequence[Tab], lang: str, values: Sequence[Any]) -> Changes:
    changes: Changes = {}
    rest = iter(values)
    for tab in tabs:
        changes |= tab.translate(lang, *islice(rest, len(tab.inputs)))
    return changes


def _header_value(lang: str) -> Value:
    return {"lang": "zh-CN" if lang == "zh" else lang, "title": text(lang, "title"), "line": text(lang, "tagline")}


def _language_label(lang: str) -> str:
    """Say "language" in every language, that of the page first."""
    return " / ".join(dict.fromkeys([text(lang, "language"), *(words["language"] for words in strings().values())]))


def _footer_value(engine: AlignmentEngine, lang: str) -> Value:
    gallery = engine.gallery
    numbers = {"pictures": f"{len(gallery.pictures):,}", "captions": f"{len(gallery.captions):,}"}
    notes = [text(lang, "footer.model", model=Path(engine.encoder.name).name, **numbers), text(lang, "footer.private")]
    return {"notes": notes, "link": {"text": text(lang, "footer.api"), "href": "?view=api"}}


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
        value = scan_value(photos, lang if lang in LANGUAGES else DEFAULT_LANG, ready=True)
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
