"""Top floor, tab "Similarity matrix": several pictures against several captions, every value in sight.

The page is given the cosines once, of one model or of two; `assets/ui/matrix.js` makes the views of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import gradio as gr
import numpy as np

from alignment.engine import Alignment, AlignmentEngine
from alignment.engine.explanation import Scale
from alignment.engine.matrix import colour_limits, named_captions
from alignment.heatmap import heat_colours
from alignment.preprocess import InputError, count_captions, open_image, parse_captions
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import Immutable, session_state
from alignment.ui.examples import NUM_COMPARED, Examples
from alignment.ui.explanation import ExplanationDialog, Pair
from alignment.ui.results import Value
from alignment.ui.strings import LANGUAGES, error_text, strings, text
from alignment.ui.uploads import PhotoState, fill, progress_value, shelf_drop_value, uploads_of
from alignment.ui.widgets import data_url, on_event, picked, user_errors, widget

MAX_PICTURES = MAX_CAPTIONS = 64
VIEWS = ("cosine", "captions", "pictures", "sigmoid")
THEMES = ("light", "dark")

# From less to more, by way of the page's own colour: orange and violet, which the colour-blind tell apart.
_DIFFERENCE = {
    "light": ("#8f3f00", "#e5a063", "#f4f3f1", "#a7a1ea", "#3d33b4"),
    "dark": ("#ffc48a", "#a3642e", "#26262d", "#5c57b3", "#c8c5ff"),
}
_REACH = 3  # spreads of unrelated cosines that the strongest colours of the difference stand for


@dataclass(frozen=True)
class Compared(Immutable):
    """What the table shows.

    Attributes:
        shelf: the pictures.
        captions: one a row.
        named: for each caption the place of the picture that its line named, or None.
        alignments: their scores, by the page's model and then by the second, if there is one; empty while there is
            nothing to compare.
        error: why there is nothing, if something was wrong.
    """

    shelf: PhotoState
    captions: tuple[str, ...] = ()
    named: tuple[int | None, ...] = ()
    alignments: tuple[Alignment, ...] = ()
    error: InputError | None = None


class MatrixTab:
    """See the module."""

    key = "matrix"

    def __init__(self, engine: AlignmentEngine, examples: Examples, explanation: ExplanationDialog) -> None:
        self.engine, self.examples, self.explanation = engine, examples, explanation
        ids = [picture.id for picture in examples.pictures[:NUM_COMPARED]]
        self.sample = PhotoState(engine.gallery_photos(ids, both=True))

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        first = self._compare(self.sample, self._example(lang))
        with gr.Row(elem_classes=["al-columns"], elem_id="matrix-place"):
            with gr.Column(scale=4, min_width=280):
                self.drop = widget("drop", self._drop(lang, first), elem_id="matrix-drop")
                self.captions = gr.Textbox(
                    self._example(lang),
                    **self._caption_words(lang),
                    lines=5,
                    max_lines=12,
                    elem_id="matrix-captions",
                )
                with gr.Row(elem_classes=["al-actions"]):
                    self.button = gr.Button(text(lang, "matrix.compare"), variant="primary", elem_id="matrix-compare")
                    self.clear = gr.Button(text(lang, "matrix.clear"), variant="secondary", elem_id="matrix-clear")
            with gr.Column(scale=8, min_width=300):
                parts = ("matrix_maths", "matrix_files")
                self.table = widget("matrix", self._table(lang, first), parts, elem_id="matrix-table")
        self.compared = session_state(first)
        self.inputs = [self.captions, self.compared]
        self.outputs = [self.drop, self.captions, self.button, self.clear, self.compared, self.table]
        self.arrival = [self.captions, self.drop, self.compared, self.table]
        self._wire(language)

    def _wire(self, language: Any) -> None:
        asked = [language, self.captions, self.compared]
        shown = [self.drop, self.compared, self.table]
        on_event(self.drop.files, self._take, asked, shown, work="upload")
        on_event(self.button.click, self._again, asked, shown, work="search", latest=True)
        on_event(self.clear.click, self._clear, asked, shown, work="search")
        on_event(self.table.remove, self._remove, asked, shown, work="search")
        self.explanation.on_event(self.table.why, self._why, [language, self.compared])

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep pictures and captions; captions of the worked example speak the other language too."""
        typed, compared = inputs
        words = self._caption_words(lang)
        state: Any = gr.skip()
        if typed != self._example(lang) and typed in {self._example(other) for other in LANGUAGES}:
            words["value"] = self._example(lang)
            compared = state = self._compare(compared.shelf, words["value"])
        return [
            self._drop(lang, compared),
            gr.update(**words),
            gr.update(value=text(lang, "matrix.compare")),
            gr.update(value=text(lang, "matrix.clear")),
            state,
            self._table(lang, compared),
        ]

    def load_from_url(self, lang: str, asked: str) -> list[Any]:
        """Compare the captions of a link, one a line, with the sample; renews `arrival`."""
        return [asked, *self._shown(lang, self._compare(self.sample, asked))]

    # ------------------------------------------------------------ events

    def _take(self, lang: str, typed: str, compared: Compared, event: gr.EventData) -> Iterator[list[Any]]:
        uploads = uploads_of(event_data(event))
        shelf = compared.shelf
        for filled, done in fill(self.engine, shelf, uploads, MAX_PICTURES):
            shelf = filled
            if done < len(uploads):
                title = text(lang, "drop.many")
                busy = progress_value(lang, title, done, len(uploads), MAX_PICTURES)
                yield [busy, replace(compared, shelf=shelf), gr.skip()]
        yield self._shown(lang, self._compare(shelf, typed))

    def _again(self, lang: str, typed: str, compared: Compared) -> list[Any]:
        return self._shown(lang, self._compare(replace(compared.shelf, added=0, skipped=()), typed))

    def _clear(self, lang: str, typed: str, compared: Compared) -> list[Any]:
        return self._shown(lang, self._compare(PhotoState(self.engine.no_photos(both=True), False), typed))

    def _remove(self, lang: str, typed: str, compared: Compared, event: gr.EventData) -> list[Any]:
        photos = self.engine.without(compared.shelf.photos, picked(event))
        return self._shown(lang, self._compare(PhotoState(photos, compared.shelf.sample), typed))

    def _why(self, lang: str, compared: Compared, event: gr.EventData) -> Pair | None:
        sent = event_data(event)
        row, shelf = sent.get("caption"), compared.shelf
        pictures = shelf.photos.gallery.pictures if compared.alignments else ()
        column = next((place for place, picture in enumerate(pictures) if picture.id == sent.get("picture")), None)
        if column is None or type(row) is not int or not 0 <= row < len(compared.captions):
            return None
        id = pictures[column].id
        image = self.engine.picture_image(id) if shelf.sample else open_image(shelf.photos.thumbnails[id])
        cosine = float(compared.alignments[0].similarity[column, row])
        return Pair(image, _name(pictures[column], shelf, lang), compared.captions[row], cosine)

    def _shown(self, lang: str, compared: Compared) -> list[Any]:
        return [self._drop(lang, compared), compared, self._table(lang, compared)]

    def _compare(self, shelf: PhotoState, typed: str) -> Compared:
        try:
            count_captions(typed, limit=MAX_CAPTIONS)
            names = [PurePath(picture.source).name for picture in shelf.photos.gallery.pictures]
            read = named_captions(typed, names)
            captions = tuple(parse_captions("\n".join(caption for _, caption in read), limit=MAX_CAPTIONS))
            named = tuple(place for place, _ in read)
            if not len(shelf.photos):
                return Compared(shelf, captions, named)
            with user_errors():
                return Compared(shelf, captions, named, self.engine.align_both(shelf.photos, captions))
        except InputError as error:
            return Compared(shelf, error=error)

    # ------------------------------------------------------------ what is shown

    def _example(self, lang: str) -> str:
        return "\n".join(self.examples.compared(lang))

    def _caption_words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "matrix.captions"), "info": text(lang, "matrix.help")}

    def _drop(self, lang: str, compared: Compared) -> Value:
        shelf = compared.shelf
        value = shelf_drop_value(lang, text(lang, "drop.many"), shelf, MAX_PICTURES)
        return {**value, "status": value["status"] or (text(lang, "matrix.sample") if shelf.sample else "")}

    def _table(self, lang: str, compared: Compared) -> Value:
        if compared.error:
            return {"error": error_text(lang, compared.error)}
        if not compared.alignments:
            return {"note": text(lang, "matrix.empty")}
        pictures = compared.shelf.photos.gallery.pictures
        rows = range(len(compared.captions))
        return {
            "caption": text(lang, "matrix.table", captions=len(rows), pictures=len(pictures)),
            "columns": [_column(picture, compared.shelf, lang) for picture in pictures],
            "rows": list(compared.captions),
            "owners": {
                "order": [row if row < len(pictures) else -1 for row in rows],
                "name": [-1 if place is None else place for place in compared.named],
                "none": [-1 for _ in rows],
            },
            "pairing": "order" if set(compared.named) == {None} else "name",
            "models": self._models(compared),
            "reach": _REACH * self.engine.scale.spread,
            "views": self._views(lang, compared),
            "colours": _colours(),
            "labels": _labels(lang),
        }

    def _models(self, compared: Compared) -> list[Value]:
        second = self.engine.second
        known = [(self.engine.encoder.name, self.engine.scale)]
        known += [(second.encoder.name, second.scale)] if second else []
        return [_model(*model, alignment) for model, alignment in zip(known, compared.alignments, strict=False)]

    def _views(self, lang: str, compared: Compared) -> list[Value]:
        judged_alone = all(alignment.logit_bias is not None for alignment in compared.alignments)
        return [
            {"key": view, "name": text(lang, f"matrix.view.{view}"), "meaning": text(lang, f"matrix.meaning.{view}")}
            for view in VIEWS
            if view != "sigmoid" or judged_alone
        ]


def _name(picture: Any, shelf: PhotoState, lang: str) -> str:
    return (picture.caption(lang) if shelf.sample else picture.source) or picture.id


def _column(picture: Any, shelf: PhotoState, lang: str) -> Value:
    name, image = _name(picture, shelf, lang), data_url(shelf.photos.thumbnails[picture.id])
    return {"id": picture.id, "image": image, "alt": name, "remove": text(lang, "matrix.remove", name=name)}


def _model(name: str, scale: Scale, alignment: Alignment) -> Value:
    """Lay one model's scores out as the page shows them: captions are rows there, as long ones only fit as rows."""
    return {
        "name": Path(name).name,
        "cosines": [[round(value, 7) for value in row] for row in alignment.similarity.T.double().tolist()],
        "scale": alignment.logit_scale,
        "bias": alignment.logit_bias,
        "limits": list(colour_limits(scale)),
    }


def _labels(lang: str) -> dict[str, str]:
    """Hand the script its words, with their placeholders: it fills them itself."""
    prefix = "matrix.label."
    return {key.removeprefix(prefix): words for key, words in strings()[lang].items() if key.startswith(prefix)}


@cache
def _colours() -> dict[str, dict[str, list[str]]]:
    """List 256 colours for values and for differences, on a light and on a dark page."""
    steps = np.linspace(0, 1, 256)
    return {
        "heat": {theme: _hex(heat_colours(steps, dark=theme == "dark")) for theme in THEMES},
        "difference": {theme: _hex(_between(_DIFFERENCE[theme], steps)) for theme in THEMES},
    }


def _between(colours: tuple[str, ...], steps: Any) -> Any:
    known = np.array([list(bytes.fromhex(colour[1:])) for colour in colours])
    places = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(steps, places, channel) for channel in known.T], axis=1).round().astype(np.uint8)


def _hex(colours: Any) -> list[str]:
    return ["#" + bytes(colour.tolist()).hex() for colour in colours]
