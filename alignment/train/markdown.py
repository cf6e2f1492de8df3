"""Markdown that nobody else's name can break, and the table of before and after with its plain reading.

Place in the flow: `record -> markdown (here) -> report, model card`. Names, captions and paths are other people's text:
they are shown as code or escaped, never as markup.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.train.record import Interval

Verdict = Literal["better", "worse", "within the interval", "the same"]

LABELS = {
    **{f"image_to_text_recall@{k}": f"picture to captions R@{k}" for k in (1, 5, 10)},
    "image_to_text_median_rank": "picture to captions median rank",
    **{f"text_to_image_recall@{k}": f"caption to pictures R@{k}" for k in (1, 5, 10)},
    "text_to_image_median_rank": "caption to pictures median rank",
    "recall_sum": "recall sum (of 600)",
}


# ---------------------------------------------------------------- other people's text


def one_line(text: object) -> str:
    """Put a text on one line, without control and direction marks."""
    kept = (" " if unicodedata.category(mark)[0] in "CZ" else mark for mark in str(text))
    return " ".join("".join(kept).split())


def code(text: object) -> str:
    """Show a name or a path as code; also safe in a table."""
    line = one_line(text) or "–"
    fence = _fence(line, 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def plain(text: object) -> str:
    """Show a sentence with nothing in it read as markup, a link or an address."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~$&!@:])", r"\\\1", one_line(text)).replace("www.", r"www\.")


def block(text: str, language: str = "") -> str:
    """Show several lines as they are."""
    lines = ("".join(mark for mark in line if unicodedata.category(mark)[0] != "C") for line in text.splitlines())
    inner = "\n".join(lines)
    fence = _fence(inner, 3)
    return f"{fence}{language}\n{inner}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay cells out, which are markdown already, as a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True)
class Change:
    """A figure before and after, what lies between, and how to read it.

    Attributes:
        metric: its name in `RetrievalReport.metrics`.
        label: its name for people.
        before: in per cent (a median rank as it is) with the 95 % interval.
        after: the same.
        difference: after minus before, with its interval where the two were measured as pairs.
        gained: whether the figure is better than before, be it by chance.
        verdict: better or worse only where the interval leaves no doubt.
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
    """Set before and after side by side, in the order of the table.

    With a paired difference, a figure is better or worse when the difference's interval leaves zero out. Without one,
    it is when the interval after leaves the value before out, a rougher reading.

    Args:
        before: metric -> value, low, high.
        after: the same; what only one of them has is left out.
        difference: after minus before, metric -> value, low, high.
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
        clear = difference["low"] > 0 or difference["high"] < 0
    else:
        clear = not after["low"] <= before["value"] <= after["high"]
    verdict: Verdict = "better" if gained else "worse"
    if not clear:
        verdict = "within the interval" if gap["value"] else "the same"
    cells = (interval(metric, before), interval(metric, after), interval(metric, gap, sign="+"))
    return Change(metric, LABELS[metric], *cells, gained, verdict)


def interval(metric: str, figure: Interval, *, sign: str = "") -> str:
    """Print a figure as papers do: `38.8 [35.9, 41.7]` in per cent, a median rank as it is."""
    numbers = [_number(metric, figure[name], sign) for name in ("value", "low", "high") if figure.get(name) is not None]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else "".join(numbers[:1]) or "–"


def changes_table(found: Iterable[Change]) -> str:
    """Lay before and after out as a table, the reading beside."""
    rows = ([change.label, change.before, change.after, change.difference, change.verdict] for change in found)
    return table(["", "before", "after", "difference", "reading"], rows)


def reading(found: Sequence[Change]) -> str:
    """Say in sentences what got better and what got worse, one after the other."""
    lines = list(_sentences(found))
    if found and not any(change.verdict == "worse" for change in found):
        lines.append("- No figure got clearly worse.")
    return "\n".join(lines)


def _sentences(found: Sequence[Change]) -> Iterator[str]:
    chance = "but the difference is within the interval and may be chance:"
    groups = {
        "**Better:**": [change for change in found if change.verdict == "better"],
        "**Worse:**": [change for change in found if change.verdict == "worse"],
        f"A little better, {chance}": [c for c in found if c.verdict == "within the interval" and c.gained],
        f"A little worse, {chance}": [c for c in found if c.verdict == "within the interval" and not c.gained],
        "The same:": [change for change in found if change.verdict == "the same"],
    }
    for words, group in groups.items():
        if group:
            yield f"- {words} {', '.join(f'{change.label} ({change.difference})' for change in group)}."


def _number(metric: str, value: float, sign: str = "") -> str:
    if metric.endswith("median_rank"):
        return f"{value:{sign}g}"
    return f"{100 * value + 0.0:{sign}.1f}"
