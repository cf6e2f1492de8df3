"""Top floor, tab "Caption to images": a caption goes in, the gallery's pictures come out ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from torch import Tensor

from alignment.engine import AlignmentEngine
from alignment.preprocess import InputError
from alignment.ui.examples import Examples
from alignment.ui.results import Value, note_value, pictures_value, problem_value
from alignment.ui.strings import LANGUAGES, text
from alignment.ui.widgets import listen, spoken, widget

NUM_RESULTS = 12


@dataclass(frozen=True)
class Asked:
    """The caption in question: the text, and its embedding unless something was wrong with it."""

    caption: str
    embed: Tensor | None = None
    error: InputError | None = None


class PicturesTab:
    """See the module."""

    key = "pictures"

    def __init__(self, engine: AlignmentEngine, examples: Examples) -> None:
        self.engine, self.examples = engine, examples

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        first = ask(self.engine, self.examples.queries(lang)[0])
        with gr.Row(elem_classes=["al-search"]):
            self.query = gr.Textbox(first.caption, **self._words(lang), elem_id="pictures-query", **SEARCH_BOX)
            self.button = gr.Button(
                text(lang, "pictures.search"), variant="primary", scale=0, elem_id="pictures-search"
            )
        self.chips = widget("chips", self._chips(lang), elem_id="pictures-examples")
        self.results = widget("pictures", self._results(lang, first), elem_id="pictures-results")
        self.asked = gr.State(first, time_to_live=3600)
        self.inputs = [self.query, self.asked]
        self.outputs = [self.query, self.button, self.chips, self.asked, self.results]
        for event in (self.query.submit, self.button.click):
            listen(event, self._search, [language, self.query], [self.asked, self.results], work="search", latest=True)
        listen(self.chips.pick, self._pick, [language], [self.query, self.asked, self.results], work="search")

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep the query and its results; a worked example nobody has touched speaks the other language too."""
        typed, asked = inputs
        query, state, asked = translated_query(self.engine, self.examples, lang, typed, asked)
        button = gr.update(value=text(lang, "pictures.search"))
        return [gr.update(**query, **self._words(lang)), button, self._chips(lang), state, self._results(lang, asked)]

    def _search(self, lang: str, caption: str) -> list[Any]:
        asked = ask(self.engine, caption)
        return [asked, self._results(lang, asked)]

    def _pick(self, lang: str, event: gr.EventData) -> list[Any]:
        caption = str(event._data.get("id", ""))
        return [caption, *self._search(lang, caption)]

    def _words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "pictures.query"), "placeholder": text(lang, "pictures.placeholder")}

    def _chips(self, lang: str) -> Value:
        return query_chips(self.examples.queries(lang), lang)

    def _results(self, lang: str, asked: Asked) -> Value:
        gallery = self.engine.gallery
        if not gallery.pictures:
            return note_value(lang, "pictures.none")
        if asked.error or asked.embed is None:
            return problem_value(asked.error or InputError("", "caption.empty"), lang, self.key)
        found = self.engine.search_images(asked.embed, NUM_RESULTS)
        total = len(gallery.pictures)
        return pictures_value(found, lang, self.examples.image_of, total=total)


SEARCH_BOX: dict[str, Any] = {
    "max_lines": 1,
    "scale": 1,
    "html_attributes": gr.InputHTMLAttributes(enterkeyhint="search", autocomplete="off"),
}


def ask(engine: AlignmentEngine, caption: str) -> Asked:
    """Embed a caption, or find out why it cannot be."""
    try:
        with spoken():
            return Asked(caption, engine.embed_caption(caption))
    except InputError as error:
        return Asked(caption, error=error)


def query_chips(queries: list[str], lang: str) -> Value:
    """Lay queries out for `chips.js`; each is its own id."""
    return {"label": text(lang, "pictures.example"), "items": [{"id": query, "text": query} for query in queries]}


def translated_query(
    engine: AlignmentEngine, examples: Examples, lang: str, typed: str, asked: Asked
) -> tuple[dict[str, Any], Any, Asked]:
    """Say a query in another language if it is an example nobody has touched; what a visitor typed is left alone.

    Returns:
        What to change of the text box, what to change of the state, and what is asked now.
    """
    example = _translated_example(examples, lang, typed)
    if example in ("", typed) or typed != asked.caption:
        return {}, gr.skip(), asked
    asked = ask(engine, example)
    return {"value": example}, asked, asked


def _translated_example(examples: Examples, lang: str, caption: str) -> str:
    """Find an example query in another language; "" for what is no example."""
    for other in LANGUAGES:
        queries = examples.queries(other)
        if caption in queries and queries.index(caption) < len(examples.queries(lang)):
            return examples.queries(lang)[queries.index(caption)]
    return ""
