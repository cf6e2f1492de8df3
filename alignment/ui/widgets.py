"""UI, widgets: our own HTML elements, and how their events reach Python.

An element shows a JSON value; its script in `assets/ui` builds the nodes and inserts text as text only. So values are
not escaped here, and none may be put into a template.
"""

import base64
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from alignment.preprocess import InputError
from alignment.server.errors import ServiceError
from alignment.server.gradio_internals import event_data

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "ui"
ICON = ASSETS / "favicon.svg"

SEARCHES_AT_ONCE, UPLOADS_AT_ONCE = 16, 2
"""Concurrent handlers; searches that wait for the model are encoded together, see `alignment.engine.batching`."""

Value = dict[str, Any]
"""What an element shows, as JSON."""

Changes = dict[Any, Any]
"""What a handler changes on the page: component -> new value."""


def styles() -> list[Path]:
    """List the style sheets: page.css first, so that those of the elements may overrule it."""
    return sorted(ASSETS.glob("*.css"), key=lambda file: (file.name != "page.css", file.name))


def widget(name: str, value: object, parts: Sequence[str] = (), **options: Any) -> Any:
    """Make an element that `assets/ui/NAME.js` draws with the scripts `parts`; its events are attributes of it."""
    script = "\n".join((ASSETS / f"{file}.js").read_text("utf-8") for file in ("dom", *parts, name))
    return gr.HTML(
        value,
        html_template='<div class="al-root"></div>',
        js_on_load=script,
        apply_default_css=False,
        elem_classes=["al-widget"],
        **options,
    )


def queue_options(work: str) -> dict[str, Any]:
    """Return Gradio's options of the queue "search" or "upload"."""
    return {"concurrency_id": work, "concurrency_limit": {"search": SEARCHES_AT_ONCE, "upload": UPLOADS_AT_ONCE}[work]}


def on_event(
    event: Callable[..., Any],
    handler: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    work: str = "",
    *,
    latest: bool = False,
) -> None:
    """Bind a handler to an event, outside the public API.

    Args:
        event: such as `button.click`.
        handler: returns or yields `Changes` of `outputs`, given the values of `inputs`.
        inputs: components.
        outputs: components.
        work: the queue for what runs the model, see `queue_options`; "" is answered at once.
        latest: whether events that a later one has overtaken may be dropped; not for events that carry data.
    """
    event(
        handler,
        list(inputs),
        list(outputs),
        api_visibility="private",
        show_progress="hidden",
        trigger_mode="always_last" if latest else "multiple",
        queue=bool(work),
        **(queue_options(work) if work else {}),
    )


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
        raise ServiceError("internal").error from error


def data_url(webp: bytes) -> str:
    """Put a WebP picture into the page itself, so that it has no address that others could open."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
