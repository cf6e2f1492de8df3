"""UI, tab: what the tabs have in common.

A tab has values of the visitor's session (states) and components that are drawn from them (views). A handler computes
new states and returns them with the views that depend on them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import gradio as gr

from alignment.engine import AlignmentEngine
from alignment.server.sessions import Immutable, session_state
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog
from alignment.ui.strings import text
from alignment.ui.widgets import Changes, Handler, on_event, widget


class Tab:
    """Base class of the tabs."""

    key: ClassVar[str]  # prefix of its words and of its element ids

    def __init__(self, engine: AlignmentEngine, examples: Examples, explanation: ExplanationDialog) -> None:
        self.engine, self.examples, self.explanation = engine, examples, explanation
        self.states: list[Any] = []
        self.views: dict[Any, Callable[..., Any]] = {}  # component -> what it shows, given language and states
        self.inputs: list[Any] = []  # components whose values handlers and `translate` get after the language
        self.url_outputs: list[Any] = []  # components that `load_from_url` changes

    @property
    def outputs(self) -> list[Any]:
        """Components that `translate` may change."""
        return [*self.states, *self.views]

    def build(self, language: Any, lang: str) -> None:
        """Put the tab on the page, in the language `lang`; `language` is its component."""
        self.language, self._lang = language, lang
        with gr.Tab(text(lang, f"{self.key}.tab"), id=self.key) as self.place:
            self._build(lang)

    def _build(self, lang: str) -> None:
        """Lay the content out and bind its events."""
        raise NotImplementedError

    def load_from_url(self, lang: str, asked: str) -> Changes:
        """Show what an address asks for, as if the visitor had typed it."""
        return {}

    def translate(self, lang: str, *values: Any) -> Changes:
        """Draw the tab in another language, given the values of `inputs`; the visitor's work stays."""
        return self.redraw(lang, self.views, *values)

    def add_states(self, *values: Immutable) -> list[Any]:
        """Add states with their first values, which the views that are added later show at first."""
        self._first = values
        self.states = self.inputs = [session_state(value) for value in values]
        return self.states

    def add_widget(self, script: str, name: str, view: Callable[..., Any], parts: Sequence[str] = ()) -> Any:
        """Add an element that `assets/ui/SCRIPT.js` draws, see `widget`."""
        element = widget(script, view(self._lang, *self._first), parts, elem_id=f"{self.key}-{name}")
        self.views[element] = view
        return element

    def add_button(self, name: str, variant: Literal["primary", "secondary"] = "primary", **options: Any) -> Any:
        """Add a button with the word "TAB.NAME" on it."""
        word = f"{self.key}.{name}"
        button = gr.Button(text(self._lang, word), variant=variant, elem_id=f"{self.key}-{name}", **options)
        self.views[button] = lambda lang, *_: gr.update(value=text(lang, word))
        return button

    def on(self, event: Any, handler: Handler, outputs: Sequence[Any], work: str = "", **options: Any) -> None:
        """Bind a handler to an event, see `on_event`; it gets the language and the values of `inputs`."""
        on_event(event, handler, [self.language, *self.inputs], outputs, work, **options)

    def redraw(self, lang: str, outputs: Iterable[Any], *values: Any) -> Changes:
        """Return new values of `outputs`, which are states or views, given those of all states."""
        known = dict(zip(self.states, values, strict=True))
        return {part: known[part] if part in known else self.views[part](lang, *values) for part in outputs}
