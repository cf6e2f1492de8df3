"""Curves of a run as PNG files: loss, validation recall, learned scale, interpolated weights.

Place in the flow: `record -> plots (here) -> report`. Drawn without pyplot, so no global state is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from alignment.train.record import RunRecord

DIRECTIONS = {"image_to_text": "picture to captions", "text_to_image": "caption to pictures"}
KS = (1, 5, 10)

# The palette of Okabe and Ito, distinct in all types of colour vision; markers and labels repeat the distinction.
BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8A8A"
_WINDOW = 20  # steps of the running mean, at least a tenth of what was logged


def write_plots(record: RunRecord, folder: Path) -> list[str]:
    """Draw the curves that were logged.

    Args:
        record: the run.
        folder: created if needed; plots of an earlier run in it are replaced or deleted.

    Returns:
        The names of the files, among loss.png, recall.png, scale.png and interpolation.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for draw in (_loss, _recall, _scale, _interpolation):
        path = folder / f"{draw.__name__.removeprefix('_')}.png"
        figure = draw(record)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        FigureCanvasAgg(figure).print_png(path)
        written.append(path.name)
    return written


def _series(record: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values logged under a name; of a step logged twice (around a resume) the last."""
    logged = {entry["step"]: entry[key] for entry in record.history if entry.get(key) is not None and "step" in entry}
    steps = sorted(logged)
    return np.array(steps, dtype=float), np.array([logged[step] for step in steps], dtype=float)


def _loss(record: RunRecord) -> Figure | None:
    steps, losses = _series(record, "loss")
    if not len(steps):
        return None
    figure, (axes,) = _panels(1)
    window = min(len(losses), max(_WINDOW, len(losses) // 10))
    if len(losses) >= 2 * _WINDOW:
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = (window - 1) // 2
        axes.plot(steps[middle : middle + len(mean)], mean, color=BLUE, linewidth=2)
        title = f"Training loss, and its mean over {window} values"
    else:
        axes.plot(steps, losses, color=BLUE, marker="o", markersize=4, linewidth=1.5)
        title = "Training loss"
    axes.set_title(title, loc="left")
    axes.set_ylabel("loss (nats)")
    _finish_steps(axes, record.best_step)
    return figure


def _recall(record: RunRecord) -> Figure | None:
    curves = {(side, k): _series(record, f"eval_{side}_recall@{k}") for side in DIRECTIONS for k in KS}
    if not any(len(steps) for steps, _ in curves.values()):
        return None
    figure, panels = _panels(2, share_y=True)
    for axes, (side, title) in zip(panels, DIRECTIONS.items(), strict=True):
        for k, color, marker in zip(KS, (BLUE, ORANGE, GREEN), "os^", strict=True):
            steps, values = curves[side, k]
            if len(steps):
                axes.plot(steps, 100 * values, color=color, marker=marker, markersize=5, linewidth=1.6)
                end, offset = (steps[-1], 100 * values[-1]), {"xytext": (7, 0), "textcoords": "offset points"}
                axes.annotate(f"R@{k}", end, **offset, color=color, va="center", fontsize=10)  # type: ignore[arg-type]
        axes.margins(x=0.1)  # room for the labels
        axes.set_title(f"Validation: {title}", loc="left")
        _finish_steps(axes, record.best_step)
    panels[0].set_ylabel("recall (%)")
    return figure


def _scale(record: RunRecord) -> Figure | None:
    named = {"logit_scale": "learned scale (multiplies the cosine)", "logit_bias": "learned bias (added)"}
    curves = {label: curve for key, label in named.items() if len((curve := _series(record, key))[0])}
    if not curves:
        return None
    figure, panels = _panels(len(curves))
    for axes, (label, (steps, values)) in zip(panels, curves.items(), strict=True):
        axes.plot(steps, values, color=BLUE, marker="o" if len(steps) < 2 * _WINDOW else "", markersize=4)
        axes.set_title(label[0].upper() + label[1:], loc="left")
        axes.set_ylabel(f"{label.split(' (')[0]} (no unit)")
        if "scale" in label and values.max() > 80:
            axes.axhline(100, color=GREY, linestyle="--", linewidth=1)
            axes.annotate("held below 100", (steps[0], 100), (0, 3), textcoords="offset points", color=GREY, fontsize=9)
        _finish_steps(axes, record.best_step)
    return figure


def _interpolation(record: RunRecord) -> Figure | None:
    points = sorted(record.interpolation, key=lambda point: point["alpha"] or 0.0)
    named = {"recall_sum": "Validation data", "second_recall_sum": "Second data set"}
    named = {key: title for key, title in named.items() if any(point.get(key) is not None for point in points)}
    if not named:
        return None
    figure, panels = _panels(len(named))
    for axes, (key, title), color in zip(panels, named.items(), (BLUE, ORANGE), strict=False):
        known = {point["alpha"] or 0.0: 100 * value for point in points if (value := point.get(key)) is not None}
        axes.plot(list(known), list(known.values()), color=color, marker="o", linewidth=1.6)
        if record.alpha in known:
            axes.plot(record.alpha, known[record.alpha], marker="*", markersize=15, color=color, mec=INK, zorder=4)
            _mark(axes, record.alpha, f"chosen: {record.alpha:g}", right=record.alpha < 0.5)
        axes.set_title(title, loc="left")
        axes.set_xlabel("alpha (0: start weights, 1: tuned weights)")
        axes.set_ylabel("recall sum (%, of 600)")
    return figure


def _panels(count: int, *, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """Create one or two panels side by side."""
    figure = Figure(figsize=(6.4 if count == 1 else 10.4, 3.8), dpi=144, layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = figure.subplots(1, count, squeeze=False, sharey=share_y)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelleft=True)
        axes.margins(y=0.12)
    return figure, list(panels)


def _finish_steps(axes: Axes, best_step: int) -> None:
    """Label the axis of steps, and mark the best step on it and on the last curve of each colour."""
    curves = {str(line.get_color()): line for line in axes.get_lines() if line.get_color() != GREY}
    for color, line in curves.items():
        steps, values = (np.asarray(data, dtype=float) for data in (line.get_xdata(), line.get_ydata()))
        if steps[0] <= best_step <= steps[-1]:
            y = float(np.interp(best_step, steps, values))
            axes.plot(best_step, y, marker="*", markersize=14, color=color, mec=INK, mew=0.7, zorder=4)
    left, right = axes.get_xlim()
    _mark(axes, best_step, f"best step: {best_step}", right=best_step < (left + right) / 2)
    axes.set_xlabel("training step (updates of the weights)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _mark(axes: Axes, x: float, text: str, *, right: bool) -> None:
    """Draw a dotted vertical line, with a text at the top of the panel to one side of it."""
    axes.axvline(x, color=INK, linestyle=":", linewidth=1.2, zorder=1)
    axes.annotate(
        text,
        (x, 1),
        (5 if right else -5, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        fontsize=9,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
