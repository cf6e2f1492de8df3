"""Curves of a run as PNG files, drawn without pyplot and its global state: `record -> plots (here) -> report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from alignment.train.record import RunRecord

DIRECTIONS = {"image_to_text": "picture to captions", "text_to_image": "caption to pictures"}

# The palette of Okabe and Ito, distinct in all types of colour vision; markers and labels repeat the distinction.
BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8A8A"
_RECALLS = ((1, BLUE, "o"), (5, ORANGE, "s"), (10, GREEN, "^"))
_WINDOW = 20  # steps of the running mean, at least a tenth of what was logged
_NOTE: dict[str, Any] = {
    "xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 9, "color": INK,
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
}  # fmt: skip


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
    figure = Figure(figsize=(6.4 if count == 1 else 10.4, 3.8), dpi=144, layout=ConstrainedLayoutEngine(wspace=0.06))
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
