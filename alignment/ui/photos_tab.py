"""UI, tab "My photos": the visitor's own photos are searched by caption; they are deleted with the session.

They come in parts, so those that have arrived can be searched meanwhile. A download of them holds their embeddings: to
upload it again needs no model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from alignment.engine import MAX_PHOTOS
from alignment.engine.photo_zip import ALBUM, export_zip
from alignment.preprocess import InputError
from alignment.server.gradio_internals import event_data
from alignment.ui.composer import TextQuery, make_query
from alignment.ui.pictures_tab import SearchTab
from alignment.ui.strings import count_text, text
from alignment.ui.uploads import Jobs, PhotoState, add_uploads, part_of, parts_value, photos_drop_value, uploads_of
from alignment.ui.widgets import BrowserDownload, Changes, File, Value, on_event, picked

BATCH = 12  # photos that are sent together


class PhotosTab(SearchTab):
    """The tab."""

    key = "photos"
    num_results = 24

    def _build(self, lang: str) -> None:
        self.jobs = Jobs()
        self.sample = PhotoState(self.engine.gallery_photos([picture.id for picture in self.examples.pictures]))
        queries = self.examples.queries(lang)
        first = make_query(self.engine, queries[len(queries) // 2])
        _, self.photos = self.add_states(first, self.sample)
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=4, min_width=280):
                self.drop = self.add_widget("drop", "drop", self._drop_value)
                self.notes = self.add_widget("plain", "notes", self._notes_value)
                with gr.Row(elem_classes=["al-actions"]):
                    self.download = self.add_widget("download", "download", self._download_value)
                    self.clear = self.add_button("clear", "secondary", interactive=False)
            with gr.Column(scale=8, min_width=300):
                self.add_search_box(lang, first)
                self.chips = self.add_widget("chips", "examples", self.chips_value)
                self.results = self.add_widget("pictures", "results", self.results_value)
        self.bind_search()
        collection = [self.photos, self.drop, self.notes, self.download, self.clear, self.chips]
        self.on(self.drop.files, self._add_files, collection, "upload")
        self.on(self.drop.grown, lambda lang, _, *states: self.redraw(lang, [self.results], *states), [self.results])
        on_event(self.drop.halt, self.jobs.stop, [], [])
        self.on(self.clear.click, self._clear, [*collection, self.results])
        self.on(self.results.remove, self._remove, [*collection, self.results])
        download = BrowserDownload("photos-courier")
        download.serve(self.download, self._export, self._download_value, [self.language, *self.states])

    def load_from_url(self, lang: str, asked: str) -> Changes:
        """Search the sample for the query of a link."""
        return self.search(lang, asked, (), self.sample)

    def _add_files(
        self, event: gr.EventData, request: gr.Request, lang: str, typed: str, asked: TextQuery, photos: PhotoState
    ) -> Iterator[Changes]:
        uploads, (run, is_first) = uploads_of(event_data(event)), part_of(event_data(event))
        with self.jobs.start(request.session_hash) as job:
            options: dict[str, Any] = {"zips": True, "more": not is_first, "stopped": lambda: job.stopped}
            for added, done, total in add_uploads(self.engine, photos, uploads, MAX_PHOTOS, **options):
                photos = self._without(added, job.removed)
                if done < total:
                    busy = self._drop_value(lang, asked, photos, busy=(done, total))
                    yield {**self._redraw_collection(lang, asked, photos, busy=True), self.drop: busy}
        changes = self._redraw_collection(lang, asked, photos)
        yield {**changes, self.drop: self._drop_value(lang, asked, photos, run=run)}

    def _clear(self, lang: str, typed: str, asked: TextQuery, photos: PhotoState) -> Changes:
        return self._redraw_all(lang, asked, self.sample, "photos.cleared")

    def _remove(
        self, event: gr.EventData, request: gr.Request, lang: str, typed: str, asked: TextQuery, photos: PhotoState
    ) -> Changes:
        id = picked(event)
        self.jobs.of(request.session_hash).removed.add(id)  # for an upload that is being processed
        left = self._without(photos, {id})
        return self._redraw_all(lang, asked, left if len(left.photos) else self.sample, "photos.removed")

    def _without(self, state: PhotoState, ids: set[str]) -> PhotoState:
        photos = state.photos
        for id in () if state.sample else ids & photos.thumbnails.keys():
            photos = self.engine.without(photos, id)
        return state if photos is state.photos else replace(state, photos=photos)

    def _export(self, lang: str, asked: TextQuery, photos: PhotoState) -> File:
        if photos.sample:
            raise InputError("There is no picture yet; add one first.", "photos.none")
        return f"{ALBUM}.zip", "application/zip", export_zip(photos.photos, self.engine.encoder)

    def _redraw_all(self, lang: str, asked: TextQuery, photos: PhotoState, status: str) -> Changes:
        drop = self._drop_value(lang, asked, photos) | {"status": text(lang, status)}
        results = self.results_value(lang, asked, photos)
        return {**self._redraw_collection(lang, asked, photos), self.drop: drop, self.results: results}

    def _redraw_collection(self, lang: str, asked: TextQuery, photos: PhotoState, *, busy: bool = False) -> Changes:
        """Redraw what depends on the photos; while more are read, they can be neither downloaded nor cleared."""
        locked = photos.sample or busy
        return {
            **self.redraw(lang, [self.photos, self.notes, self.chips], asked, photos),
            self.download: self._download_value(lang, asked, photos) | {"disabled": locked},
            self.clear: gr.update(interactive=not locked),
        }

    def _drop_value(self, lang: str, _: TextQuery, photos: PhotoState, run: int = 0, **busy: Any) -> Value:
        area = photos_drop_value(lang, text(lang, "drop.photos", limit=MAX_PHOTOS), photos, MAX_PHOTOS, **busy)
        return area | parts_value(BATCH, run) | {"accept": "image/*,.zip", "how": text(lang, "drop.how.zip")}

    def _notes_value(self, lang: str, asked: TextQuery, photos: PhotoState) -> Value:
        if photos.sample:
            return {"notes": [text(lang, "photos.sample")]}
        return {"notes": [count_text(lang, "photos.own", len(photos.photos)), text(lang, "photos.album.note")]}

    def _download_value(self, lang: str, asked: TextQuery, photos: PhotoState) -> Value:
        return {"label": text(lang, "photos.album"), "disabled": photos.sample}

    def chips_value(self, lang: str, *values: Any) -> Value:
        """Offer example queries for the sample only; what the visitor's photos show is unknown."""
        return super().chips_value(lang) if values[-1].sample else {}
