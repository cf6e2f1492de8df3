"""Top floor, tab "Evaluate": a visitor's own captioned pictures go in, recall in both directions comes out.

The starter gallery is the worked example; what is uploaded is measured, shown, and gone when the visitor leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import gradio as gr

from alignment.engine import MAX_ZIP_MB, AlignmentEngine
from alignment.engine.dataset_eval import (
    MAX_TRIAL_CAPTIONS,
    MAX_TRIAL_PICTURES,
    EvalResult,
    Progress,
    gallery_trial,
    measure_archive,
)
from alignment.preprocess import InputError
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import Immutable, session_state
from alignment.ui.download import BrowserDownload
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog
from alignment.ui.jobs import Tasks, parts_value, run_of
from alignment.ui.report import report_json, report_value
from alignment.ui.results import Value
from alignment.ui.sample_dataset import sample_zip
from alignment.ui.strings import LANGUAGES, error_text, text
from alignment.ui.uploads import Upload, delete_uploads, drop_value, uploads_of, validate_upload
from alignment.ui.widgets import data_url, on_event, user_errors, widget

SAMPLE, REPORT = "example.zip", "report.json"
DOING = {"unpacking": "evaluate.unpacking", "pictures": "evaluate.pictures", "captions": "evaluate.captions"}
FORMS = ("evaluate.form.table", "evaluate.form.lines", "evaluate.form.beside", "evaluate.form.published")


@dataclass(frozen=True)
class Measured(Immutable):
    """What the tab shows.

    Attributes:
        trial: of the visitor's own data; None for the worked example.
        name: of the file it came in.
        bad_file: name of the last file, if it could not be measured.
        error: why not.
    """

    trial: EvalResult | None = None
    name: str = ""
    bad_file: str = ""
    error: InputError | None = None


class EvaluateTab:
    """See the module."""

    key = "evaluate"

    def __init__(self, engine: AlignmentEngine, examples: Examples, explanation: ExplanationDialog) -> None:
        self.engine, self.examples = engine, examples
        self.by_id = {picture.id: picture for picture in engine.starter.pictures}
        self.example = lru_cache(len(LANGUAGES))(lambda lang: gallery_trial(engine.starter, lang))
        self.tasks = Tasks()
        self.arrival: list[Any] = []

    def build(self, language: Any, lang: str) -> None:
        """Lay the tab out."""
        first = Measured()
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=4, min_width=280):
                self.drop = widget("drop", self._drop(lang, first), elem_id="evaluate-drop")
                self.help = widget("evaluate", self._help(lang), elem_id="evaluate-help")
                self.sample = widget("download", self._sample(lang), elem_id="evaluate-sample")
            with gr.Column(scale=8, min_width=300):
                self.report = widget("evaluate", self._report(lang, first), elem_id="evaluate-results")
                self.saving = widget("download", self._saving(lang, first), elem_id="evaluate-download")
        self.measured = session_state(first)
        self.inputs = [self.measured]
        self.outputs = [self.drop, self.help, self.sample, self.report, self.saving]
        self._wire(language)

    def _wire(self, language: Any) -> None:
        on_event(
            self.drop.files,
            self._take,
            [language, self.measured],
            [self.measured, self.drop, self.report, self.saving],
            work="upload",
        )
        on_event(self.drop.halt, self._halt, [], [])
        courier = BrowserDownload("evaluate-courier")
        courier.serve(self.sample, self._packed_sample, self._sample, [language])
        courier.serve(self.saving, self._written, self._saving, [language, self.measured])

    def load_from_url(self, lang: str, q: str) -> list[Any]:
        """Do nothing: nobody else's data can be linked to."""
        return []

    def translate(self, lang: str, *inputs: Any) -> list[Any]:
        """Keep the report; the worked example takes the captions of the other language."""
        (measured,) = inputs
        return [
            self._drop(lang, measured),
            self._help(lang),
            self._sample(lang),
            self._report(lang, measured),
            self._saving(lang, measured),
        ]

    # ------------------------------------------------------------ events

    def _take(self, lang: str, measured: Measured, event: gr.EventData, request: gr.Request) -> Iterator[list[Any]]:
        uploads, (run, _) = uploads_of(event_data(event))[:1], run_of(event_data(event))
        measured = replace(measured, bad_file="", error=None)
        try:
            with self.tasks.begin(request.session_hash) as task:
                for step in self._steps(uploads):
                    if isinstance(step, EvalResult):
                        measured = Measured(step, uploads[0].name)
                    elif task.stopped:
                        break
                    else:
                        yield [gr.skip(), self._busy(lang, step), gr.skip(), gr.skip()]
        except InputError as error:
            measured = replace(measured, bad_file=uploads[0].name, error=error)  # the report that was there stays
        finally:
            delete_uploads(uploads)
        yield [measured, self._drop(lang, measured, run), self._report(lang, measured), self._saving(lang, measured)]

    def _steps(self, uploads: list[Upload]) -> Iterator[Progress | EvalResult]:
        for upload in uploads:
            with (
                user_errors(),
                closing(measure_archive(self.engine, validate_upload(upload, limit_mb=MAX_ZIP_MB))) as steps,
            ):
                yield from steps

    def _halt(self, request: gr.Request) -> None:
        self.tasks.of(request.session_hash).stopped = True

    def _packed_sample(self, lang: str) -> tuple[str, str, bytes]:
        return SAMPLE, "application/zip", sample_zip(lang)

    def _written(self, lang: str, measured: Measured) -> tuple[str, str, bytes]:
        trial = measured.trial or self.example(lang)
        if trial is None:
            raise InputError("There is nothing to report yet; choose a zip file first.", "trial.none")
        return REPORT, "application/json", report_json(trial, self.engine.encoder, measured.name)

    # ------------------------------------------------------------ what is shown

    def _drop(self, lang: str, measured: Measured, run: int = 0) -> Value:
        error = f"{measured.bad_file}: {error_text(lang, measured.error)}" if measured.error else ""
        how = text(lang, "evaluate.how", limit=MAX_ZIP_MB)
        parts = parts_value(lang, 1, run)
        return drop_value(lang, text(lang, "evaluate.drop"), **(parts | {"accept": ".zip", "how": how, "error": error}))

    def _busy(self, lang: str, step: Progress) -> Value:
        say = text(lang, DOING[step.what], done=step.done + 1, total=step.total)
        return self._drop(lang, Measured()) | {"progress": {"done": step.share, "total": 1, "text": say}}

    def _help(self, lang: str) -> Value:
        limits = {"pictures": MAX_TRIAL_PICTURES, "captions": f"{MAX_TRIAL_CAPTIONS:,}", "size": MAX_ZIP_MB}
        return {
            "help": text(lang, "evaluate.help"),
            "tree": text(lang, "evaluate.tree"),
            "forms": [text(lang, form) for form in FORMS],
            "note": text(lang, "evaluate.limits", **limits),
        }

    def _sample(self, lang: str) -> Value:
        return {"label": text(lang, "evaluate.sample")}

    def _saving(self, lang: str, measured: Measured) -> Value:
        nothing = measured.trial is None and self.example(lang) is None
        return {"label": text(lang, "evaluate.download"), "disabled": nothing}

    def _report(self, lang: str, measured: Measured) -> Value:
        trial = measured.trial
        if trial is not None:
            images = {name: data_url(webp) for name, webp in trial.thumbnails.items()}
            return report_value(lang, trial, text(lang, "evaluate.yours", name=measured.name), "", images, {})
        example = self.example(lang)
        if example is None:
            return {"heading": text(lang, "evaluate.results"), "note": text(lang, "evaluate.nothing")}
        pictures = [self.by_id[id] for id in example.thumbnails]
        images = {picture.id: self.examples.image_of(picture) for picture in pictures}
        names = {picture.id: picture.caption(lang) for picture in pictures}
        return report_value(
            lang, example, text(lang, "evaluate.example"), text(lang, "evaluate.example.note"), images, names
        )
