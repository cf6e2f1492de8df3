"""Top floor, tab "My photos": photos of the visitor's own, searched by caption and gone afterwards.

They come in parts, so what is there can be searched while the rest is on its way; and they can be taken home as a
gallery, which brings them back without the model having to look at them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from alignment.engine import MAX_PHOTOS, AlignmentEngine, Term
from alignment.engine.photo_zip import ALBUM, export_zip
from alignment.gallery import Picture
from alignment.preprocess import InputError, open_image
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import session_state
from alignment.ui.composer import Added, TextQuery, ask, changed, composer_value, liked
from alignment.ui.download import BrowserDownload
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog, Pair
from alignment.ui.jobs import Tasks, parts_value, run_of
from alignment.ui.pictures_tab import SEARCH_BOX, query_chips, translated_query
from alignment.ui.results import Value, pictures_value, problem_value
from alignment.ui.strings import count_text, error_text, text
from alignment.ui.uploads import PhotoState, gather, progress_value, shelf_drop_value, uploads_of
from alignment.ui.widgets import data_url, on_event, picked, widget

NUM_RESULTS = 24
BATCH = 12  # photos that are sent together


class PhotosTab:
    """See the module."""

    key = "photos"

    def __init__(self, engine: AlignmentEngine, examples: Examples, explanation: ExplanationDialog) -> None:
        self.engine, self.examples, self.explanation = engine, examples, explanation
        self.sample = PhotoState(engine.gallery_photos([picture.id for picture in examples.pictures]))
        self.tasks = Tasks()

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        queries = self.examples.queries(lang)
        first = ask(self.engine, queries[len(queries) // 2])
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=4, min_width=280):
                self.drop = widget("drop", self._drop(lang, self.sample), elem_id="photos-drop")
                self.notes = widget("plain", self._notes(lang, self.sample), elem_id="photos-notes")
                with gr.Row(elem_classes=["al-actions"]):
                    self.album = widget("download", self._album(lang, self.sample), elem_id="photos-download")
                    self.clear = gr.Button(
                        text(lang, "photos.clear"), variant="secondary", interactive=False, elem_id="photos-clear"
                    )
            with gr.Column(scale=8, min_width=300):
                with gr.Row(elem_classes=["al-search"]):
                    self.query = gr.Textbox(first.caption, **self._words(lang), elem_id="photos-query", **SEARCH_BOX)
                    self.button = gr.Button(
                        text(lang, "photos.search"), variant="primary", scale=0, elem_id="photos-search"
                    )
                self.composer = widget("composer", self._composer(lang, first), elem_id="photos-composer")
                self.chips = widget("chips", self._chips(lang, self.sample), elem_id="photos-examples")
                self.results = widget("pictures", self._results(lang, first, self.sample), elem_id="photos-results")
        self.asked = session_state(first)
        self.shelf = session_state(self.sample)
        self.inputs = [self.query, self.asked, self.shelf]
        self.arrival = [self.query, self.asked, self.composer, self.results]
        self.outputs = [*self.arrival, self.drop, self.notes, self.album, self.clear, self.button, self.chips]
        self._wire(language)

    def _wire(self, language: Any) -> None:
        stock = [self.shelf, self.drop, self.notes, self.album, self.clear, self.chips]
        shelf = [*stock, self.results]
        on_event(self.drop.files, self._take, [language, self.shelf], stock, work="upload")
        on_event(self.drop.grown, self._results, [language, self.asked, self.shelf], [self.results])
        on_event(self.drop.halt, self._halt, [], [])
        on_event(self.clear.click, self._clear, [language, self.asked], shelf)
        on_event(self.results.remove, self._remove, [language, self.asked, self.shelf], shelf)
        BrowserDownload("photos-courier").serve(self.album, self._packed, self._album, [language, self.shelf])
        query = [language, self.query, self.asked, self.shelf]
        shown = [self.asked, self.composer, self.results]
        for event in (self.query.submit, self.button.click):
            on_event(event, self._search, query, shown, work="search", latest=True)
        for event, answer in (
            (self.composer.edit, self._edit),
            (self.results.more, self._more),
            (self.results.less, self._less),
        ):
            on_event(event, answer, query, self.arrival, work="search")
        on_event(self.chips.pick, self._pick, [language, self.shelf], self.arrival, work="search")
        self.explanation.on_event(self.results.why, self._why, [language, self.asked, self.shelf])

    def load_from_url(self, lang: str, q: str) -> list[Any]:
        """Search what a link says; values for `arrival`."""
        return self._asked(lang, ask(self.engine, q), self.sample)

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep the photos and the query; a worked example nobody has touched speaks the other language too."""
        typed, asked, shelf = inputs
        query, state, asked = translated_query(self.engine, self.examples, lang, typed, asked)
        return [
            gr.update(**query, **self._words(lang)),
            state,
            self._composer(lang, asked),
            self._results(lang, asked, shelf),
            self._drop(lang, shelf),
            self._notes(lang, shelf),
            self._album(lang, shelf),
            gr.update(value=text(lang, "photos.clear")),
            gr.update(value=text(lang, "photos.search")),
            self._chips(lang, shelf),
        ]

    # ------------------------------------------------------------ photos come and go

    def _take(self, lang: str, shelf: PhotoState, event: gr.EventData, request: gr.Request) -> Iterator[list[Any]]:
        uploads, (run, first) = uploads_of(event_data(event)), run_of(event_data(event))
        with self.tasks.begin(request.session_hash) as task:
            steps = gather(self.engine, shelf, uploads, MAX_PHOTOS, more=not first, stopped=lambda: task.stopped)
            for filled, done, total in steps:
                shelf = self._without(filled, task.removed)
                if done < total:
                    busy = progress_value(lang, self._title(lang), done, total, MAX_PHOTOS)
                    yield [shelf, busy | self._parts(lang, 0), *self._stocked(lang, shelf, busy=True)]
        yield [shelf, self._drop(lang, shelf, run), *self._stocked(lang, shelf)]

    def _halt(self, request: gr.Request) -> None:
        self.tasks.of(request.session_hash).stopped = True

    def _clear(self, lang: str, asked: TextQuery) -> list[Any]:
        shown = self._shown(lang, asked, self.sample)
        shown[1]["status"] = text(lang, "photos.cleared")
        return shown

    def _remove(
        self, lang: str, asked: TextQuery, shelf: PhotoState, event: gr.EventData, request: gr.Request
    ) -> list[Any]:
        id = picked(event)
        self.tasks.of(request.session_hash).removed.add(id)  # more photos may be on their way
        left = self._without(shelf, {id})
        shown = self._shown(lang, asked, left if len(left.photos) else self.sample)
        shown[1]["status"] = text(lang, "photos.removed")
        return shown

    def _without(self, shelf: PhotoState, ids: set[str]) -> PhotoState:
        photos = shelf.photos
        for id in () if shelf.sample else ids & photos.thumbnails.keys():
            photos = self.engine.without(photos, id)
        return shelf if photos is shelf.photos else replace(shelf, photos=photos)

    def _packed(self, lang: str, shelf: PhotoState) -> tuple[str, str, bytes]:
        if shelf.sample:
            raise InputError("There is no picture yet; add one first.", "photos.none")
        return f"{ALBUM}.zip", "application/zip", export_zip(shelf.photos, self.engine.encoder)

    # ------------------------------------------------------------ questions

    def _search(self, lang: str, typed: str, asked: TextQuery, shelf: PhotoState) -> list[Any]:
        return self._asked(lang, ask(self.engine, typed, asked.pictures), shelf)[1:]

    def _pick(self, lang: str, shelf: PhotoState, event: gr.EventData) -> list[Any]:
        return self._asked(lang, ask(self.engine, picked(event)), shelf)

    def _edit(self, lang: str, typed: str, asked: TextQuery, shelf: PhotoState, event: gr.EventData) -> list[Any]:
        caption, pictures = changed(TextQuery(typed, pictures=asked.pictures), event_data(event))
        return self._asked(lang, ask(self.engine, caption, pictures), shelf)

    def _more(self, lang: str, typed: str, asked: TextQuery, shelf: PhotoState, event: gr.EventData) -> list[Any]:
        return self._like(lang, typed, asked, shelf, event, 1.0)

    def _less(self, lang: str, typed: str, asked: TextQuery, shelf: PhotoState, event: gr.EventData) -> list[Any]:
        return self._like(lang, typed, asked, shelf, event, -1.0)

    def _like(
        self, lang: str, typed: str, asked: TextQuery, shelf: PhotoState, event: gr.EventData, weight: float
    ) -> list[Any]:
        pictures, row = asked.pictures, _row(shelf, event)
        if row is not None:
            picture = shelf.photos.gallery.pictures[row]
            term = Term(weight=weight, picture=picture.id, embed=shelf.photos.gallery.image_embeds[row])
            name = self._name(lang, picture, shelf)
            pictures = liked(pictures, Added(term, data_url(shelf.photos.thumbnails[picture.id]), name))
        return self._asked(lang, ask(self.engine, typed, pictures), shelf)

    def _why(self, lang: str, asked: TextQuery, shelf: PhotoState, event: gr.EventData) -> Pair | None:
        row = _row(shelf, event)
        if row is None or asked.query is None or not asked.query.wanted_captions:
            return None
        picture, term = shelf.photos.gallery.pictures[row], asked.query.wanted_captions[0]
        shown = None if term.embed is None else float(term.embed @ shelf.photos.gallery.image_embeds[row])
        image = open_image(shelf.photos.thumbnails[picture.id])
        return Pair(image, self._name(lang, picture, shelf), term.text, shown)

    # ------------------------------------------------------------ what is shown

    def _shown(self, lang: str, asked: TextQuery, shelf: PhotoState) -> list[Any]:
        return [shelf, self._drop(lang, shelf), *self._stocked(lang, shelf), self._results(lang, asked, shelf)]

    def _stocked(self, lang: str, shelf: PhotoState, *, busy: bool = False) -> list[Any]:
        """Show how many there are; nothing is taken away while more come in."""
        return [
            self._notes(lang, shelf),
            self._album(lang, shelf) | {"disabled": shelf.sample or busy},
            gr.update(interactive=not (shelf.sample or busy)),
            self._chips(lang, shelf),
        ]

    def _asked(self, lang: str, asked: TextQuery, shelf: PhotoState) -> list[Any]:
        return [asked.caption, asked, self._composer(lang, asked), self._results(lang, asked, shelf)]

    def _title(self, lang: str) -> str:
        return text(lang, "drop.photos", limit=MAX_PHOTOS)

    def _parts(self, lang: str, run: int) -> Value:
        return parts_value(lang, BATCH, run) | {"accept": "image/*,.zip", "how": text(lang, "drop.how.zip")}

    def _drop(self, lang: str, shelf: PhotoState, run: int = 0) -> Value:
        return shelf_drop_value(lang, self._title(lang), shelf, MAX_PHOTOS) | self._parts(lang, run)

    def _notes(self, lang: str, shelf: PhotoState) -> Value:
        if shelf.sample:
            return {"notes": [text(lang, "photos.sample")]}
        return {"notes": [count_text(lang, "photos.own", len(shelf.photos)), text(lang, "photos.album.note")]}

    def _album(self, lang: str, shelf: PhotoState) -> Value:
        return {"label": text(lang, "photos.album"), "disabled": shelf.sample}

    def _words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "photos.query"), "placeholder": text(lang, "pictures.placeholder")}

    def _name(self, lang: str, picture: Picture, shelf: PhotoState) -> str:
        return (picture.caption(lang) if shelf.sample else picture.source) or picture.id

    def _composer(self, lang: str, asked: TextQuery) -> Value:
        return composer_value(lang, asked, [added.name for added in asked.pictures])

    def _chips(self, lang: str, shelf: PhotoState) -> Value:
        """Suggest queries while the photos are the page's own; nobody knows what is on a visitor's."""
        return query_chips(self.examples.queries(lang), lang) if shelf.sample else {}

    def _results(self, lang: str, asked: TextQuery, shelf: PhotoState) -> Value:
        if asked.query is None:
            return problem_value(asked.error or InputError("", "caption.empty"), lang, self.key)
        if not len(shelf.photos):
            return {"error": error_text(lang, InputError("There is no picture yet; add one first.", "photos.none"))}
        found = self.engine.search_images(asked.query, NUM_RESULTS, photos=shelf.photos)

        def image_of(picture: Picture) -> str:
            return self.examples.image_of(picture) if shelf.sample else data_url(shelf.photos.thumbnails[picture.id])

        actions = ["why", "more", "less"] if asked.query.wanted_captions else ["more", "less"]
        own = not shelf.sample
        value = pictures_value(
            found, lang, image_of, total=len(shelf.photos), own=own, actions=[*actions, *["remove"] * own]
        )
        value["labels"]["remove"] = text(lang, "photos.remove")
        return value


def _row(shelf: PhotoState, event: gr.EventData) -> int | None:
    """Find the photo that an event is about; a page could send anything."""
    id = picked(event)
    pictures = shelf.photos.gallery.pictures
    return next((row for row, picture in enumerate(pictures) if picture.id == id), None)
