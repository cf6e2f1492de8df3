"""Top floor, the parts the tabs are made of: our own HTML elements and how events reach Python.

What an element shows is a JSON value; the script beside it in `assets/ui` builds the nodes, and text enters the page
as text only. That is why no value here is escaped and none may be put into a template.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

from alignment.preprocess import InputError
from alignment.server.gradio_internals import event_data

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "ui"
ICON = ASSETS / "favicon.svg"

SEARCHES_AT_ONCE, UPLOADS_AT_ONCE = 16, 2
"""Handlers under way; searches that wait for the model are encoded together, see `alignment.engine.batching`."""


class Tab(Protocol):
    """What `app.py` needs to know of a tab."""

    key: str  # of its strings: "captions", ...
    inputs: list[Any]  # what `translate` wants to know
    outputs: list[Any]  # what it renews
    arrival: list[Any]  # what an address changes

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out inside the current Gradio block, in the language `lang`."""

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Say everything again in another language; what the visitor did stays."""

    def load_from_url(self, lang: str, asked: str) -> list[Any]:
        """Show what an address asks for, as if the visitor had typed it."""


def styles() -> list[Path]:
    """List the style sheets: the page's, then those of its parts, which may overrule it."""
    return sorted(ASSETS.glob("*.css"), key=lambda file: (file.name != "page.css", file.name))


def widget(name: str, value: object, parts: Sequence[str] = (), **options: Any) -> Any:
    """Make an element that the script `assets/ui/NAME.js` draws; the events it sends are attributes of it.

    Args:
        name: of the script.
        value: what it shows.
        parts: scripts of the same folder that it builds on.
        options: of the element.
    """
    script = "\n".join((ASSETS / f"{file}.js").read_text("utf-8") for file in ("dom", *parts, name))
    return gr.HTML(
        value,
        html_template='<div class="al-root"></div>',
        js_on_load=script,
        apply_default_css=False,
        elem_classes=["al-widget"],
        **options,
    )


def on_event(
    event: Callable[..., Any],
    handler: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    work: str = "",
    *,
    latest: bool = False,
) -> None:
    """Let a handler answer an event without a trace in the public API.

    Args:
        event: such as `button.click`.
        handler: plain function or, to show progress, a generator.
        inputs: what it is given.
        outputs: what it renews.
        work: "search" or "upload" for what runs the model and has to queue; "" is answered at once.
        latest: of several events in a hurry only the last need be answered; not for events that carry data.
    """
    limit = {"search": SEARCHES_AT_ONCE, "upload": UPLOADS_AT_ONCE}.get(work)
    queued = {"concurrency_id": work, "concurrency_limit": limit} if work else {}
    event(
        handler,
        list(inputs),
        list(outputs),
        api_visibility="private",
        show_progress="hidden",
        trigger_mode="always_last" if latest else "multiple",
        queue=bool(work),
        **queued,
    )


def picked(event: gr.EventData) -> str:
    """Tell the id that an event of our scripts is about; "" where there is none, for a page could send anything."""
    return str(event_data(event).get("id", ""))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a failure of ours into an `InputError`, so that the page can say so and goes on; the log has the rest."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        logger.exception("A request failed")
        raise InputError("That did not work, and it is not your fault; try again.", "internal") from error


def data_url(webp: bytes) -> str:
    """Put a thumbnail into the page itself; nobody else can ask for it then."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
