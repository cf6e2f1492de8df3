"""The app: `python app.py`, then open http://127.0.0.1:7860.

It reads the arguments, loads `alignment.engine` and serves the page of `alignment.ui`.
"""

import gc
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from threading import Timer
from typing import Any

if __name__ == "__main__":
    gc.disable()  # until it serves: to collect garbage among a million new objects takes a fifth of the start

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported; nothing is sent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it has a log format of its own
os.environ.setdefault("FORWARDED_ALLOW_IPS", "")  # --proxies tells which proxies are trusted
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait make a query ten times slower
os.environ.setdefault("MPLBACKEND", "agg")  # where matplotlib is installed Gradio imports all of it to ask for this
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")  # or it computes statistics of 10,000 events after each one
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**12))

if os.environ.get("SPACES_ZERO_GPU") == "true":  # on Hugging Face's ZeroGPU; has to be imported before torch
    import spaces  # noqa: F401

if __name__ == "__main__" and not (os.environ.get("GRADIO_SERVER_PORT") or "7860").isdecimal():
    sys.exit("error: GRADIO_SERVER_PORT is no port: choose a number from 1 to 65535.")  # Gradio raises on import

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from alignment import server
from alignment.bundled import GALLERY, MODEL, bundled
from alignment.engine import MAX_ZIP_MB, AlignmentEngine, PhotoFolder, SecondModel
from alignment.engine.photo_folder import photo_folder
from alignment.engine.starter import starter_gallery
from alignment.file_errors import describe_error
from alignment.gallery import Gallery, Remote, add_index_options, progress_bar
from alignment.model import DualEncoder
from alignment.picture_limits import add_size_options, use_size_options
from alignment.preprocess import InputError
from alignment.ui.examples import THUMBNAIL_ROUTE
from alignment.ui.page import build_page, scan_route
from alignment.ui.strings import DEFAULT_LANG, LANGUAGES, error_for_browser
from alignment.ui.widgets import ASSETS, ICON, styles, theme

ROOT = Path(__file__).resolve().parent
WARMUP_DELAY_S = 2.0  # after the start; the first visitor's page is loaded before the image tower

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


def build_parser() -> ArgumentParser:
    """Define the command line; the environment gives the defaults."""
    env = os.environ.get
    parser = ArgumentParser(description=_HELP, epilog=_ENVIRONMENT, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=expanduser, default=env("ALIGNMENT_MODEL") or bundled(MODEL), metavar="PATH_OR_HUB_ID")
    add("--revision", default=env("ALIGNMENT_REVISION") or None, help="branch, tag or commit of a model on the Hub")
    searched = parser.add_mutually_exclusive_group()
    gallery = env("ALIGNMENT_GALLERY") or bundled(GALLERY)
    searched.add_argument("--gallery", type=expanduser, default=gallery, metavar="DIR")
    photos = "search the pictures in this folder, which are only read; their gallery is kept in the cache folder, and "
    photos += "everyone who opens the page sees the names of the files"
    searched.add_argument("--photos", type=expanduser, metavar="FOLDER", help=photos)
    second = "a second model, such as a fine-tuned one, beside the first in the similarity matrix"
    add("--compare", type=expanduser, default=env("ALIGNMENT_COMPARE") or None, metavar="PATH_OR_HUB_ID", help=second)
    add_index_options(parser)
    add("--host", default=env("GRADIO_SERVER_NAME") or "127.0.0.1", help="0.0.0.0 for everybody (default: %(default)s)")
    add("--port", type=server.read_port, default=env("GRADIO_SERVER_PORT") or 7860, help="default: %(default)s")
    neither = "for browsers that ask for neither language (default: %(default)s)"
    add("--lang", choices=tuple(LANGUAGES), default=env("ALIGNMENT_LANG") or DEFAULT_LANG, help=neither)
    add("--mcp", action="store_true", default=env("ALIGNMENT_MCP") == "1", help="serve the API to AI agents as well")
    add_size_options(parser)
    server.add_options(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.photos and args.index:
        parser.error("--photos keeps its gallery in the cache folder; --index goes with --gallery.")
    return args


def load_engine(args: Namespace) -> AlignmentEngine:
    """Load models and gallery, and run the text tower once; `serve` runs the image tower later.

    Under a model that has no starter gallery yet, that has few pictures and captions until `background_scan` is done.

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
    engine.embed_caption("a")  # a tower's first run is slow
    return engine


def background_scan(engine: AlignmentEngine, args: Namespace) -> PhotoFolder | None:
    """Prepare what is embedded while the page is served: --photos, or the starter gallery of a new model; else None."""
    if not args.photos and engine.starter.folder is not None:
        return None
    return PhotoFolder(engine, args.photos, partial(progress_bar, quiet=args.log == "json"))


def launch_options(
    engine: AlignmentEngine, service: server.Service | None = None, photos: PhotoFolder | None = None
) -> dict[str, Any]:
    """Return options for `launch`: no telemetry, no public statistics, thumbnails at addresses without server paths."""

    def thumbnail(request: Request) -> Response:
        try:
            data = engine.thumbnail(request.path_params["id"])
        except (KeyError, InputError, OSError):
            return Response(status_code=404)
        return Response(data, media_type="image/webp", headers={"Cache-Control": "public, max-age=3600"})

    def health() -> dict[str, Any]:
        encoder, gallery = engine.encoder, engine.gallery
        held = {"images": len(gallery.pictures), "captions": len(gallery.captions)}
        return {"model": Path(encoder.name).name, "fingerprint": encoder.fingerprint, **held}

    service = service or server.Service()
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
        **service.launch_options(health, routes, translate=error_for_browser, max_file_mb=MAX_ZIP_MB),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    try:
        server.check_gradio()
        if args.mcp and find_spec("mcp") is None:
            raise ValueError('--mcp needs one more package; run: pip install -e ".[mcp]"')
        args.photos = photo_folder(args.photos) if args.photos else None
        server.check_address(args.host, args.port)
        use_size_options(args.max_megapixels, args.max_aspect_ratio)
        engine = load_engine(args)
        photos = background_scan(engine, args)
        service = server.Service(server.Settings.from_args(args))
        with server.process_folder(), service.handle_signals():  # from here on a signal stops the app in order
            serve(engine, args, service, photos)
    except (OSError, ValueError) as error:  # mistakes of the operator
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before it served, or for the second time
        return 130
    return 0


def serve(engine: AlignmentEngine, args: Namespace, service: server.Service, photos: PhotoFolder | None) -> None:
    """Serve the page, and scan `photos`, until the process is told to stop. Raises OSError when the port is taken."""
    server.configure_logging(args.log)
    page = build_page(engine, args.lang, args.queue, photos)
    options = {"server_name": server.host_in_url(args.host), "server_port": args.port, "mcp_server": args.mcp or None}
    _, url, _ = page.launch(prevent_thread_lock=True, **options, **launch_options(engine, service, photos))
    gc.freeze()
    gc.enable()
    print(f"Open {url}", flush=True)
    warming = Timer(WARMUP_DELAY_S, engine.embed_image, [Image.new("RGB", (64, 64))])
    warming.start()
    if photos is not None:
        photos.start()
    service.serve(page)
    warming.cancel()
    if photos is not None:
        photos.stop()


if __name__ == "__main__":
    server.limit_arenas()
    status = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # without waiting for threads that still warm up
