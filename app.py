"""The page: `python app.py`, then open http://127.0.0.1:7860.

Place in the flow: the top. Arguments, layout and wiring only; the tabs are in `alignment.ui`, what they ask is answered
by `alignment.engine`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from os.path import expanduser
from pathlib import Path
from threading import Timer
from typing import Any

if __name__ == "__main__":
    gc.disable()  # a million objects are made now that stay; to look for rubbish among them is a fifth of the start

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: nothing leaves this machine
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it writes to the log in a way of its own
os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # whom to believe about a visitor's address is said by --proxies
# A thread that spins while it waits keeps others from their work, and a query takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where matplotlib is installed Gradio asks for its backend at every event, and at the first imports all of it to tell.
os.environ.setdefault("MPLBACKEND", "agg")
# Gradio works out statistics of the last 10,000 events after each one, also where nobody may see them.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**12))

if os.environ.get("SPACES_ZERO_GPU") == "true":  # on Hugging Face's ZeroGPU; it wants to come before torch
    import spaces  # noqa: F401

if __name__ == "__main__" and not (os.environ.get("GRADIO_SERVER_PORT") or "7860").isdecimal():
    sys.exit("error: GRADIO_SERVER_PORT is no port: choose a number from 1 to 65535.")  # Gradio breaks off at it

import gradio as gr
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from alignment.atomic import describe_error
from alignment.bundled import GALLERY, MODEL, bundled
from alignment.engine import MAX_ZIP_MB, AlignmentEngine, PhotoFolder, SecondModel
from alignment.engine.photo_folder import photo_folder
from alignment.engine.starter import starter_gallery
from alignment.gallery import Gallery, Remote, add_index_options, progress_bar
from alignment.model import DualEncoder
from alignment.picture_limits import add_size_options, use_size_options
from alignment.preprocess import InputError
from alignment.server import (
    GuardedBlocks,
    Service,
    Settings,
    add_options,
    check_address,
    check_gradio,
    configure_logging,
    harden_mcp,
    host_in_url,
    limit_arenas,
    process_folder,
    read_port,
    redirect_server_logs,
)
from alignment.server.gradio_internals import event_data
from alignment.ui.api import add_api
from alignment.ui.captions_tab import CaptionsTab
from alignment.ui.evaluate_tab import EvaluateTab
from alignment.ui.examples import THUMBNAIL_ROUTE, Examples
from alignment.ui.explanation import ExplanationDialog
from alignment.ui.matrix_tab import MatrixTab
from alignment.ui.permalinks import arrivals, link_value, load_from_url
from alignment.ui.photos_tab import PhotosTab
from alignment.ui.pictures_tab import PicturesTab
from alignment.ui.scan import scan_route, scan_value
from alignment.ui.strings import DEFAULT_LANGUAGE, LANGUAGES, error_for_browser, pick_language, strings, text
from alignment.ui.theme import theme
from alignment.ui.widgets import ASSETS, ICON, Tab, on_event, styles, widget

ROOT = Path(__file__).resolve().parent
WARMUP_DELAY_S = 2.0
"""Seconds that the processors belong to whoever opens the page, before pictures are prepared for."""

_HELP = "Search pictures by caption and captions by picture, and look at the similarity matrix behind both."
_ENVIRONMENT = """\
environment, for a Space or a service; an option wins over its variable:
  ALIGNMENT_MODEL      as --model
  ALIGNMENT_REVISION   as --revision
  ALIGNMENT_GALLERY    as --gallery
  ALIGNMENT_COMPARE    as --compare
  ALIGNMENT_INDEX      as --index; ALIGNMENT_INDEX_NAME as --index-name
  ALIGNMENT_INDEX_TOKEN  "user:password" or an API key for it
  ALIGNMENT_LANG       as --lang
  ALIGNMENT_MCP        as --mcp, if it is 1
  GRADIO_SERVER_NAME   as --host
  GRADIO_SERVER_PORT   as --port
  GRADIO_TEMP_DIR      where the folder for uploads is made, which is deleted at the end
  ALIGNMENT_CACHE      where the model's graphs and the galleries of --photos are kept from one start to the next
                       (~/.cache/alignment)

Your own photos, with this or any other model:
  python app.py --photos ~/Pictures
  python app.py --photos ~/Pictures --model openai/clip-vit-base-patch32

A gallery of captioned data, or one to be copied and published, is built by a command of its own:
  python -m alignment.gallery build DATA --out my_gallery
  python app.py --gallery my_gallery
"""


def build_parser() -> argparse.ArgumentParser:
    """Lay out the command line; the environment gives the defaults."""
    env = os.environ.get
    parser = argparse.ArgumentParser(
        description=_HELP, epilog=_ENVIRONMENT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=expanduser, default=env("ALIGNMENT_MODEL") or bundled(MODEL), metavar="PATH_OR_HUB_ID")
    add("--revision", default=env("ALIGNMENT_REVISION") or None, help="branch, tag or commit of a model on the Hub")
    searched = parser.add_mutually_exclusive_group()
    searched.add_argument(
        "--gallery", type=expanduser, default=env("ALIGNMENT_GALLERY") or bundled(GALLERY), metavar="DIR"
    )
    searched.add_argument(
        "--photos",
        type=expanduser,
        metavar="FOLDER",
        help="search the pictures in this folder, which are only read; their gallery is kept in the cache folder, and "
        "everyone who opens the page sees the names of the files",
    )
    add(
        "--compare",
        type=expanduser,
        default=env("ALIGNMENT_COMPARE") or None,
        metavar="PATH_OR_HUB_ID",
        help="a second model, such as a fine-tuned one, beside the first in the similarity matrix",
    )
    add_index_options(parser)
    add("--host", default=env("GRADIO_SERVER_NAME") or "127.0.0.1", help="0.0.0.0 for everybody (default: %(default)s)")
    add("--port", type=read_port, default=env("GRADIO_SERVER_PORT") or 7860, help="default: %(default)s")
    add(
        "--lang",
        choices=tuple(LANGUAGES),
        default=env("ALIGNMENT_LANG") or DEFAULT_LANGUAGE,
        help="for browsers that ask for neither language (default: %(default)s)",
    )
    add("--mcp", action="store_true", default=env("ALIGNMENT_MCP") == "1", help="serve the API to AI agents as well")
    add_size_options(parser)
    add_options(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, then the environment."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.photos and args.index:
        parser.error("--photos keeps its gallery in the cache folder; --index goes with --gallery.")
    return args


def load_engine(args: argparse.Namespace) -> AlignmentEngine:
    """Load what the page asks, ready for captions; pictures have to wait for `AlignmentEngine.warm_images`.

    Where the starter gallery was made by another model, only its pictures and their captions are there at first;
    `background_scan` makes the rest.

    Raises:
        FileNotFoundError: when the model or the gallery is missing.
        ValueError: when one is damaged, or they do not belong together.
        OSError: when the server of the index does not answer.
    """
    remote = Remote.of(args.index, args.gallery, args.index_name)
    encoder = DualEncoder.load(args.model, revision=args.revision)
    second = SecondModel.load(args.compare) if args.compare else None
    starts = args.photos or (remote is None and Path(args.gallery).resolve() == Path(bundled(GALLERY)).resolve())
    gallery = starter_gallery(encoder) if starts else Gallery.load(args.gallery, encoder, remote)
    engine = AlignmentEngine(encoder, gallery, second, names_files=bool(args.photos))
    engine.warm_texts()
    return engine


def background_scan(engine: AlignmentEngine, args: argparse.Namespace) -> PhotoFolder | None:
    """Prepare what is read while the page is there already: photos, the starter gallery of a new model; else None."""
    if not args.photos and engine.starter.folder is not None:
        return None
    return PhotoFolder(engine, args.photos, partial(progress_bar, quiet=args.log == "json"))


def build_page(
    engine: AlignmentEngine,
    lang: str = DEFAULT_LANGUAGE,
    queue: int = Settings.queue,
    photos: PhotoFolder | None = None,
) -> gr.Blocks:
    """Lay the page out in the language `lang`; a browser that prefers another changes it when it loads.

    Args:
        engine: answers.
        lang: at first.
        queue: requests that may wait.
        photos: the folder whose gallery the engine searches, if it is one.
    """
    begun = photos.version if photos else 0  # of the gallery that every page begins with
    explanation = ExplanationDialog(engine)
    of_gallery, of_starter = Examples(engine), Examples(engine, engine.starter)
    searching: list[Tab] = [kind(engine, of_gallery, explanation) for kind in (CaptionsTab, PicturesTab)]
    own: list[Tab] = [kind(engine, of_starter, explanation) for kind in (MatrixTab, PhotosTab, EvaluateTab)]
    tabs = searching + own
    with GuardedBlocks(title=text(lang, "title"), analytics_enabled=False) as page:
        with gr.Row(elem_classes=["al-header"]):
            header = widget("plain", _header(lang), elem_id="header")
            choices = [(name, code) for code, name in LANGUAGES.items()]
            link = widget("link", link_value(tabs, lang), elem_id="link", min_width=0)
            language = gr.Radio(choices, value=lang, **_language_words(lang), elem_id="language", min_width=0, scale=0)
        explanation.build(lang)
        scan = widget("scan", scan_value(photos, lang), elem_id="scan", visible=photos is not None)
        with gr.Tabs(selected=PicturesTab.key if photos and photos.source else None) as row:
            places = []
            for tab in tabs:
                with gr.Tab(text(lang, f"{tab.key}.tab"), id=tab.key) as place:
                    tab.build(language, lang)
                places.append(place)
                if isinstance(tab, PicturesTab):
                    on_event(tab.sample.pick, lambda: gr.Tabs(selected=PhotosTab.key), [], [row])
        footer = widget("plain", _footer(engine, lang), elem_id="footer")

        def status(lang: str) -> list[Any]:
            return [scan_value(photos, lang, ready=True), _footer(engine, lang)]

        def translate(lang: str, asked: Any, *inputs: Any) -> list[Any]:
            """Change all at once: Gradio asks several listeners in turn, and draws over what is typed meanwhile."""
            labels = [gr.update(label=text(lang, f"{tab.key}.tab")) for tab in tabs]
            words = gr.update(**_language_words(lang))
            frame = [_header(lang), link_value(tabs, lang), words, *labels, *status(lang)]
            return [*frame, explanation.translate(lang, asked), *_redrawn(tabs, lang, iter(inputs))]

        asked = [language, explanation.asked, *(part for tab in tabs for part in tab.inputs)]
        user_errors = [header, link, language, *places, scan, footer, explanation.dialog]
        on_event(language.change, translate, asked, [*user_errors, *(part for tab in tabs for part in tab.outputs)])

        _wire_scan(photos, scan, language, [scan, footer], status, searching)

        def on_load(request: gr.Request) -> list[Any]:
            query = request.query_params
            wanted = pick_language(query, request.headers.get("accept-language", ""), lang)
            chosen = gr.skip() if wanted == lang else wanted  # else the page is right as it is
            known = scan_value(photos, wanted, ready=True) | {"version": begun}
            return [chosen, known, *load_from_url(tabs, wanted, query)]

        on_event(page.load, on_load, [], [language, scan, row, *arrivals(tabs)], work="search")
        add_api(engine)
    # The service says that the queue is full, in the visitor's language; requests that arrive just then fit in.
    page.queue(max_size=2 * queue, default_concurrency_limit=4, api_open=False)
    return page


def _redrawn(tabs: Sequence[Tab], lang: str, inputs: Iterator[Any]) -> list[Any]:
    return [change for tab in tabs for change in tab.translate(lang, *islice(inputs, len(tab.inputs)))]


def _wire_scan(
    photos: PhotoFolder | None,
    scan: Any,
    language: Any,
    frame: list[Any],
    status: Callable[[str], list[Any]],
    tabs: Sequence[Tab],
) -> None:
    """Let the page start scans, and show the gallery that has taken the old one's place; what is asked there stays."""

    def renew(event: gr.EventData, lang: str, *inputs: Any) -> list[Any]:
        lang = pick_language(event_data(event), "", lang)
        first = status(lang)  # before the tabs: a gallery that comes meanwhile is asked for again
        return [*first, *_redrawn(tabs, lang, iter(inputs))]

    def rescan(lang: str) -> dict[str, Any]:
        if photos is not None:
            photos.start()
        return scan_value(photos, lang, ready=True)

    asked, shown = [part for tab in tabs for part in tab.inputs], [part for tab in tabs for part in tab.outputs]
    on_event(scan.renew, renew, [language, *asked], [*frame, *shown], work="search")
    on_event(scan.rescan, rescan, [language], [scan])


def launch_options(
    engine: AlignmentEngine, service: Service | None = None, photos: PhotoFolder | None = None
) -> dict[str, Any]:
    """How to serve the page: no telemetry, no public statistics, thumbnails at an address without server paths.

    Args:
        engine: answers.
        service: its limits; by default those of `Settings`.
        photos: the folder whose gallery the engine searches, if it is one.
    """

    def thumbnail(request: Request) -> Response:
        try:
            data = engine.thumbnail(request.path_params["id"])
        except (KeyError, InputError, OSError):
            return Response(status_code=404)
        return Response(data, media_type="image/webp", headers={"Cache-Control": "public, max-age=3600"})

    routes = [Route(f"/{THUMBNAIL_ROUTE}", thumbnail), *([scan_route(photos)] if photos else [])]
    return {
        "theme": theme(),
        "css_paths": styles(),
        "favicon_path": ICON,
        "footer_links": ["api"],  # opens ?view=api; page.css hides Gradio's own footer
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "show_error": False,
        "quiet": True,
        "max_file_size": f"{MAX_ZIP_MB}mb",
        "head": "<link rel='icon' href='favicon.ico'>\n"
        f"<script>\n{(ASSETS / 'refusals.js').read_text('utf-8')}</script>",
        **(service or Service()).launch_options(
            partial(_health, engine), routes, translate=error_for_browser, max_file_mb=MAX_ZIP_MB
        ),
    }


def _health(engine: AlignmentEngine) -> dict[str, Any]:
    """Say what /healthz tells of the model and the gallery."""
    return {
        "model": Path(engine.encoder.name).name,
        "fingerprint": engine.encoder.fingerprint,
        "images": len(engine.gallery.pictures),
        "captions": len(engine.gallery.captions),
    }


def _header(lang: str) -> dict[str, Any]:
    return {"lang": "zh-CN" if lang == "zh" else lang, "title": text(lang, "title"), "line": text(lang, "tagline")}


def _language_words(lang: str) -> dict[str, Any]:
    other = " / ".join(dict.fromkeys([text(lang, "language"), *(words["language"] for words in strings().values())]))
    return {"label": other}


def _footer(engine: AlignmentEngine, lang: str) -> dict[str, Any]:
    gallery = engine.gallery
    numbers = {"pictures": f"{len(gallery.pictures):,}", "captions": f"{len(gallery.captions):,}"}
    model = Path(engine.encoder.name).name
    notes = [text(lang, "footer.model", model=model, **numbers), text(lang, "footer.private")]
    return {"notes": notes, "link": {"text": text(lang, "footer.api"), "href": "?view=api"}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse(argv)
    try:
        check_gradio()
        if args.mcp and find_spec("mcp") is None:
            raise ValueError('--mcp needs one more package; run: pip install -e ".[mcp]"')
        args.photos = photo_folder(args.photos) if args.photos else None
        check_address(args.host, args.port)
        use_size_options(args.max_megapixels, args.max_aspect_ratio)
        engine = load_engine(args)
        photos = background_scan(engine, args)
        with process_folder() as folder:
            service = Service(Settings.from_args(args), folder)
            with service.lifecycle.handle_signals():  # from here on a signal stops the app in order
                serve(engine, args, service, photos)
    except (OSError, ValueError) as error:  # what the person who typed the command can mend
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before it served, or for the second time
        return 130
    return 0


def serve(
    engine: AlignmentEngine, args: argparse.Namespace, service: Service, photos: PhotoFolder | None = None
) -> None:
    """Serve the page until the process is told to stop.

    Args:
        engine: answers.
        args: see `parse`.
        service: stands around the page.
        photos: the folder to scan as soon as the page is there, if the gallery is made of one.

    Raises:
        OSError: when the port is taken.
    """
    configure_logging(args.log)
    page = build_page(engine, args.lang, args.queue, photos)
    options = {
        **launch_options(engine, service, photos),
        "server_name": host_in_url(args.host),
        "server_port": args.port,
    }
    _, url, _ = page.launch(prevent_thread_lock=True, mcp_server=args.mcp or None, **options)
    redirect_server_logs()
    harden_mcp(page)
    gc.freeze()
    gc.enable()
    print(f"Open {url}", flush=True)
    warming = Timer(WARMUP_DELAY_S, engine.warm_images)
    warming.start()
    if photos is not None:
        photos.start()
    service.serve(page)
    warming.cancel()
    if photos is not None:
        photos.stop()


if __name__ == "__main__":
    limit_arenas()
    status = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # what a thread is still preparing for pictures to come, nobody will ask for
