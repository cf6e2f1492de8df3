"""The documents of a finished run: `report.md` with plots, and the model card.

Place in the flow: `run -> record -> report (here) -> publish`. Both are rendered from the `RunRecord` alone, so they
can be made again from `run.json`:

    write_report(RunRecord.from_json(folder / "run.json"), folder)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from alignment.train.markdown import changes, number, one_line, plain, render
from alignment.train.plan import format_duration
from alignment.train.plots import write_plots
from alignment.train.record import REPOSITORY, RunRecord

# The model types of transformers' zero-shot image classification; the others need this package.
_ZERO_SHOT = {"clip", "siglip", "siglip2", "chinese_clip"}


def write_report(record: RunRecord, folder: str | os.PathLike[str]) -> Path:
    """Write `report.md` and its `plots/` into the result folder, in place of earlier ones; returns its path."""
    path = Path(folder, "report.md")
    values = _values(record) | {"plots": write_plots(record, path.with_name("plots"))}
    settings = json.dumps(record.settings, indent=1, ensure_ascii=False)
    path.write_text(render("report.md.j2", **values, settings=settings), encoding="utf-8")
    return path


def model_card(record: RunRecord) -> str:
    """Render the README.md of the result folder: the Hub's metadata and the text of the card."""
    front = _metadata(record).to_yaml(line_break="\n").strip()
    return render("model_card.md.j2", **_values(record), front=front, repository=REPOSITORY)


def _values(record: RunRecord) -> dict[str, Any]:
    """Collect what the templates need."""
    second = (record.second_before or {}, record.second_after or {}, record.second_difference or {})
    return {
        "record": record,
        "plan": record.plan,
        "plan_rows": [_plan_row(key, value) for key, value in record.plan.items()],
        "changes": changes(record.before, record.after, record.difference),
        "second_changes": changes(*second),
    }


def _plan_row(key: str, value: Any) -> tuple[str, str]:
    name, _, unit = key.rpartition("_")
    if unit == "seconds":
        return plain(name.replace("_", " ")), format_duration(value)
    if unit == "bytes":
        return plain(name.replace("_", " ")), f"{value / 1e9:.2f} GB"
    return plain(key.replace("_", " ")), number(value)


def _metadata(record: RunRecord) -> ModelCardData:
    """Build the card's front matter from what is known."""
    zero_shot = record.model_type in _ZERO_SHOT
    return ModelCardData(
        library_name="transformers" if zero_shot else "image-text-alignment",
        pipeline_tag="zero-shot-image-classification" if zero_shot else "feature-extraction",
        tags=["image-text-retrieval", "dual-encoder", "contrastive"],
        model_name=one_line(record.name),
        eval_results=_results(record),
        base_model=record.base_model_id and one_line(record.base_model_id),
        datasets=[one_line(record.dataset_id)] if record.dataset_id else None,
    )


def _results(record: RunRecord) -> list[EvalResult]:
    """List the metrics for the Hub's model index, in per cent."""
    data = one_line(record.dataset_id or record.data_name)
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=data,
            dataset_name=f"{data}, validation part",
            metric_type=change.metric.split("_to_text_")[-1].split("_to_image_")[-1].split("@")[0],
            metric_name=change.label,
            metric_value=round(record.after[change.metric]["value"] * (100 if "recall" in change.metric else 1), 2),
        )
        for change in changes(record.before, record.after, record.difference)
    ]
