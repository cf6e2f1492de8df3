"""UI, tab "Image to captions": the captions of the gallery are ranked for a picture."""

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from torch import Tensor

from alignment.engine import as_webp
from alignment.gallery import Picture
from alignment.preprocess import InputError, open_image
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import Immutable
from alignment.ui.examples import PREVIEW_PIXELS
from alignment.ui.explanation import Pair
from alignment.ui.results import heading_value, results_value
from alignment.ui.strings import error_text, text
from alignment.ui.tab import Tab
from alignment.ui.uploads import delete_uploads, drop_value, read_upload, uploads_of
from alignment.ui.widgets import Changes, Value, data_url, picked, user_errors

NUM_RESULTS = 10


@dataclass(frozen=True)
class ImageQuery(Immutable):
    """The picture whose captions are ranked."""

    embed: Tensor | None = None  # (embed_dim,); None before there is a picture
    preview: str = ""  # address of the picture as it is shown
    name: str = ""  # of the visitor's file; the id of a gallery picture
    photo: bytes = b""  # the visitor's picture as WebP, for explanations; empty for a gallery picture
    bad_file: str = ""  # name of the last file, if it was no picture
    error: InputError | None = None  # what was wrong with it


class CaptionsTab(Tab):
    """The tab."""

    key = "captions"

    @property
    def first(self) -> ImageQuery:
        """The picture that is shown first."""
        first = self.examples.described[:1]
        return self._gallery_query(first[0]) if first else ImageQuery()

    def _build(self, lang: str) -> None:
        (self.asked,) = self.add_states(self.first)
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=5, min_width=300):
                self.drop = self.add_widget("drop", "drop", self._drop_value)
                self.chips = self.add_widget("chips", "examples", self._chips_value)
            with gr.Column(scale=7, min_width=300):
                self.results = self.add_widget("captions", "results", self._results_value)
        self.url_outputs = [self.asked, self.drop, self.results]
        self.on(self.drop.files, self._add_upload, self.url_outputs, "search")
        self.on(self.chips.pick, self._show_example, self.url_outputs)
        self.explanation.on_event(self.results.why, self._find_pair, [self.language, *self.inputs])

    def translate(self, lang: str, *values: Any) -> Changes:
        """Rank the captions of the other language; a picture that has left the gallery makes way for the first."""
        (asked,) = values
        if not asked.photo and self.engine.gallery.pictures.find(asked.name) is None:
            asked = replace(self.first, bad_file=asked.bad_file, error=asked.error)
        return self.redraw(lang, self.outputs, asked)

    def load_from_url(self, lang: str, asked: str) -> Changes:
        """Show the gallery's picture of this id, or the first one."""
        picture = self.engine.gallery.pictures.find(asked)
        return self.redraw(lang, self.url_outputs, self._gallery_query(picture) if picture else self.first)

    def _add_upload(self, event: gr.EventData, lang: str, asked: ImageQuery) -> Changes:
        uploads = uploads_of(event_data(event))
        for upload in uploads[:1]:
            try:
                with user_errors():
                    image = open_image(read_upload(upload, limit=1), draft_size=PREVIEW_PIXELS)
                    photo = as_webp(image, PREVIEW_PIXELS)
                    asked = ImageQuery(self.engine.embed_image(image), data_url(photo), upload.name, photo)
            except InputError as error:
                asked = replace(asked, bad_file=upload.name, error=error)  # the picture before it stays
        delete_uploads(uploads)
        return self.redraw(lang, self.url_outputs, asked)

    def _show_example(self, event: gr.EventData, lang: str, asked: ImageQuery) -> Changes:
        return self.load_from_url(lang, picked(event))

    def _find_pair(self, event: gr.EventData, lang: str, asked: ImageQuery) -> Pair | None:
        gallery = self.engine.gallery
        caption, embed = gallery.captions.find(picked(event)), gallery.texts.embed(picked(event))
        if caption is None or embed is None or asked.embed is None:
            return None
        if not asked.photo and gallery.pictures.find(asked.name) is None:
            return None
        image = open_image(asked.photo) if asked.photo else self.engine.picture_image(asked.name)
        cosine = float(asked.embed @ embed)  # as the list shows it; that of the smaller copy may differ
        return Pair(image, self._name(lang, asked), caption.text, cosine)

    def _gallery_query(self, picture: Picture) -> ImageQuery:
        return ImageQuery(self.engine.picture_embed(picture.id), self.examples.preview(picture), picture.id)

    def _name(self, lang: str, asked: ImageQuery) -> str:
        picture = None if asked.photo else self.engine.gallery.pictures.find(asked.name)
        return (self._title(picture, lang) if picture else "") or asked.name

    def _title(self, picture: Picture, lang: str) -> str:
        return self.examples.query(picture, lang) or self.examples.name(picture, lang)

    def _drop_value(self, lang: str, asked: ImageQuery) -> Value:
        more: Value = {}
        if asked.preview:
            more = {"preview": asked.preview, "alt": text(lang, "drop.preview", name=self._name(lang, asked))}
        if asked.error:
            more["error"] = f"{asked.bad_file}: {error_text(lang, asked.error)}"
        return drop_value(lang, text(lang, "drop.other" if asked.preview else "drop.one"), **more)

    def _chips_value(self, lang: str, *_: Any) -> Value:
        items = [
            {"id": one.id, "text": self._title(one, lang) or one.id, "image": self.examples.image_of(one)}
            for one in self.examples.described
        ]
        return {"label": text(lang, "captions.example"), "items": items}

    def _results_value(self, lang: str, asked: ImageQuery) -> Value:
        gallery = self.engine.gallery
        if not gallery.captions:
            return heading_value(lang, self.key, note=text(lang, "captions.none"))
        if asked.embed is None:
            return {}
        try:
            with user_errors():
                found = self.engine.search_captions(asked.embed, NUM_RESULTS, lang)
        except InputError as error:
            return heading_value(lang, self.key, error=error_text(lang, error))
        total = gallery.texts.count(lang) or len(gallery.captions)
        return results_value(
            self.key, found, lang, total, lambda one: {"id": one.id, "text": one.text, "lang": one.lang or None}
        ) | {"link": "" if asked.photo else asked.name}
