"""UI, widgets: our own HTML elements, how their events reach Python, and the look of Gradio's controls.

An element shows a JSON value; its script in `assets/ui` builds the nodes and inserts text as text only. So values are
not escaped here, and none may be put into a template.
"""

import base64
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import isgeneratorfunction
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
import orjson

from alignment.preprocess import InputError
from alignment.server.errors import ServiceError
from alignment.server.gradio_internals import event_data
from alignment.ui.strings import error_text

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "ui"
ICON = ASSETS / "favicon.svg"

# Fonts of the reader's system, for Latin and Chinese; none is fetched.
FONTS = (
    "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Noto Sans, PingFang SC, Hiragino Sans GB, "
    "Microsoft YaHei, Noto Sans CJK SC, Source Han Sans SC, sans-serif"
)
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"

_COLOURS = {  # token -> in light mode, in dark mode
    "body_background_fill": ("#fbfbfc", "#111114"),
    "block_background_fill": ("transparent", "transparent"),
    "block_label_background_fill": ("transparent", "transparent"),
    "input_background_fill": ("#ffffff", "#1b1b20"),
    "input_border_color": ("#d4d4dc", "#3a3a44"),
    "input_border_color_focus": ("*primary_500", "*primary_400"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),  # white on 500 has a contrast below 4.5 : 1
    "button_primary_background_fill_hover": ("*primary_700", "*primary_700"),
    "button_secondary_background_fill": ("transparent", "transparent"),
    "button_secondary_border_color": ("#d4d4dc", "#3a3a44"),
}

# Concurrent handlers; searches that wait for the model are encoded together, see `alignment.engine.batching`.
SEARCHES_AT_ONCE, UPLOADS_AT_ONCE = 16, 2

_serial = count(1)  # of downloads: the page acts on a new value only

Value = dict[str, Any]  # what an element shows, as JSON
Changes = dict[Any, Any]  # what a handler changes on the page: component -> new value
Handler = Callable[..., Any]
File = tuple[str, str, bytes]  # name, media type, content


def styles() -> list[Path]:
    """List the style sheets: page.css first, so that those of the elements may overrule it."""
    return sorted(ASSETS.glob("*.css"), key=lambda file: (file.name != "page.css", file.name))


def theme() -> gr.themes.Base:
    """Make the theme."""
    base = gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", font=FONTS.split(", "), font_mono=MONO.split(", "))
    colours = {f"{name}{mode}": pair[bool(mode)] for name, pair in _COLOURS.items() for mode in ("", "_dark")}
    base.set(block_border_width="0px", block_padding="0", input_border_width="1px", button_border_width="1px")
    return base.set(**colours, button_primary_text_color="#ffffff")


def widget(name: str, value: object, parts: Sequence[str] = (), **options: Any) -> Any:
    """Make an element that `assets/ui/NAME.js` draws with the scripts `parts`; its events are attributes of it."""
    script = "\n".join((ASSETS / f"{file}.js").read_text("utf-8") for file in ("dom", *parts, name))
    return gr.HTML(
        as_json(value),
        html_template='<div class="al-root"></div>',
        js_on_load=script,
        apply_default_css=False,
        elem_classes=["al-widget"],
        **options,
    )


def as_json(value: object) -> dict[str, str]:
    """Return a value of an element as Gradio holds it: one text.

    For each event the browser copies what it holds of all elements, number by number: beside a matrix of 64 x 64 in
    plain lists a search took 0.41 s of its main thread, instead of 0.16. Numbers of numpy are written as by Gradio.
    """
    return {"json": orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()}


def queue_options(work: str) -> dict[str, Any]:
    """Return Gradio's options of the queue "search" or "upload"."""
    return {"concurrency_id": work, "concurrency_limit": {"search": SEARCHES_AT_ONCE, "upload": UPLOADS_AT_ONCE}[work]}


def on_event(
    event: Any, handler: Handler, inputs: Sequence[Any], outputs: Sequence[Any], work: str = "", *, latest: bool = False
) -> None:
    """Bind a handler to an event, outside the public API.

    `handler` returns or yields `Changes` of the components `outputs`, given the values of those of `inputs`. `work` is
    the queue for what runs the model, see `queue_options`; "" is answered at once. `latest` allows to drop events that
    a later one has overtaken; not for events that carry data.
    """
    event(
        _with_json(handler),
        list(inputs),
        list(outputs),
        api_visibility="private",
        show_progress="hidden",
        trigger_mode="always_last" if latest else "multiple",
        queue=bool(work),
        **(queue_options(work) if work else {}),
    )


def _with_json(handler: Handler) -> Handler:
    """Let a handler's changes reach Gradio with the values of elements as JSON."""

    def encode(changes: Changes) -> Changes:
        return {part: as_json(value) if isinstance(part, gr.HTML) else value for part, value in changes.items()}

    @wraps(handler)
    def answer(*values: Any) -> Changes | None:
        changes = handler(*values)
        return changes and encode(changes)

    @wraps(handler)
    def answers(*values: Any) -> Iterator[Changes]:
        yield from map(encode, handler(*values))

    return answers if isgeneratorfunction(handler) else answer


def picked(event: gr.EventData) -> str:
    """Return the id that an event of our scripts is about, "" if it has none."""
    return str(event_data(event).get("id", ""))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an unexpected exception into an `InputError` that the page can show, and log it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        logger.exception("A request failed")
        raise ServiceError("internal") from error


def data_url(webp: bytes) -> str:
    """Put a WebP picture into the page itself, so that it has no address that others could open."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


class BrowserDownload:
    """An invisible element that lets the browser save a file; made inside a Gradio block."""

    def __init__(self, elem_id: str) -> None:
        self.file = widget("courier", {}, elem_id=elem_id)
        on_event(self.file.saved, lambda: {self.file: {}}, [], [self.file])

    def serve(self, button: Any, make_file: Callable[..., File], button_value: Handler, inputs: Sequence[Any]) -> None:
        """Let a button of `download.js` save the file of `make_file`; it and `button_value` get those of `inputs`."""

        def download(lang: str, *values: Any) -> Changes:
            shown = {**button_value(lang, *values), "serial": next(_serial)}  # a new value enables the button again
            try:
                with user_errors():
                    name, kind, data = make_file(lang, *values)
            except InputError as error:
                return {button: {**shown, "error": error_text(lang, error)}, self.file: {}}
            file = {"serial": next(_serial), "name": name, "kind": kind, "data": base64.b64encode(data).decode()}
            return {button: shown, self.file: file}

        on_event(button.wanted, download, inputs, [button, self.file])
