"""Top floor, tab "Caption to images": captions and pictures go in, the gallery's pictures come out ranked."""

from __future__ import annotations

import hashlib
from typing import Any

import gradio as gr

from alignment.engine import AlignmentEngine, Term, as_webp
from alignment.preprocess import InputError, open_image
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import session_state
from alignment.ui.composer import Added, TextQuery, ask, changed, composer_value, help_value, liked
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog, Pair
from alignment.ui.results import Value, note_value, pictures_value, problem_value
from alignment.ui.strings import LANGUAGES, error_text, text
from alignment.ui.uploads import Upload, delete_uploads, drop_value, read_upload, uploads_of
from alignment.ui.widgets import data_url, on_event, picked, user_errors, widget

NUM_RESULTS = 12
TERM_PIXELS = 96


class PicturesTab:
    """See the module."""

    key = "pictures"

    def __init__(self, engine: AlignmentEngine, examples: Examples, explanation: ExplanationDialog) -> None:
        self.engine, self.examples, self.explanation = engine, examples, explanation

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        first = ask(self.engine, self.examples.queries(lang)[0])
        with gr.Row(elem_classes=["al-search"]):
            self.query = gr.Textbox(first.caption, **self._words(lang), elem_id="pictures-query", **SEARCH_BOX)
            self.button = gr.Button(
                text(lang, "pictures.search"), variant="primary", scale=0, elem_id="pictures-search"
            )
        self.composer = widget("composer", self._composer(lang, first), elem_id="pictures-composer")
        with gr.Row(elem_classes=["al-compose"]):
            self.drop = widget("drop", self._drop(lang), elem_id="pictures-drop")
            self.help = widget("composer", help_value(lang), elem_id="pictures-help")
        self.chips = widget("chips", self._chips(lang), elem_id="pictures-examples")
        self.sample = widget("chips", self._sample(lang), elem_id="pictures-sample")
        self.results = widget("pictures", self._results(lang, first), elem_id="pictures-results")
        self.asked = session_state(first)
        self.inputs = [self.query, self.asked]
        self.arrival = [self.query, self.asked, self.composer, self.results]
        self.outputs = [*self.arrival, self.button, self.drop, self.help, self.chips, self.sample]
        self._wire(language)

    def _wire(self, language: Any) -> None:
        shown, query = [self.asked, self.composer, self.results], [language, self.query, self.asked]
        for event in (self.query.submit, self.button.click):
            on_event(event, self._search, query, shown, work="search", latest=True)
        for event in (self.chips.pick, self.help.pick):
            on_event(event, self._pick, [language], self.arrival, work="search")
        for event, answer in (
            (self.composer.edit, self._edit),
            (self.results.more, self._more),
            (self.results.less, self._less),
        ):
            on_event(event, answer, query, self.arrival, work="search")
        on_event(self.drop.files, self._take, query, [self.drop, *self.arrival], work="search")
        self.explanation.on_event(self.results.why, self._why, [language, self.asked])

    def load_from_url(self, lang: str, q: str) -> list[Any]:
        """Search what a link says; values for `arrival`."""
        return self._shown(lang, ask(self.engine, q))

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep the query and its results; a worked example nobody has touched speaks the other language too."""
        typed, asked = inputs
        query, state, asked = translated_query(self.engine, self.examples, lang, typed, asked)
        return [
            gr.update(**query, **self._words(lang)),
            state,
            self._composer(lang, asked),
            self._results(lang, asked),
            gr.update(value=text(lang, "pictures.search")),
            self._drop(lang),
            help_value(lang),
            self._chips(lang),
            self._sample(lang),
        ]

    # ------------------------------------------------------------ events

    def _search(self, lang: str, typed: str, asked: TextQuery) -> list[Any]:
        return self._shown(lang, ask(self.engine, typed, asked.pictures))[1:]

    def _pick(self, lang: str, event: gr.EventData) -> list[Any]:
        return self.load_from_url(lang, picked(event))

    def _edit(self, lang: str, typed: str, asked: TextQuery, event: gr.EventData) -> list[Any]:
        caption, pictures = changed(TextQuery(typed, pictures=asked.pictures), event_data(event))
        return self._shown(lang, ask(self.engine, caption, pictures))

    def _more(self, lang: str, typed: str, asked: TextQuery, event: gr.EventData) -> list[Any]:
        return self._like(lang, typed, asked, event, 1.0)

    def _less(self, lang: str, typed: str, asked: TextQuery, event: gr.EventData) -> list[Any]:
        return self._like(lang, typed, asked, event, -1.0)

    def _like(self, lang: str, typed: str, asked: TextQuery, event: gr.EventData, weight: float) -> list[Any]:
        gallery = self.engine.gallery
        pictures, picture = asked.pictures, gallery.picture(picked(event))
        if picture is not None:
            term = Term(weight=weight, picture=picture.id, embed=gallery.images.embed(picture.id))
            pictures = liked(pictures, Added(term, self.examples.image_of(picture)))
        return self._shown(lang, ask(self.engine, typed, pictures))

    def _take(self, lang: str, typed: str, asked: TextQuery, event: gr.EventData) -> list[Any]:
        uploads, pictures, problem = uploads_of(event_data(event)), asked.pictures, ""
        for upload in uploads[:1]:
            try:
                with user_errors():
                    pictures = liked(pictures, self._added(upload))
            except InputError as error:
                problem = f"{upload.name}: {error_text(lang, error)}"
        delete_uploads(uploads)
        return [self._drop(lang, problem), *self._shown(lang, ask(self.engine, typed, pictures))]

    def _added(self, upload: Upload) -> Added:
        data = read_upload(upload, limit=1)
        image = open_image(data, draft_size=self.engine.draft_size)
        term = Term(picture=hashlib.sha256(data).hexdigest(), embed=self.engine.embed_image(image))
        return Added(term, data_url(as_webp(image, TERM_PIXELS)), upload.name)

    def _why(self, lang: str, asked: TextQuery, event: gr.EventData) -> Pair | None:
        """Explain the first caption that was asked for: it is the part that has words."""
        gallery, id = self.engine.gallery, picked(event)
        embed = gallery.images.embed(id)
        if embed is None or asked.query is None or not asked.query.wanted_captions:
            return None
        term = asked.query.wanted_captions[0]
        shown = None if term.embed is None else float(term.embed @ embed)
        return Pair(self.engine.picture_image(id), self._name(lang, id), term.text, shown)

    # ------------------------------------------------------------ what is shown

    def _shown(self, lang: str, asked: TextQuery) -> list[Any]:
        return [asked.caption, asked, self._composer(lang, asked), self._results(lang, asked)]

    def _words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "pictures.query"), "placeholder": text(lang, "pictures.placeholder")}

    def _name(self, lang: str, id: str) -> str:
        picture = self.engine.gallery.picture(id)
        return (self.examples.name(picture, lang) if picture else "") or id

    def _composer(self, lang: str, asked: TextQuery) -> Value:
        names = [added.name or self._name(lang, added.term.picture) for added in asked.pictures]
        return composer_value(lang, asked, names)

    def _drop(self, lang: str, problem: str = "") -> Value:
        return drop_value(lang, text(lang, "pictures.add"), how="", error=problem)

    def _chips(self, lang: str) -> Value:
        return query_chips(self.examples.queries(lang), lang)

    def _sample(self, lang: str) -> Value:
        """Say that there are few pictures, with the way to one's own; a gallery of one's own needs neither."""
        if not self.examples.are_samples:
            return {}
        says = text(lang, "pictures.sample", count=len(self.engine.gallery.pictures))
        return {"label": says, "items": [{"id": "photos", "text": text(lang, "photos.tab")}]}

    def _results(self, lang: str, asked: TextQuery) -> Value:
        gallery = self.engine.gallery
        if not gallery.pictures:
            return note_value(lang, "pictures.none")
        if asked.query is None:
            return problem_value(asked.error or InputError("", "caption.empty"), lang, self.key)
        found = self.engine.search_images(asked.query, NUM_RESULTS)
        actions = ("why", "more", "less") if asked.query.wanted_captions else ("more", "less")
        total = len(gallery.pictures)
        named = self.engine.names_files
        return pictures_value(found, lang, self.examples.image_of, total=total, actions=actions, named=named)


SEARCH_BOX: dict[str, Any] = {
    "max_lines": 1,
    "scale": 1,
    "html_attributes": gr.InputHTMLAttributes(enterkeyhint="search", autocomplete="off"),
}


def query_chips(queries: list[str], lang: str) -> Value:
    """Lay queries out for `chips.js`; each is its own id."""
    return {"label": text(lang, "pictures.example"), "items": [{"id": query, "text": query} for query in queries]}


def translated_query(
    engine: AlignmentEngine, examples: Examples, lang: str, typed: str, asked: TextQuery
) -> tuple[dict[str, Any], Any, TextQuery]:
    """Say a query in another language if it is an example nobody has touched; what a visitor typed is left alone.

    Returns:
        What to change of the text box, what to change of the state, and what is asked now.
    """
    example = _translated_example(examples, lang, typed)
    if example in ("", typed) or typed != asked.caption:
        return {}, gr.skip(), asked
    asked = ask(engine, example, asked.pictures)
    return {"value": example}, asked, asked


def _translated_example(examples: Examples, lang: str, caption: str) -> str:
    """Find an example query in another language; "" for what is no example."""
    for other in LANGUAGES:
        queries = examples.queries(other)
        if caption in queries and queries.index(caption) < len(examples.queries(lang)):
            return examples.queries(lang)[queries.index(caption)]
    return ""
