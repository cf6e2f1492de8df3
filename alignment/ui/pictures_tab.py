"""UI, tab "Caption to images": captions and pictures are searched for in the gallery."""

import hashlib
from typing import Any

import gradio as gr

from alignment.engine import Term, as_webp
from alignment.preprocess import InputError, open_image
from alignment.server.gradio_internals import event_data
from alignment.ui.composer import QueryPicture, TextQuery, add_picture, help_value, make_query
from alignment.ui.search_tab import SearchTab
from alignment.ui.strings import error_text, text
from alignment.ui.uploads import Upload, delete_uploads, drop_value, read_upload, uploads_of
from alignment.ui.widgets import Changes, Value, data_url, user_errors

TERM_PIXELS = 96


class PicturesTab(SearchTab):
    """The tab."""

    key = "pictures"
    num_results = 12

    def _lay_out(self, lang: str) -> None:
        first = make_query(self.engine, self.examples.queries(lang)[0])
        self.add_states(first)
        self.add_search_box(lang, first)
        with gr.Row(elem_classes=["al-compose"]):
            self.drop = self.add_widget("drop", "drop", self._drop_value)
            self.help = self.add_widget("composer", "help", lambda lang, _: help_value(lang))
        self.chips = self.add_widget("chips", "examples", self.chips_value)
        self.sample = self.add_widget("chips", "sample", self._sample_value)
        self.results = self.add_widget("pictures", "results", self.results_value)

    def _bind_events(self) -> None:
        self.bind_search()
        self.on(self.help.pick, self.search_example, self.url_outputs, "search")
        self.on(self.drop.files, self._add_upload, [self.drop, *self.url_outputs], "search")

    def load_from_url(self, lang: str, asked: str) -> Changes:
        """Search for the query of a link."""
        return self.search(lang, asked, ())

    def _add_upload(self, event: gr.EventData, lang: str, typed: str, asked: TextQuery) -> Changes:
        uploads, pictures, problem = uploads_of(event_data(event)), asked.pictures, ""
        for upload in uploads[:1]:
            try:
                with user_errors():
                    pictures = add_picture(pictures, self._query_picture(upload))
            except InputError as error:
                problem = f"{upload.name}: {error_text(lang, error)}"
        delete_uploads(uploads)
        return {self.drop: self._drop_value(lang, error=problem), **self.search(lang, typed, pictures)}

    def _query_picture(self, upload: Upload) -> QueryPicture:
        data = read_upload(upload, limit=1)
        image = open_image(data, draft_size=self.engine.draft_size)
        term = Term(picture=hashlib.sha256(data).hexdigest(), embed=self.engine.embed_image(image))
        return QueryPicture(term, data_url(as_webp(image, TERM_PIXELS)), upload.name)

    def _drop_value(self, lang: str, *_: Any, error: str = "") -> Value:
        return drop_value(lang, text(lang, "pictures.add"), how="", error=error)

    def _sample_value(self, lang: str, *_: Any) -> Value:
        """Offer the tab "My photos" while the engine searches the starter gallery."""
        if not self.examples.are_samples:
            return {}
        label = text(lang, "pictures.sample", count=len(self.engine.gallery.pictures))
        return {"label": label, "items": [{"id": "photos", "text": text(lang, "photos.tab")}]}
