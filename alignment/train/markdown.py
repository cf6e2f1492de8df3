"""Markdown with untrusted text, and the comparison of metrics before and after.

Place in the flow: `record -> markdown (here) -> report, model card`. Names, captions and paths are untrusted: they are
shown as code or escaped, never as markup. `templates/` holds the documents.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.train.plan import format_duration
from alignment.train.record import Interval

Verdict = Literal["better", "worse", "within the interval", "the same"]

LABELS = {
    **{f"image_to_text_recall@{k}": f"picture to captions R@{k}" for k in (1, 5, 10)},
    "image_to_text_median_rank": "picture to captions median rank",
    **{f"text_to_image_recall@{k}": f"caption to pictures R@{k}" for k in (1, 5, 10)},
    "text_to_image_median_rank": "caption to pictures median rank",
    "recall_sum": "recall sum (of 600)",
}


def render(template: str, **values: Any) -> str:
    """Render a file of `templates/`; nothing is escaped but by the filters `code`, `plain`, `block` and `number`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    filters = {"code": code, "plain": plain, "block": block, "number": number, "duration": format_duration}
    environment.filters |= filters
    return environment.get_template(template).render(reading=reading, **values)


# ---------------------------------------------------------------- untrusted text


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
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def number(value: Any) -> str:
    """Format a number with thousands separators; other values as code."""
    if value is None:
        return "an unknown number of"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True)
class Change:
    """A metric before and after, for people to read: in per cent (a median rank as it is) with the 95 % interval.

    `gained` is whether it is better than before; `verdict` is better or worse only where the interval excludes chance.
    """

    metric: str
    label: str
    before: str
    after: str
    difference: str
    gained: bool
    verdict: Verdict


def changes(
    before: Mapping[str, Interval], after: Mapping[str, Interval], difference: Mapping[str, Interval] | None = None
) -> list[Change]:
    """Compare the metrics that both sides have, in the order of `LABELS`.

    With a paired difference, a metric is better or worse when the interval of the difference excludes zero. Without
    one, it is when the interval after excludes the value before, a rougher test.
    """
    return [
        _change(metric, before[metric], after[metric], (difference or {}).get(metric))
        for metric in LABELS
        if metric in before and metric in after
    ]


def _change(metric: str, before: Interval, after: Interval, difference: Interval | None) -> Change:
    gap = difference or {"value": after["value"] - before["value"]}
    gained = (gap["value"] < 0) == metric.endswith("median_rank")
    if difference is not None:
        is_clear = difference["low"] > 0 or difference["high"] < 0
    else:
        is_clear = not after["low"] <= before["value"] <= after["high"]
    verdict: Verdict = "within the interval" if gap["value"] else "the same"
    if is_clear:
        verdict = "better" if gained else "worse"
    cells = (_interval(metric, before), _interval(metric, after), _interval(metric, gap, sign="+"))
    return Change(metric, LABELS[metric], *cells, gained, verdict)


def _interval(metric: str, found: Interval, *, sign: str = "") -> str:
    """Format `38.8 [35.9, 41.7]` in per cent, a median rank as it is."""
    values = [found[name] for name in ("value", "low", "high") if found.get(name) is not None]
    if metric.endswith("median_rank"):
        cells = [f"{value:{sign}g}" for value in values]
    else:
        cells = [f"{100 * value + 0.0:{sign}.1f}" for value in values]
    return f"{cells[0]} [{cells[1]}, {cells[2]}]" if len(cells) == 3 else "".join(cells[:1]) or "–"


def reading(found: Sequence[Change]) -> str:
    """List in words which metrics got better and which got worse."""
    chance = "but the difference is within the interval and may be chance:"
    groups: dict[str, tuple[Verdict, bool | None]] = {
        "**Better:**": ("better", None),
        "**Worse:**": ("worse", None),
        f"A little better, {chance}": ("within the interval", True),
        f"A little worse, {chance}": ("within the interval", False),
        "The same:": ("the same", None),
    }
    lines = []
    for words, (verdict, gained) in groups.items():
        group = [change for change in found if change.verdict == verdict and gained in (None, change.gained)]
        if group:
            lines.append(f"- {words} {', '.join(f'{change.label} ({change.difference})' for change in group)}.")
    if found and not any(change.verdict == "worse" for change in found):
        lines.append("- No figure got clearly worse.")
    return "\n".join(lines)
