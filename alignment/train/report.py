"""The documents of a finished run: `report.md` with plots, and the model card.

Place in the flow: `run -> record -> report (here) -> publish`. Both are rendered from the `RunRecord` alone, so they
can be made again from `run.json`: `write_report(RunRecord.from_json(folder / "run.json"), folder)`. Names, captions and
paths are untrusted: they are shown as code or escaped, never as markup. `templates/` holds the documents.
"""

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.train.plots import write_plots
from alignment.train.record import REPOSITORY, Interval, RunRecord
from alignment.train.settings import format_duration

LABELS = {
    **{f"image_to_text_recall@{k}": f"picture to captions R@{k}" for k in (1, 5, 10)},
    "image_to_text_median_rank": "picture to captions median rank",
    **{f"text_to_image_recall@{k}": f"caption to pictures R@{k}" for k in (1, 5, 10)},
    "text_to_image_median_rank": "caption to pictures median rank",
    "recall_sum": "recall sum (of 600)",
}
# The model types of transformers' zero-shot image classification; the others need this package.
_ZERO_SHOT = {"clip", "siglip", "siglip2", "chinese_clip"}


def write_report(record: RunRecord, folder: str | os.PathLike[str]) -> Path:
    """Write `report.md` and its `plots/` into the result folder, in place of earlier ones; returns its path."""
    path = Path(folder, "report.md")
    values = _values(record) | {"plots": write_plots(record, path.with_name("plots"))}
    settings = json.dumps(record.settings, indent=1, ensure_ascii=False)
    path.write_text(_render("report.md.j2", **values, settings=settings), encoding="utf-8")
    return path


def model_card(record: RunRecord) -> str:
    """Render the README.md of the result folder: the Hub's metadata and the text of the card."""
    front = _metadata(record).to_yaml(line_break="\n").strip()
    return _render("model_card.md.j2", **_values(record), front=front, repository=REPOSITORY)


def _values(record: RunRecord) -> dict[str, Any]:
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


def _render(template: str, **values: Any) -> str:
    """Render a file of `templates/`; nothing is escaped but by the filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"code": code, "plain": plain, "block": block, "number": number, "duration": format_duration}
    return environment.get_template(template).render(reading=reading, **values)


def one_line(text: object) -> str:
    """Put a text on one line, without control and direction characters."""
    kept = (" " if unicodedata.category(mark)[0] in "CZ" else mark for mark in str(text))
    return " ".join("".join(kept).split())


def code(text: object) -> str:
    """Format a name or a path as a code span that is also safe in a table."""
    line = one_line(text) or "–"
    fence = _fence(line, 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def plain(text: object) -> str:
    """Escape a sentence so that nothing in it is markup, a link or an address."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~$&!@:])", r"\\\1", one_line(text)).replace("www.", r"www\.")


def block(text: str, language: str = "") -> str:
    """Format several lines as a code block."""
    lines = ("".join(mark for mark in line if unicodedata.category(mark)[0] != "C") for line in text.splitlines())
    inner = "\n".join(lines)
    fence = _fence(inner, 3)
    return f"{fence}{language}\n{inner}\n{fence}"


def _fence(text: str, least: int) -> str:
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def number(value: Any) -> str:
    """Format a number with thousands separators; other values as code."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else code(value)


@dataclass(frozen=True)
class Change:
    """A metric before and after, for people to read, with a key of `_VERDICTS`."""

    metric: str
    label: str
    before: str
    after: str
    difference: str
    verdict: str


# Better or worse only where the interval of the difference excludes zero; the words are those of `reading`.
_VERDICTS = {
    "better": "**Better:**",
    "worse": "**Worse:**",
    "a little better": "A little better, but the difference is within the interval and may be chance:",
    "a little worse": "A little worse, but the difference is within the interval and may be chance:",
    "the same": "The same:",
}


def changes(
    before: Mapping[str, Interval], after: Mapping[str, Interval], difference: Mapping[str, Interval]
) -> list[Change]:
    """Compare the metrics of `difference`, in the order of `LABELS`."""
    found = []
    for metric, label in LABELS.items():
        if gap := difference.get(metric):
            cells = (_interval(metric, before[metric]), _interval(metric, after[metric]), _interval(metric, gap, "+"))
            found.append(Change(metric, label, *cells, _verdict(metric, gap)))
    return found


def _verdict(metric: str, gap: Interval) -> str:
    direction = "better" if (gap["value"] < 0) == metric.endswith("median_rank") else "worse"
    if gap["low"] > 0 or gap["high"] < 0:
        return direction
    return f"a little {direction}" if gap["value"] else "the same"


def _interval(metric: str, found: Interval, sign: str = "") -> str:
    """Format a value and its 95 % interval, `38.8 [35.9, 41.7]` in per cent, a median rank as it is."""
    factor, form = (1, "g") if metric.endswith("median_rank") else (100, ".1f")
    value, low, high = (f"{factor * found[name] + 0.0:{sign}{form}}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def reading(found: Sequence[Change]) -> str:
    """List in words which metrics got better and which got worse."""
    lines = []
    for verdict, words in _VERDICTS.items():
        if group := [f"{change.label} ({change.difference})" for change in found if change.verdict == verdict]:
            lines.append(f"- {words} {', '.join(group)}.")
    if found and not any(change.verdict == "worse" for change in found):
        lines.append("- No figure got clearly worse.")
    return "\n".join(lines)
