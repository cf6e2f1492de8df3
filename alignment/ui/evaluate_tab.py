"""UI, tab "Evaluate": recall in both directions on the visitor's own captioned pictures.

The starter gallery is the worked example; an uploaded data set is measured, shown, and deleted with the session.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import gradio as gr

from alignment.engine import MAX_ZIP_MB, dataset_eval
from alignment.preprocess import InputError
from alignment.server.gradio_internals import event_data
from alignment.server.sessions import Immutable
from alignment.ui.report import report_json, report_value, sample_zip
from alignment.ui.strings import LANGUAGES, error_text, labels, text
from alignment.ui.tab import Tab
from alignment.ui.uploads import Jobs, Upload, delete_uploads, drop_value, part_of, parts_value, upload_path, uploads_of
from alignment.ui.widgets import BrowserDownload, Changes, File, Value, data_url, on_event, user_errors

STEPS = {"unpacking": "evaluate.unpacking", "pictures": "evaluate.pictures", "captions": "evaluate.captions"}


@dataclass(frozen=True)
class Measured(Immutable):
    """What the tab shows."""

    result: dataset_eval.EvalResult | None = None  # of the visitor's own data; None for the worked example
    name: str = ""  # of the file it came in
    bad_file: str = ""  # name of the last file, if it could not be measured
    error: InputError | None = None  # why not


class EvaluateTab(Tab):
    """The tab."""

    key = "evaluate"

    def _build(self, lang: str) -> None:
        self.jobs = Jobs()
        self.example = lru_cache(len(LANGUAGES))(lambda lang: dataset_eval.gallery_trial(self.engine.starter, lang))
        (self.measured,) = self.add_states(Measured())
        with gr.Row(elem_classes=["al-columns"]):
            with gr.Column(scale=4, min_width=280):
                self.drop = self.add_widget("drop", "drop", self._drop_value)
                self.help = self.add_widget("evaluate", "help", self._help_value)
                self.sample = self.add_widget("download", "sample", self._sample_value)
            with gr.Column(scale=8, min_width=300):
                self.report = self.add_widget("evaluate", "results", self._report_value)
                self.download = self.add_widget("download", "download", self._download_value)
        self.on(self.drop.files, self._measure, [self.measured, self.drop, self.report, self.download], "upload")
        on_event(self.drop.halt, self.jobs.stop, [], [])
        download = BrowserDownload("evaluate-courier")
        download.serve(self.sample, sample_zip, self._sample_value, [self.language])
        download.serve(self.download, self._export_report, self._download_value, [self.language, self.measured])

    def _measure(self, event: gr.EventData, request: gr.Request, lang: str, measured: Measured) -> Iterator[Changes]:
        uploads, (run, _) = uploads_of(event_data(event))[:1], part_of(event_data(event))
        measured = replace(measured, bad_file="", error=None)
        try:
            with self.jobs.start(request.session_hash) as job:
                for step in self._steps(uploads):
                    if isinstance(step, dataset_eval.EvalResult):
                        measured = Measured(step, uploads[0].name)
                    elif job.stopped:
                        break
                    else:
                        said = text(lang, STEPS[step.what], done=step.done + 1, total=step.total)
                        progress = {"done": step.share, "total": 1, "text": said}
                        yield {self.drop: self._drop_value(lang, Measured()) | {"progress": progress}}
        except InputError as error:
            measured = replace(measured, bad_file=uploads[0].name, error=error)  # the report before it stays
        finally:
            delete_uploads(uploads)
        changes = self.redraw(lang, [self.measured, self.report, self.download], measured)
        yield {**changes, self.drop: self._drop_value(lang, measured, run)}

    def _steps(self, uploads: list[Upload]) -> Iterator[dataset_eval.Progress | dataset_eval.EvalResult]:
        for upload in uploads:
            path = upload_path(upload, limit_mb=MAX_ZIP_MB)
            with user_errors(), closing(dataset_eval.measure_archive(self.engine, path)) as steps:
                yield from steps

    def _export_report(self, lang: str, measured: Measured) -> File:
        result = measured.result or self.example(lang)
        if result is None:
            raise InputError("There is nothing to report yet; choose a zip file first.", "trial.none")
        return "report.json", "application/json", report_json(result, self.engine.encoder, measured.name)

    def _drop_value(self, lang: str, measured: Measured, run: int = 0) -> Value:
        error = f"{measured.bad_file}: {error_text(lang, measured.error)}" if measured.error else ""
        how = text(lang, "evaluate.how", limit=MAX_ZIP_MB)
        area = drop_value(lang, text(lang, "evaluate.drop"), accept=".zip", how=how, error=error)
        return area | parts_value(1, run)

    def _help_value(self, lang: str, *_: Any) -> Value:
        pictures, captions = dataset_eval.MAX_TRIAL_PICTURES, f"{dataset_eval.MAX_TRIAL_CAPTIONS:,}"
        limits = text(lang, "evaluate.limits", pictures=pictures, captions=captions, size=MAX_ZIP_MB)
        return {"labels": labels(lang, "evaluate."), "limits": limits}

    def _sample_value(self, lang: str, *_: Any) -> Value:
        return {"label": text(lang, "evaluate.sample")}

    def _download_value(self, lang: str, measured: Measured) -> Value:
        nothing = measured.result is None and self.example(lang) is None
        return {"label": text(lang, "evaluate.download"), "disabled": nothing}

    def _report_value(self, lang: str, measured: Measured) -> Value:
        result = measured.result
        if result is not None:
            images = {name: data_url(webp) for name, webp in result.thumbnails.items()}
            return report_value(lang, result, text(lang, "evaluate.yours", name=measured.name), "", images, {})
        example = self.example(lang)
        if example is None:
            return {"heading": text(lang, "evaluate.results"), "note": text(lang, "evaluate.nothing")}
        pictures = [picture for id in example.thumbnails if (picture := self.engine.starter.pictures.find(id))]
        images = {picture.id: self.examples.image_of(picture) for picture in pictures}
        names = {picture.id: picture.caption(lang) for picture in pictures}
        heading, note = text(lang, "evaluate.example"), text(lang, "evaluate.example.note")
        return report_value(lang, example, heading, note, images, names)
