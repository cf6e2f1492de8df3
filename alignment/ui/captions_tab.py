"""Top floor, tab "Image to captions": a picture goes in, the gallery's captions come out ranked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from torch import Tensor

from alignment.engine import AlignmentEngine, as_webp
from alignment.gallery import Picture
from alignment.preprocess import InputError, open_image
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import Immutable, session_state
from alignment.ui.examples import PREVIEW_PIXELS, Examples
from alignment.ui.explanation import ExplanationDialog, Pair
from alignment.ui.results import Value, captions_value, note_value, problem_value
from alignment.ui.strings import error_text, text
from alignment.ui.uploads import delete_uploads, drop_value, read_upload, uploads_of
from alignment.ui.widgets import data_url, on_event, picked, user_errors, widget

NUM_RESULTS = 10


@dataclass(frozen=True)
class ImageQuery(Immutable):
    """The picture in question.

    Attributes:
        embed: its embedding; None before there is one.
        preview: address of the picture as it is shown.
        name: what to call it; the id if it is the gallery's.
        photo: a visitor's picture as WebP, kept for explanations; empty if it is the gallery's.
        bad_file: name of the last file, if it was no picture.
        error: what was wrong with it.
    """

    embed: Tensor | None = None
    preview: str = ""
    name: str = ""
    photo: bytes = b""
    bad_file: str = ""
    error: InputError | None = None


class CaptionsTab:
    """See the module."""

    key = "captions"

    def __init__(self, engine: AlignmentEngine, examples: Examples, explanation: ExplanationDialog) -> None:
        self.engine, self.examples, self.explanation = engine, examples, explanation

    @property
    def first(self) -> ImageQuery:
        """What is asked before anybody asks."""
        first = self.examples.described[:1]
        return self._of_gallery(first[0]) if first else ImageQuery()

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        first = self.first
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=5, min_width=300):
                self.drop = widget("drop", self._drop(lang, first), elem_id="captions-drop")
                self.chips = widget("chips", self._chips(lang), elem_id="captions-examples")
            with gr.Column(scale=7, min_width=300):
                self.results = widget("captions", self._results(lang, first), elem_id="captions-results")
        self.asked = session_state(first)
        self.inputs, self.outputs = [self.asked], [self.asked, self.drop, self.chips, self.results]
        self.arrival = [self.asked, self.drop, self.results]
        on_event(self.drop.files, self._take, [language, self.asked], self.arrival, work="search")
        on_event(self.chips.pick, self._pick, [language], self.arrival)
        self.explanation.on_event(self.results.why, self._why, [language, self.asked])

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Rank the captions of the other language for the same picture, unless the gallery has lost it."""
        (asked,) = inputs
        if not asked.photo and self.engine.gallery.picture(asked.name) is None:
            asked = replace(self.first, bad_file=asked.bad_file, error=asked.error)
        return [asked, self._drop(lang, asked), self._chips(lang), self._results(lang, asked)]

    def _take(self, lang: str, asked: ImageQuery, event: gr.EventData) -> list[Any]:
        uploads = uploads_of(event_data(event))
        for upload in uploads[:1]:
            try:
                with user_errors():
                    image = open_image(read_upload(upload, limit=1), draft_size=PREVIEW_PIXELS)
                    photo = as_webp(image, PREVIEW_PIXELS)
                    asked = ImageQuery(self.engine.embed_image(image), data_url(photo), upload.name, photo)
            except InputError as error:
                asked = replace(asked, bad_file=upload.name, error=error)  # what was there stays
        delete_uploads(uploads)
        return [asked, self._drop(lang, asked), self._results(lang, asked)]

    def load_from_url(self, lang: str, asked: str) -> list[Any]:
        """Show the gallery's picture of this id, or what is shown first."""
        picture = self.engine.gallery.picture(asked)
        now = self._of_gallery(picture) if picture else self.first
        return [now, self._drop(lang, now), self._results(lang, now)]

    def _pick(self, lang: str, event: gr.EventData) -> list[Any]:
        return self.load_from_url(lang, picked(event))

    def _why(self, lang: str, asked: ImageQuery, event: gr.EventData) -> Pair | None:
        gallery = self.engine.gallery
        caption = gallery.captions.find(picked(event))
        embed = gallery.texts.embed(picked(event))
        if caption is None or embed is None or asked.embed is None:
            return None
        if not asked.photo and gallery.picture(asked.name) is None:
            return None
        image = open_image(asked.photo) if asked.photo else self.engine.picture_image(asked.name)
        shown = float(asked.embed @ embed)  # as the list says, not as the smaller copy would have it
        return Pair(image, self._name(lang, asked), caption.text, shown)

    def _of_gallery(self, picture: Picture) -> ImageQuery:
        return ImageQuery(self.engine.picture_embed(picture.id), self.examples.preview(picture), picture.id)

    def _name(self, lang: str, asked: ImageQuery) -> str:
        picture = None if asked.photo else self.engine.gallery.picture(asked.name)
        return (self._title(picture, lang) if picture else "") or asked.name

    def _title(self, picture: Picture, lang: str) -> str:
        return self.examples.query(picture, lang) or self.examples.name(picture, lang)

    def _drop(self, lang: str, asked: ImageQuery) -> Value:
        name = self._name(lang, asked)
        title = text(lang, "drop.other" if asked.preview else "drop.one")
        more: Value = {"preview": asked.preview, "alt": text(lang, "drop.preview", name=name)} if asked.preview else {}
        if asked.error:
            more["error"] = f"{asked.bad_file}: {error_text(lang, asked.error)}"
        return drop_value(lang, title, **more)

    def _chips(self, lang: str) -> Value:
        items = [
            {"id": picture.id, "text": self._title(picture, lang) or picture.id, "image": image}
            for picture, image in ((picture, self.examples.image_of(picture)) for picture in self.examples.described)
        ]
        return {"label": text(lang, "captions.example"), "items": items}

    def _results(self, lang: str, asked: ImageQuery) -> Value:
        gallery = self.engine.gallery
        if not gallery.captions:
            return note_value(lang, "captions.none")
        if asked.embed is None:
            return {}
        try:
            with user_errors():
                found = self.engine.search_captions(asked.embed, NUM_RESULTS, lang)
        except InputError as error:
            return problem_value(error, lang, self.key)
        total = gallery.texts.count(lang) or len(gallery.captions)
        link = "" if asked.photo else asked.name
        return {**captions_value(found, lang, total=total), "link": link}
