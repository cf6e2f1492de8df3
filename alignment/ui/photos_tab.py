"""Top floor, tab "My photos": photos of the visitor's own, searched by caption and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from alignment.engine import MAX_PHOTOS, AlignmentEngine
from alignment.gallery import Picture
from alignment.preprocess import InputError
from alignment.ui.examples import Examples
from alignment.ui.pictures_tab import SEARCH_BOX, Asked, ask, query_chips, translated_query
from alignment.ui.results import Value, pictures_value, problem_value
from alignment.ui.strings import count_text, error_text, text
from alignment.ui.uploads import Shelf, fill, progress_value, shelf_drop_value, uploads_of
from alignment.ui.widgets import data_url, listen, widget

NUM_RESULTS = 24


class PhotosTab:
    """See the module."""

    key = "photos"

    def __init__(self, engine: AlignmentEngine, examples: Examples) -> None:
        self.engine, self.examples = engine, examples
        self.sample = Shelf(engine.gallery_photos([picture.id for picture in examples.pictures]))

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        queries = self.examples.queries(lang)
        first = ask(self.engine, queries[len(queries) // 2])
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=4, min_width=280):
                self.drop = widget("drop", self._drop(lang, self.sample), elem_id="photos-drop")
                self.notes = widget("plain", self._notes(lang, self.sample), elem_id="photos-notes")
                self.clear = gr.Button(
                    text(lang, "photos.clear"), variant="secondary", interactive=False, elem_id="photos-clear"
                )
            with gr.Column(scale=8, min_width=300):
                with gr.Row(elem_classes=["al-search"]):
                    self.query = gr.Textbox(first.caption, **self._words(lang), elem_id="photos-query", **SEARCH_BOX)
                    self.button = gr.Button(
                        text(lang, "photos.search"), variant="primary", scale=0, elem_id="photos-search"
                    )
                self.chips = widget("chips", self._chips(lang, self.sample), elem_id="photos-examples")
                self.results = widget("pictures", self._results(lang, first, self.sample), elem_id="photos-results")
        self.asked = gr.State(first, time_to_live=3600)
        self.shelf = gr.State(self.sample, time_to_live=3600)
        self.inputs = [self.query, self.asked, self.shelf]
        self.outputs = [self.drop, self.notes, self.clear, self.query, self.button, self.chips]
        self.outputs += [self.asked, self.results]
        self._wire(language)

    def _wire(self, language: Any) -> None:
        shown = [self.shelf, self.drop, self.notes, self.clear, self.chips, self.results]
        listen(self.drop.files, self._take, [language, self.asked, self.shelf], shown, work="upload")
        listen(self.clear.click, self._clear, [language, self.asked], shown)
        asked = [language, self.query, self.shelf]
        for event in (self.query.submit, self.button.click):
            listen(event, self._search, asked, [self.asked, self.results], work="search", latest=True)
        listen(
            self.chips.pick, self._pick, [language, self.shelf], [self.query, self.asked, self.results], work="search"
        )

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep the photos and the query; a worked example nobody has touched speaks the other language too."""
        typed, asked, shelf = inputs
        query, state, asked = translated_query(self.engine, self.examples, lang, typed, asked)
        return [
            self._drop(lang, shelf),
            self._notes(lang, shelf),
            gr.update(value=text(lang, "photos.clear")),
            gr.update(**query, **self._words(lang)),
            gr.update(value=text(lang, "photos.search")),
            self._chips(lang, shelf),
            state,
            self._results(lang, asked, shelf),
        ]

    # ------------------------------------------------------------ events

    def _take(self, lang: str, asked: Asked, shelf: Shelf, event: gr.EventData) -> Iterator[list[Any]]:
        uploads = uploads_of(event._data)
        for filled, done in fill(self.engine, shelf, uploads, MAX_PHOTOS):
            shown = self._shown(lang, asked, filled)
            if done < len(uploads):
                shown[1] = progress_value(lang, self._title(lang), done, len(uploads), MAX_PHOTOS)
            yield shown

    def _clear(self, lang: str, asked: Asked) -> list[Any]:
        shown = self._shown(lang, asked, self.sample)
        shown[1]["status"] = text(lang, "photos.cleared")
        return shown

    def _search(self, lang: str, caption: str, shelf: Shelf) -> list[Any]:
        asked = ask(self.engine, caption)
        return [asked, self._results(lang, asked, shelf)]

    def _pick(self, lang: str, shelf: Shelf, event: gr.EventData) -> list[Any]:
        caption = str(event._data.get("id", ""))
        return [caption, *self._search(lang, caption, shelf)]

    def _shown(self, lang: str, asked: Asked, shelf: Shelf) -> list[Any]:
        return [
            shelf,
            self._drop(lang, shelf),
            self._notes(lang, shelf),
            gr.update(interactive=not shelf.sample),
            self._chips(lang, shelf),
            self._results(lang, asked, shelf),
        ]

    # ------------------------------------------------------------ what is shown

    def _title(self, lang: str) -> str:
        return text(lang, "drop.photos", limit=MAX_PHOTOS)

    def _drop(self, lang: str, shelf: Shelf) -> Value:
        return shelf_drop_value(lang, self._title(lang), shelf, MAX_PHOTOS)

    def _notes(self, lang: str, shelf: Shelf) -> Value:
        own = count_text(lang, "photos.own", len(shelf.photos))
        return {"notes": [text(lang, "photos.sample") if shelf.sample else own]}

    def _words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "photos.query"), "placeholder": text(lang, "pictures.placeholder")}

    def _chips(self, lang: str, shelf: Shelf) -> Value:
        """Suggest queries while the photos are the page's own; nobody knows what is on a visitor's."""
        return query_chips(self.examples.queries(lang), lang) if shelf.sample else {}

    def _results(self, lang: str, asked: Asked, shelf: Shelf) -> Value:
        if asked.embed is None:
            return problem_value(asked.error or InputError("", "caption.empty"), lang, self.key)
        if not len(shelf.photos):
            return {"error": error_text(lang, InputError("There is no picture yet; add one first.", "photos.none"))}
        found = self.engine.search_images(asked.embed, NUM_RESULTS, photos=shelf.photos)

        def image_of(picture: Picture) -> str:
            thumbnail = data_url(shelf.photos.thumbnails[picture.id])
            return self.examples.image_of(picture) if shelf.sample else thumbnail

        return pictures_value(found, lang, image_of, total=len(shelf.photos), own=not shelf.sample)
