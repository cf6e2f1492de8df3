"""Top floor, tab "Similarity matrix": several pictures against several captions, every value in sight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignment.engine import Alignment, AlignmentEngine
from alignment.heatmap import heat_colours
from alignment.preprocess import InputError, parse_captions
from alignment.ui.examples import NUM_COMPARED, Examples
from alignment.ui.results import Value, cosine, percent
from alignment.ui.strings import LANGUAGES, error_text, text
from alignment.ui.uploads import Shelf, fill, progress_value, shelf_drop_value, uploads_of
from alignment.ui.widgets import data_url, listen, spoken, widget

MAX_PICTURES = MAX_CAPTIONS = 64
VIEWS = ("cosine", "captions", "pictures")


@dataclass(frozen=True)
class Compared:
    """What the table shows.

    Attributes:
        shelf: the pictures.
        captions: one a row.
        alignment: their scores; None while there is nothing to compare.
        error: why there is nothing, if something was wrong.
    """

    shelf: Shelf
    captions: tuple[str, ...] = ()
    alignment: Alignment | None = None
    error: InputError | None = None


class MatrixTab:
    """See the module."""

    key = "matrix"

    def __init__(self, engine: AlignmentEngine, examples: Examples) -> None:
        self.engine, self.examples = engine, examples
        ids = [picture.id for picture in examples.pictures[:NUM_COMPARED]]
        self.sample = Shelf(engine.gallery_photos(ids))

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        first = self._compare(self.sample, self._example(lang))
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=4, min_width=280):
                self.drop = widget("drop", self._drop(lang, first), elem_id="matrix-drop")
                self.captions = gr.Textbox(
                    self._example(lang),
                    label=text(lang, "matrix.captions"),
                    lines=5,
                    max_lines=12,
                    elem_id="matrix-captions",
                )
                with gr.Row(elem_classes=["al-actions"]):
                    self.button = gr.Button(text(lang, "matrix.compare"), variant="primary", elem_id="matrix-compare")
                    self.clear = gr.Button(text(lang, "matrix.clear"), variant="secondary", elem_id="matrix-clear")
            with gr.Column(scale=8, min_width=300):
                self.view = gr.Radio(self._views(lang), value="cosine", elem_id="matrix-view", **self._view_words(lang))
                self.table = widget("matrix", self._table(lang, "cosine", first), elem_id="matrix-table")
        self.compared = gr.State(first, time_to_live=3600)
        self.inputs = [self.captions, self.view, self.compared]
        self.outputs = [self.drop, self.captions, self.button, self.clear, self.view, self.compared, self.table]
        self._wire(language)

    def _wire(self, language: Any) -> None:
        asked = [language, self.captions, self.view, self.compared]
        shown = [self.drop, self.compared, self.table]
        listen(self.drop.files, self._take, asked, shown, work="upload")
        listen(self.button.click, self._again, asked, shown, work="search", latest=True)
        listen(self.clear.click, self._clear, asked, shown, work="search")
        listen(self.table.remove, self._remove, asked, shown, work="search")
        listen(self.view.input, self._table, [language, self.view, self.compared], [self.table])

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep pictures and captions; captions of the worked example speak the other language too."""
        typed, view, compared = inputs
        words: dict[str, Any] = {"label": text(lang, "matrix.captions")}
        state: Any = gr.skip()
        if typed != self._example(lang) and typed in {self._example(other) for other in LANGUAGES}:
            words["value"] = self._example(lang)
            compared = state = self._compare(compared.shelf, words["value"])
        return [
            self._drop(lang, compared),
            gr.update(**words),
            gr.update(value=text(lang, "matrix.compare")),
            gr.update(value=text(lang, "matrix.clear")),
            gr.update(choices=self._views(lang), value=view, **self._view_words(lang)),
            state,
            self._table(lang, view, compared),
        ]

    # ------------------------------------------------------------ events

    def _take(self, lang: str, typed: str, view: str, compared: Compared, event: gr.EventData) -> Iterator[list[Any]]:
        uploads = uploads_of(event._data)
        shelf = compared.shelf
        for filled, done in fill(self.engine, shelf, uploads, MAX_PICTURES):
            shelf = filled
            if done < len(uploads):
                title = text(lang, "drop.many")
                busy = progress_value(lang, title, done, len(uploads), MAX_PICTURES)
                yield [busy, replace(compared, shelf=shelf), gr.skip()]
        yield self._shown(lang, view, self._compare(shelf, typed))

    def _again(self, lang: str, typed: str, view: str, compared: Compared) -> list[Any]:
        return self._shown(lang, view, self._compare(replace(compared.shelf, added=0, skipped=()), typed))

    def _clear(self, lang: str, typed: str, view: str, compared: Compared) -> list[Any]:
        return self._shown(lang, view, self._compare(Shelf(self.engine.no_photos(), False), typed))

    def _remove(self, lang: str, typed: str, view: str, compared: Compared, event: gr.EventData) -> list[Any]:
        photos = self.engine.without(compared.shelf.photos, str(event._data.get("id")))
        return self._shown(lang, view, self._compare(Shelf(photos, compared.shelf.sample), typed))

    def _shown(self, lang: str, view: str, compared: Compared) -> list[Any]:
        return [self._drop(lang, compared), compared, self._table(lang, view, compared)]

    def _compare(self, shelf: Shelf, typed: str) -> Compared:
        try:
            captions = tuple(parse_captions(typed, limit=MAX_CAPTIONS))
            if not len(shelf.photos):
                return Compared(shelf, captions)
            with spoken():
                return Compared(shelf, captions, self.engine.align(shelf.photos, captions))
        except InputError as error:
            return Compared(shelf, error=error)

    # ------------------------------------------------------------ what is shown

    def _example(self, lang: str) -> str:
        return "\n".join(self.examples.compared(lang))

    def _views(self, lang: str) -> list[tuple[str, str]]:
        return [(text(lang, f"matrix.view.{view}"), view) for view in VIEWS]

    def _view_words(self, lang: str) -> dict[str, Any]:
        return {"label": text(lang, "matrix.view")}

    def _drop(self, lang: str, compared: Compared) -> Value:
        shelf = compared.shelf
        value = shelf_drop_value(lang, text(lang, "drop.many"), shelf, MAX_PICTURES)
        return {**value, "status": value["status"] or (text(lang, "matrix.sample") if shelf.sample else "")}

    def _table(self, lang: str, view: str, compared: Compared) -> Value:
        if compared.error:
            return {"error": error_text(lang, compared.error)}
        if compared.alignment is None:
            return {"note": text(lang, "matrix.empty")}
        numbers = {"captions": len(compared.captions), "pictures": len(compared.shelf.photos)}
        return {
            "caption": text(lang, "matrix.table", **numbers),
            "columns": self._columns(lang, compared.shelf),
            "rows": _rows(compared.captions, compared.alignment, view),
            "note": text(lang, f"matrix.meaning.{view}"),
            "labels": {
                "bestPicture": text(lang, "matrix.best_picture"),
                "bestCaption": text(lang, "matrix.best_caption"),
                "head": text(lang, "matrix.head"),
            },
        }

    def _columns(self, lang: str, shelf: Shelf) -> list[Value]:
        columns = []
        for picture in shelf.photos.gallery.pictures:
            name = picture.caption(lang) if shelf.sample else picture.source
            name = name or picture.id
            image = data_url(shelf.photos.thumbnails[picture.id])
            columns.append(
                {"id": picture.id, "image": image, "alt": name, "remove": text(lang, "matrix.remove", name=name)}
            )
        return columns


def _values(alignment: Alignment, view: str) -> Tensor:
    """Pick the numbers of a view, (num_images, num_texts)."""
    if view == "captions":
        return alignment.over_captions
    return alignment.over_pictures if view == "pictures" else alignment.similarity


def _rows(captions: tuple[str, ...], alignment: Alignment, view: str) -> list[Value]:
    """Lay the matrix out as the page shows it: captions are rows there, because long ones only fit as rows."""
    values = _values(alignment, view).T.double().numpy()
    colours = _colours(values, view)
    best_captions, best_pictures = alignment.best_captions, alignment.best_pictures
    rows = []
    for row, caption in enumerate(captions):
        cells = [
            {
                "text": cosine(value) if view == "cosine" else percent(value),
                "colours": colours[row][column],
                "bestPicture": best_pictures[row] == column,
                "bestCaption": best_captions[column] == row,
            }
            for column, value in enumerate(values[row].tolist())
        ]
        rows.append({"text": caption, "cells": cells})
    return rows


def _colours(values: NDArray[Any], view: str) -> list[list[list[str]]]:
    """Colour each cell for a light and for a dark page, each with the ink that reads on it."""
    low, high = (values.min(), values.max()) if view == "cosine" else (0.0, 1.0)
    scaled = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    sides = []
    for dark in (False, True):
        colours = heat_colours(scaled, dark=dark)
        # Black reads better than white wherever the relative luminance exceeds 0.18 (WCAG contrast).
        bright = (colours / 255.0) ** 2.2 @ np.array([0.2126, 0.7152, 0.0722]) > 0.18
        sides.append((colours, bright))
    return [
        [
            [part for colours, bright in sides for part in (_hex(colours[row, column]), _ink(bright[row, column]))]
            for column in range(values.shape[1])
        ]
        for row in range(values.shape[0])
    ]


def _hex(colour: NDArray[np.uint8]) -> str:
    return "#" + bytes(colour.tolist()).hex()


def _ink(bright: bool) -> str:
    return "#000000" if bright else "#ffffff"
