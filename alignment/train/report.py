"""The documents of a finished run: `report.md` with plots (drawn without pyplot's global state), and the model card.

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

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.train.record import REPOSITORY, Interval, RunRecord
from alignment.train.settings import format_duration

DIRECTIONS = {"image_to_text": "picture to captions", "text_to_image": "caption to pictures"}
_METRICS = {**{f"recall@{k}": f"R@{k}" for k in (1, 5, 10)}, "median_rank": "median rank"}
LABELS = {f"{side}_{key}": f"{words} {name}" for side, words in DIRECTIONS.items() for key, name in _METRICS.items()}
LABELS |= {"recall_sum": "recall sum (of 600)"}
# The model types of transformers' zero-shot image classification; the others need this package.
_ZERO_SHOT = {"clip", "siglip", "siglip2", "chinese_clip"}

# The palette of Okabe and Ito, distinct in all types of colour vision; markers and labels repeat the distinction.
BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8A8A"
_RECALLS = ((1, BLUE, "o"), (5, ORANGE, "s"), (10, GREEN, "^"))
_WINDOW = 20  # steps of the running mean, at least a tenth of what was logged
_NOTE: dict[str, Any] = {
    "xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 9, "color": INK,
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
}  # fmt: skip


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
    units = {"seconds": format_duration, "bytes": lambda size: f"{size / 1e9:.2f} GB"}
    name, _, unit = key.rpartition("_")
    return plain((name if unit in units else key).replace("_", " ")), units.get(unit, number)(value)


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


def write_plots(record: RunRecord, folder: Path) -> list[str]:
    """Draw the curves that were logged, in place of an earlier run's; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss": _loss, "recall": _recall, "scale": _scale, "interpolation": _interpolation}
    written = []
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        if figure := draw(record):
            FigureCanvasAgg(figure).print_png(path)
            written.append(path.name)
        else:
            path.unlink(missing_ok=True)
    return written


def _series(record: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values logged under a name; of a step logged twice (around a resume) the last."""
    logged = {entry["step"]: entry[key] for entry in record.history if entry.get(key) is not None}
    steps = sorted(logged)
    return np.array(steps, dtype=float), np.array([logged[step] for step in steps], dtype=float)


def _loss(record: RunRecord) -> Figure | None:
    steps, losses = _series(record, "loss")
    if not len(steps):
        return None
    figure, (axes,) = _panels(1)
    if len(losses) >= 2 * _WINDOW:
        window = max(_WINDOW, len(losses) // 10)
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = (window - 1) // 2
        axes.plot(steps[middle : middle + len(mean)], mean, color=BLUE, linewidth=2)
        title = f"Training loss, and its mean over {window} values"
    else:
        axes.plot(steps, losses, color=BLUE, marker="o", markersize=4, linewidth=1.5)
        title = "Training loss"
    _finish_steps(axes, record.best_step, title, "loss (nats)")
    return figure


def _recall(record: RunRecord) -> Figure | None:
    figure, panels = _panels(2, share_y=True)
    for axes, (side, title) in zip(panels, DIRECTIONS.items(), strict=True):
        for k, color, marker in _RECALLS:
            steps, values = _series(record, f"eval_{side}_recall@{k}")
            if not len(steps):
                return None
            axes.plot(steps, 100 * values, color=color, marker=marker, markersize=5, linewidth=1.6)
            end = (steps[-1], 100 * values[-1])
            axes.annotate(f"R@{k}", end, (7, 0), textcoords="offset points", color=color, va="center", fontsize=10)
        axes.margins(x=0.1)  # room for the labels
        _finish_steps(axes, record.best_step, f"Validation: {title}")
    panels[0].set_ylabel("recall (%)")
    return figure


def _scale(record: RunRecord) -> Figure | None:
    steps, values = _series(record, "logit_scale")
    if not len(steps):
        return None
    figure, (axes,) = _panels(1)
    axes.plot(steps, values, color=BLUE, marker="o" if len(steps) < 2 * _WINDOW else "", markersize=4)
    if values.max() > 80:
        axes.axhline(100, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("held below 100", (steps[0], 100), (0, 3), textcoords="offset points", color=GREY, fontsize=9)
    _finish_steps(axes, record.best_step, "Learned scale (multiplies the cosine)", "learned scale (no unit)")
    return figure


def _interpolation(record: RunRecord) -> Figure | None:
    points = record.interpolation
    curves = [("recall_sum", "Validation data", BLUE), ("second_recall_sum", "Second data set", ORANGE)]
    curves = [curve for curve in curves if any(point[curve[0]] is not None for point in points)]
    if not curves:
        return None
    figure, panels = _panels(len(curves))
    for axes, (key, title, color) in zip(panels, curves, strict=True):
        known = {point["alpha"]: 100 * value for point in points if (value := point[key]) is not None}
        axes.plot(list(known), list(known.values()), color=color, marker="o", linewidth=1.6)
        if record.alpha is not None:
            axes.plot(record.alpha, known[record.alpha], marker="*", markersize=15, color=color, mec=INK, zorder=4)
            _mark(axes, record.alpha, f"chosen: {record.alpha:g}", right=record.alpha < 0.5)
        axes.set_title(title, loc="left")
        axes.set_xlabel("alpha (0: start weights, 1: tuned weights)")
        axes.set_ylabel("recall sum (%, of 600)")
    return figure


def _panels(count: int, *, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    width, height = 6.4 if count == 1 else 10.4, 3.8
    figure = Figure(figsize=(width, height), dpi=144)
    # In inches: room for the titles and labels, which a layout engine would measure in more time than drawing takes.
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.25 / width, bottom=0.6 / height, top=1 - 0.4 / height, wspace=0.2
    )
    panels = list(figure.subplots(1, count, squeeze=False, sharey=share_y)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelleft=True)
        axes.margins(y=0.12)
    return figure, panels


def _finish_steps(axes: Axes, best_step: int, title: str, y_label: str = "") -> None:
    """Label the axes, and mark the best step on the axis of steps and on the last curve of each colour."""
    curves = {str(line.get_color()): line for line in axes.get_lines() if line.get_color() != GREY}
    for color, line in curves.items():
        steps, values = (np.asarray(data, dtype=float) for data in (line.get_xdata(), line.get_ydata()))
        if steps[0] <= best_step <= steps[-1]:
            y = float(np.interp(best_step, steps, values))
            axes.plot(best_step, y, marker="*", markersize=14, color=color, mec=INK, mew=0.7, zorder=4)
    left, right = axes.get_xlim()
    _mark(axes, best_step, f"best step: {best_step}", right=best_step < (left + right) / 2)
    axes.set_title(title, loc="left")
    axes.set_xlabel("training step (updates of the weights)")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _mark(axes: Axes, x: float, text: str, *, right: bool) -> None:
    """Draw a dotted vertical line, with a text at the top of the panel to one side of it."""
    axes.axvline(x, color=INK, linestyle=":", linewidth=1.2, zorder=1)
    place, side = ((5, -2), "left") if right else ((-5, -2), "right")
    axes.annotate(text, (x, 1), place, ha=side, **_NOTE)
