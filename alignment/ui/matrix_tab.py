"""UI, tab "Similarity matrix": several pictures against several captions, with every value shown.

The page gets the cosines once, of one model or of two; `assets/ui/matrix.js` computes the views of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import gradio as gr
import numpy as np

from alignment.engine import Alignment
from alignment.engine.matrix import COLOUR_LIMITS, named_captions
from alignment.gallery import Picture
from alignment.heatmap import heat_colours
from alignment.preprocess import InputError, open_image, parse_captions
from alignment.preprocess.captions import caption_lines
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import Immutable
from alignment.ui.explanation import Pair
from alignment.ui.strings import LANGUAGES, error_text, labels, text
from alignment.ui.tab import Tab
from alignment.ui.uploads import PhotoState, add_uploads, photos_drop_value, uploads_of
from alignment.ui.widgets import Changes, Value, data_url, picked, user_errors

MAX_PICTURES = MAX_CAPTIONS = 64
NUM_COMPARED = 4  # pictures and captions that are shown first
VIEWS = ("cosine", "captions", "pictures", "sigmoid")

_REACH = 3  # spreads of unrelated cosines at which a difference has the strongest colour


@dataclass(frozen=True)
class Compared(Immutable):
    """What the table shows."""

    photos: PhotoState
    captions: tuple[str, ...] = ()  # one a row
    named: tuple[int | None, ...] = ()  # for each caption the position of the picture that its line names
    alignments: tuple[Alignment, ...] = ()  # by the page's model and by the second; empty without pictures
    error: InputError | None = None  # why there is no table


class MatrixTab(Tab):
    """The tab."""

    key = "matrix"

    def _build(self, lang: str) -> None:
        ids = [picture.id for picture in self.examples.pictures[:NUM_COMPARED]]
        self.sample = PhotoState(self.engine.gallery_photos(ids, both=True))
        (self.compared,) = self.add_states(self.compare(self.sample, self._example(lang)))
        with gr.Row(elem_classes=["al-columns"], elem_id="matrix-place"):
            with gr.Column(scale=4, min_width=280):
                self.drop = self.add_widget("drop", "drop", self._drop_value)
                box: dict[str, Any] = {"lines": 5, "max_lines": 12, "elem_id": "matrix-captions"}
                self.captions = gr.Textbox(self._example(lang), **self._box_words(lang), **box)
                self.views[self.captions] = lambda lang, _: gr.update(**self._box_words(lang))
                with gr.Row(elem_classes=["al-actions"]):
                    self.button = self.add_button("compare")
                    self.clear = self.add_button("clear", "secondary")
            with gr.Column(scale=8, min_width=300):
                self.table = self.add_widget("matrix", "table", self.table_value, ("matrix_maths", "matrix_files"))
        self.inputs = [self.captions, self.compared]
        self.shown = [self.drop, self.compared, self.table]
        self.url_outputs = [self.captions, *self.shown]
        self.on(self.drop.files, self._add_files, self.shown, "upload")
        self.on(self.button.click, self._compare_again, self.shown, "search", latest=True)
        self.on(self.clear.click, self._clear, self.shown, "search")
        self.on(self.table.remove, self._remove, self.shown, "search")
        self.explanation.on_event(self.table.why, self.find_pair, [self.language, *self.inputs])

    def translate(self, lang: str, *values: Any) -> Changes:
        """Keep pictures and captions; example captions that were not edited are translated."""
        typed, compared = values
        example = self._example(lang)
        if typed == example or typed not in map(self._example, LANGUAGES):
            return self.redraw(lang, self.views, compared)
        changes = self.redraw(lang, self.outputs, self.compare(compared.photos, example))
        return {**changes, self.captions: gr.update(value=example, **self._box_words(lang))}

    def load_from_url(self, lang: str, asked: str) -> Changes:
        """Compare the captions of a link, one a line, with the sample."""
        return {self.captions: asked, **self.redraw(lang, self.shown, self.compare(self.sample, asked))}

    def compare(self, photos: PhotoState, typed: str) -> Compared:
        """Score the pictures against the captions typed, one a line."""
        try:
            lines = caption_lines(typed, limit=MAX_CAPTIONS)
            read = named_captions(lines, [PurePath(picture.source).name for picture in photos.photos.gallery.pictures])
            captions = tuple(parse_captions("\n".join(caption for _, caption in read), limit=MAX_CAPTIONS))
            named = tuple(place for place, _ in read)
            with user_errors():
                alignments = self.engine.align_both(photos.photos, captions) if len(photos.photos) else ()
            return Compared(photos, captions, named, alignments)
        except InputError as error:
            return Compared(photos, error=error)

    def _add_files(self, event: gr.EventData, lang: str, typed: str, compared: Compared) -> Iterator[Changes]:
        uploads = uploads_of(event_data(event))
        for photos, done, total in add_uploads(self.engine, compared.photos, uploads, MAX_PICTURES):
            compared = replace(compared, photos=photos)
            if done < total:
                busy = photos_drop_value(lang, text(lang, "drop.many"), photos, MAX_PICTURES, (done, total))
                yield {self.drop: busy, self.compared: compared}
        yield self.redraw(lang, self.shown, self.compare(compared.photos, typed))

    def _compare_again(self, lang: str, typed: str, compared: Compared) -> Changes:
        photos = replace(compared.photos, added=0, skipped=())
        return self.redraw(lang, self.shown, self.compare(photos, typed))

    def _clear(self, lang: str, typed: str, compared: Compared) -> Changes:
        photos = PhotoState(self.engine.no_photos(both=True), False)
        return self.redraw(lang, self.shown, self.compare(photos, typed))

    def _remove(self, event: gr.EventData, lang: str, typed: str, compared: Compared) -> Changes:
        photos = self.engine.without(compared.photos.photos, picked(event))
        return self.redraw(lang, self.shown, self.compare(PhotoState(photos, compared.photos.sample), typed))

    def find_pair(self, event: gr.EventData, lang: str, typed: str, compared: Compared) -> Pair | None:
        """Return the picture and the caption of a cell."""
        sent = event_data(event)
        row, photos = sent.get("caption"), compared.photos
        pictures = photos.photos.gallery.pictures if compared.alignments else ()
        column = next((place for place, picture in enumerate(pictures) if picture.id == sent.get("picture")), None)
        if column is None or type(row) is not int or not 0 <= row < len(compared.captions):
            return None
        id = pictures[column].id
        image = self.engine.picture_image(id) if photos.sample else open_image(photos.photos.thumbnails[id])
        cosine = float(compared.alignments[0].similarity[column, row])
        return Pair(image, photos.name(pictures[column], lang), compared.captions[row], cosine)

    def _example(self, lang: str) -> str:
        return "\n".join(self.examples.queries(lang)[:NUM_COMPARED])

    def _box_words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "matrix.captions"), "info": text(lang, "matrix.help")}

    def _drop_value(self, lang: str, compared: Compared) -> Value:
        value = photos_drop_value(lang, text(lang, "drop.many"), compared.photos, MAX_PICTURES)
        return {**value, "status": value["status"] or (text(lang, "matrix.sample") if compared.photos.sample else "")}

    def table_value(self, lang: str, compared: Compared) -> Value:
        """Lay the table out for `matrix.js`."""
        if compared.error:
            return {"error": error_text(lang, compared.error)}
        if not compared.alignments:
            return {"note": text(lang, "matrix.empty")}
        pictures, rows = compared.photos.photos.gallery.pictures, range(len(compared.captions))
        has_sigmoid = all(alignment.logit_bias is not None for alignment in compared.alignments)
        return {
            "caption": text(lang, "matrix.table", captions=len(rows), pictures=len(pictures)),
            "columns": [_column_value(picture, compared.photos, lang) for picture in pictures],
            "rows": list(compared.captions),
            "owners": {
                "order": [row if row < len(pictures) else -1 for row in rows],
                "name": [-1 if place is None else place for place in compared.named],
                "none": [-1 for _ in rows],
            },
            "pairing": "order" if set(compared.named) == {None} else "name",
            "models": self._model_values(compared),
            "reach": _REACH * self.engine.scale.spread,
            "views": [view for view in VIEWS if view != "sigmoid" or has_sigmoid],
            "colours": _colours(),
            "labels": labels(lang, "matrix.label."),
            "names": labels(lang, "matrix.view."),
            "meanings": labels(lang, "matrix.meaning."),
        }

    def _model_values(self, compared: Compared) -> list[Value]:
        """Lay the models' scores out; captions are the rows of the page's table, because long ones only fit there."""
        models = zip((self.engine, self.engine.second), compared.alignments, strict=False)
        return [
            {
                "name": Path(model.encoder.name).name,
                "cosines": [[round(value, 7) for value in row] for row in scores.similarity.T.double().tolist()],
                "scale": scores.logit_scale,
                "bias": scores.logit_bias,
                "limits": list(model.scale.limits(*COLOUR_LIMITS)),
            }
            for model, scores in models
            if model
        ]


def _column_value(picture: Picture, photos: PhotoState, lang: str) -> Value:
    name, image = photos.name(picture, lang), data_url(photos.photos.thumbnails[picture.id])
    return {"id": picture.id, "image": image, "alt": name, "remove": text(lang, "matrix.remove", name=name)}


@cache
def _colours() -> dict[str, list[str]]:
    """List 256 colours for values, on a light and on a dark page."""
    heat = {theme: heat_colours(np.linspace(0, 1, 256), dark=theme == "dark") for theme in ("light", "dark")}
    return {theme: ["#" + bytes(colour.tolist()).hex() for colour in colours] for theme, colours in heat.items()}
