"""UI, tab "Caption to images": captions and pictures are searched for in the gallery.

Its base class also serves "My photos", where each handler and view gets their `PhotoState` after the query.
"""

import hashlib
from dataclasses import replace
from typing import Any, ClassVar

import gradio as gr

from alignment.engine import Term, as_webp
from alignment.gallery import Gallery, Picture
from alignment.preprocess import InputError, open_image
from alignment.server.gradio_internals import event_data
from alignment.ui.composer import QueryPicture, TextQuery, add_picture, composer_value, edit_query, make_query
from alignment.ui.explanation import Pair
from alignment.ui.results import heading_value, results_value
from alignment.ui.strings import error_text, labels, text
from alignment.ui.tab import Tab
from alignment.ui.uploads import PhotoState, Upload, delete_uploads, drop_value, read_upload, uploads_of
from alignment.ui.widgets import Changes, Value, data_url, picked, user_errors

TERM_PIXELS = 96


class SearchTab(Tab):
    """A tab with a search box, the parts of the query, and ranked pictures."""

    num_results: ClassVar[int]
    chips: Any
    results: Any

    def add_search_box(self, lang: str, first: TextQuery) -> None:
        """Add the search box with its button, and the parts of the query."""
        with gr.Row(elem_classes=["al-search"]):
            attributes = gr.InputHTMLAttributes(enterkeyhint="search", autocomplete="off")
            box: dict[str, Any] = {"max_lines": 1, "scale": 1, "html_attributes": attributes}
            self.query = gr.Textbox(first.caption, **self._box_words(lang), elem_id=f"{self.key}-query", **box)
            self.views[self.query] = lambda lang, *_: gr.update(**self._box_words(lang))
            self.button = self.add_button("search", scale=0)
        self.composer = self.add_widget("composer", "composer", self._composer_value)

    def bind_search(self) -> None:
        """Bind the events that both tabs have."""
        self.asked = self.states[0]
        self.inputs = [self.query, *self.states]
        self.found = [self.asked, self.composer, self.results]
        self.url_outputs = [self.query, *self.found]
        for event in (self.query.submit, self.button.click):
            self.on(event, self._search, self.found, "search", latest=True)
        self.on(self.composer.edit, self._edit, self.url_outputs, "search")
        self.on(self.results.more, self._more, self.url_outputs, "search")
        self.on(self.results.less, self._less, self.url_outputs, "search")
        self.on(self.chips.pick, self.search_example, self.url_outputs, "search")
        self.explanation.on_event(self.results.why, self._find_pair, [self.language, *self.inputs])

    def translate(self, lang: str, *values: Any) -> Changes:
        """Keep the query and its results; an example query that was not edited is translated."""
        typed, asked, *photos = values
        example = self.examples.translated_query(lang, typed)
        if example in ("", typed) or typed != asked.caption:
            return self.redraw(lang, self.views, asked, *photos)
        asked = make_query(self.engine, example, asked.pictures)
        changes = self.redraw(lang, [self.asked, *self.views], asked, *photos)
        return {**changes, self.query: gr.update(value=example, **self._box_words(lang))}

    def search(self, lang: str, caption: str, pictures: tuple[QueryPicture, ...], *photos: PhotoState) -> Changes:
        """Search for captions and pictures; returns values of `url_outputs`."""
        asked = make_query(self.engine, caption, pictures)
        return {self.query: asked.caption, **self.redraw(lang, self.found, asked, *photos)}

    def search_example(
        self, event: gr.EventData, lang: str, typed: str, asked: TextQuery, *photos: PhotoState
    ) -> Changes:
        """Search for the query on a button."""
        return self.search(lang, picked(event), (), *photos)

    def _search(self, lang: str, typed: str, asked: TextQuery, *photos: PhotoState) -> Changes:
        """Search without changing the box, as the visitor may go on typing."""
        return self.redraw(lang, self.found, make_query(self.engine, typed, asked.pictures), *photos)

    def _edit(self, event: gr.EventData, lang: str, typed: str, asked: TextQuery, *photos: PhotoState) -> Changes:
        return self.search(lang, *edit_query(replace(asked, caption=typed), event_data(event)), *photos)

    def _more(self, event: gr.EventData, *values: Any) -> Changes:
        return self._add_result(1.0, picked(event), *values)

    def _less(self, event: gr.EventData, *values: Any) -> Changes:
        return self._add_result(-1.0, picked(event), *values)

    def _add_result(
        self, weight: float, id: str, lang: str, typed: str, asked: TextQuery, *photos: PhotoState
    ) -> Changes:
        gallery, pictures = self._gallery(*photos), asked.pictures
        picture, embed = gallery.pictures.find(id), gallery.images.embed(id)
        if picture is not None and embed is not None:
            name = self._name(lang, id, *photos) if photos else ""
            term = Term(weight=weight, picture=id, embed=embed)
            pictures = add_picture(pictures, QueryPicture(term, self._image_of(picture, *photos), name))
        return self.search(lang, typed, pictures, *photos)

    def _find_pair(
        self, event: gr.EventData, lang: str, typed: str, asked: TextQuery, *photos: PhotoState
    ) -> Pair | None:
        id, captions = picked(event), asked.query.wanted_captions if asked.query else ()
        embed = self._gallery(*photos).images.embed(id)
        if embed is None or not captions:
            return None
        cosine = None if captions[0].embed is None else float(captions[0].embed @ embed)
        image = open_image(photos[0].photos.thumbnails[id]) if photos else self.engine.picture_image(id)
        return Pair(image, self._name(lang, id, *photos), captions[0].text, cosine)

    def _gallery(self, photos: PhotoState | None = None) -> Gallery:
        return photos.photos.gallery if photos else self.engine.gallery

    def _image_of(self, picture: Picture, photos: PhotoState | None = None) -> str:
        if photos and not photos.sample:
            return data_url(photos.photos.thumbnails[picture.id])
        return self.examples.image_of(picture)

    def _name(self, lang: str, id: str, photos: PhotoState | None = None) -> str:
        picture = self._gallery(photos).pictures.find(id)
        if picture is None:
            return id
        return photos.name(picture, lang) if photos else self.examples.name(picture, lang) or id

    def _box_words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, f"{self.key}.query"), "placeholder": text(lang, "pictures.placeholder")}

    def _composer_value(self, lang: str, asked: TextQuery, *photos: PhotoState) -> Value:
        names = [picture.name or self._name(lang, picture.term.picture, *photos) for picture in asked.pictures]
        return composer_value(lang, asked, names)

    def chips_value(self, lang: str, *_: Any) -> Value:
        """Offer example queries."""
        items = [{"id": query, "text": query} for query in self.examples.queries(lang)]
        return {"label": text(lang, "pictures.example"), "items": items}

    def results_value(self, lang: str, asked: TextQuery, photos: PhotoState | None = None) -> Value:
        """Rank the pictures."""
        total, is_own = len(self._gallery(photos).pictures), photos is not None and not photos.sample
        if not total and photos is None:
            return heading_value(lang, self.key, note=text(lang, "pictures.none"))
        if asked.query is None:
            return heading_value(lang, self.key, error=error_text(lang, asked.error or InputError("", "caption.empty")))
        if not total:
            return {"error": error_text(lang, InputError("There is no picture yet; add one first.", "photos.none"))}

        def picture_value(picture: Picture) -> Value:
            said = picture.source if is_own else self.examples.name(picture, lang)
            value: Value = {"id": picture.id, "image": self._image_of(picture, photos), "alt": said or picture.id}
            spoken = lang if not is_own and lang in picture.captions else None
            return value | {"text": said, "credit": picture.credit, "lang": spoken}

        found = self.engine.search_images(asked.query, self.num_results, photos=photos.photos if photos else None)
        actions = [*["why"] * bool(asked.query.wanted_captions), "more", "less", *["remove"] * is_own]
        key = "photos" if is_own else "pictures"
        return {**results_value(key, found, lang, total, picture_value), "actions": actions}


class PicturesTab(SearchTab):
    """The tab."""

    key = "pictures"
    num_results = 12

    def _build(self, lang: str) -> None:
        first = make_query(self.engine, self.examples.queries(lang)[0])
        self.add_states(first)
        self.add_search_box(lang, first)
        with gr.Row(elem_classes=["al-compose"]):
            self.drop = self.add_widget("drop", "drop", self._drop_value)
            self.help = self.add_widget("composer", "help", self._help_value)
        self.chips = self.add_widget("chips", "examples", self.chips_value)
        self.sample = self.add_widget("chips", "sample", self._sample_value)
        self.results = self.add_widget("pictures", "results", self.results_value)
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

    def _help_value(self, lang: str, *_: Any) -> Value:
        return {"help": text(lang, "pictures.help"), "labels": labels(lang, "pictures.")}

    def _sample_value(self, lang: str, *_: Any) -> Value:
        """Offer the tab "My photos" while the engine searches the starter gallery."""
        if not self.examples.are_samples:
            return {}
        label = text(lang, "pictures.sample", count=len(self.engine.gallery.pictures))
        return {"label": label, "items": [{"id": "photos", "text": text(lang, "photos.tab")}]}
