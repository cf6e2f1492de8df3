"""Curves of a fine-tuning as PNG files: loss, validation recall, learned scale, interpolated weights.

Place in the flow: `record -> plots (here) -> report`. Drawn without pyplot, so nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

# Okabe and Ito's colours, told apart by every kind of colour vision; markers and labels say the same again.
BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8A8A8A"
_WINDOW = 20  # steps of the running mean, at least a tenth of what was logged


def write_plots(record: RunRecord, folder: Path) -> list[str]:
    """Draw what the record holds.

    Args:
        record: the run; a curve that was not logged gives no plot.
        folder: created if need be.

    Returns:
        The names of the files, among loss.png, recall.png, scale.png and interpolation.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss": _loss, "recall": _recall, "scale": _scale, "interpolation": _interpolation}
    written = []
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        figure = draw(record)
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier run in this folder
            continue
        FigureCanvasAgg(figure).print_png(path)
        written.append(path.name)
    return written


def _series(record: RunRecord, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Find the steps and values logged under a name; of a step logged twice (before and after a resume) the last."""
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
    _best_step(axes, record.best_step)
    _step_axis(axes)
    return figure


def _recall(record: RunRecord) -> Figure | None:
    curves = {(side, k): _series(record, f"eval_{side}_recall@{k}") for side in DIRECTIONS for k in KS}
    if not any(len(steps) for steps, _ in curves.values()):
        return None
    figure, panels = _panels(2, share="y")
    for axes, (side, title) in zip(panels, DIRECTIONS.items(), strict=True):
        for k, color, marker in zip(KS, (BLUE, ORANGE, GREEN), "os^", strict=True):
            steps, values = curves[side, k]
            if len(steps):
                axes.plot(steps, 100 * values, color=color, marker=marker, markersize=5, linewidth=1.6)
                _label_end(axes, steps[-1], 100 * values[-1], f"R@{k}", color)
        axes.margins(x=0.1)  # room for the labels
        axes.set_title(f"Validation: {title}", loc="left")
        _best_step(axes, record.best_step)
        _step_axis(axes)
    panels[0].set_ylabel("recall (%)")
    return figure


def _scale(record: RunRecord) -> Figure | None:
    named = {"logit_scale": "learned scale (multiplies the cosine)", "logit_bias": "learned bias (added)"}
    curves = {label: _series(record, key) for key, label in named.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
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
        _best_step(axes, record.best_step)
        _step_axis(axes)
    return figure


def _interpolation(record: RunRecord) -> Figure | None:
    points = sorted(record.interpolation, key=lambda point: point["alpha"] or 0.0)
    named = {"recall_sum": "Validation data", "second_recall_sum": "Second data set"}
    named = {key: title for key, title in named.items() if any(point.get(key) is not None for point in points)}
    if not named:
        return None
    figure, panels = _panels(len(named))
    for axes, (key, title), color in zip(panels, named.items(), (BLUE, ORANGE), strict=False):
        known = [(point["alpha"] or 0.0, 100 * value) for point in points if (value := point.get(key)) is not None]
        axes.plot(*zip(*known, strict=True), color=color, marker="o", linewidth=1.6)
        chosen = [(alpha, value) for alpha, value in known if alpha == record.alpha]
        for alpha, value in chosen:
            axes.plot(alpha, value, marker="*", markersize=15, color=color, markeredgecolor=INK, zorder=4)
            _dotted(axes, alpha)
            _note(axes, alpha, f"chosen: {alpha:g}", right=alpha < 0.5)
        axes.set_title(title, loc="left")
        axes.set_xlabel("alpha (0: start weights, 1: tuned weights)")
        axes.set_ylabel("recall sum (%, of 600)")
    return figure


# ---------------------------------------------------------------- style


def _panels(count: int, share: str = "") -> tuple[Figure, Sequence[Axes]]:
    """Lay out one or two panels side by side in one style."""
    figure = Figure(figsize=(6.4 if count == 1 else 10.4, 3.8), dpi=144, layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = figure.subplots(1, count, squeeze=False, sharey=share == "y")[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelleft=True)
        axes.margins(y=0.12)
    return figure, list(panels)


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("training step (updates of the weights)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _best_step(axes: Axes, step: int) -> None:
    """Mark the step whose weights were kept, on its curves and on the axis."""
    for x, y, color in _points_at(axes, step):
        axes.plot(x, y, marker="*", markersize=14, color=color, markeredgecolor=INK, markeredgewidth=0.7, zorder=4)
    _dotted(axes, step)
    left, right = axes.get_xlim()
    _note(axes, step, f"best step: {step}", right=step < (left + right) / 2)


def _dotted(axes: Axes, x: float) -> None:
    axes.axvline(x, color=INK, linestyle=":", linewidth=1.2, zorder=1)


def _points_at(axes: Axes, step: int) -> Iterator[tuple[float, float, str]]:
    """Where the curves (the last one drawn in each colour) stand at a step."""
    curves = {str(line.get_color()): line for line in axes.get_lines() if line.get_color() != GREY}
    for color, line in curves.items():
        steps = np.asarray(line.get_xdata(), dtype=float)
        if steps[0] <= step <= steps[-1]:
            yield step, float(np.interp(step, steps, np.asarray(line.get_ydata(), dtype=float))), color


def _note(axes: Axes, x: float, text: str, *, right: bool) -> None:
    """Write beside a vertical place, at the top of the panel and inside it."""
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


def _label_end(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), (7, 0), textcoords="offset points", color=color, va="center", fontsize=10)
