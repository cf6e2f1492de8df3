"""The evaluation report as one HTML file without scripts, pictures included.

Place in the flow: `compare, retrieval, error_analysis -> html_report (here) -> file`. `templates/` holds the markup;
jinja2 escapes all text of the data set, and a content security policy forbids the page to load anything.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.evaluate.bootstrap import LOWER_IS_BETTER, Difference, Estimate
from alignment.evaluate.error_analysis import Example, FalseNegative
from alignment.evaluate.retrieval import difference_cells, estimate_cells, metric_title
from alignment.preprocess import InputError, open_image

THUMBNAIL = 160  # pixels of the longer side

_HEADLINES = ("recall_sum", "image_to_text_recall@1", "text_to_image_recall@1", "zero_shot_top1")
_GROUPS = {"image_to_text_": "Image to text", "text_to_image_": "Text to image", "": "Overall"}


def comparison_page(
    names: tuple[str, str],
    facts: Mapping[str, str],
    metrics: Mapping[str, Difference],
    changed: tuple[Sequence[Example], Sequence[Example]] = ((), ()),
    negatives: Sequence[FalseNegative] = (),
) -> str:
    """Render the comparison of models A and B, with `changed_queries` and `suspected_false_negatives`.

    `facts` are the data set, sizes and settings by title.
    """
    note = "Rank of the right answer, under A and under B."
    sections = zip(("Got better", "Got worse"), (note, note), changed, strict=True)
    facts = {"Model A": names[0], "Model B": names[1], **facts}
    return _render("comparison.html.j2", facts, metrics, sections, ("A", "B"), negatives)


def report_page(
    name: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Estimate],
    worst: Sequence[Example] = (),
    negatives: Sequence[FalseNegative] = (),
) -> str:
    """Render the report of one model; arguments as for `comparison_page`, `worst` from `worst_queries`."""
    sections = [("Worst queries", "Rank of the right answer.", worst)]
    return _render("report.html.j2", {"Model": name, **facts}, metrics, sections, ("Model",), negatives)


def _render(
    template: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Difference] | Mapping[str, Estimate],
    sections: Iterable[tuple[str, str, Sequence[Example]]],
    models: Sequence[str],
    negatives: Sequence[FalseNegative],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    rows = {name: {"title": metric_title(name), **_cells(name, found)} for name, found in metrics.items()}
    return environment.get_template(template).render(
        facts=facts,
        tiles=[rows[name] for name in _HEADLINES if name in rows],
        groups=_grouped(rows),
        sections=sections,
        negatives=negatives,
        titled_answers=lambda example: _titled_answers(example, models),
        thumbnail=_thumbnail,
        file_name=lambda path: Path(path).name,
    )


def _cells(name: str, found: Difference | Estimate) -> dict[str, str]:
    """Format a metric; `verdict` is better or worse where the interval of a difference leaves out zero."""
    if isinstance(found, Estimate):
        value, interval = estimate_cells(name, found)
        return {"value": value, "interval": interval, "verdict": ""}
    before, after, value, interval = difference_cells(name, found)
    sign = -1 if name.endswith(LOWER_IS_BETTER) else 1
    ends = (sign * found.low, sign * found.high)
    verdict = "better" if min(ends) > 0 else "worse" if max(ends) < 0 else ""
    cells = {"before": before, "after": after, "p_not_better": f"{found.p_not_better:.1%}"}
    return cells | {"value": value, "interval": interval, "verdict": verdict}


def _grouped(rows: Mapping[str, dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Sort the rows into one group per direction, and an overall group."""
    groups: dict[str, list[dict[str, str]]] = {title: [] for title in _GROUPS.values()}
    for name, row in rows.items():
        prefix, title = next(item for item in _GROUPS.items() if name.startswith(item[0]))
        groups[title].append(row | {"title": metric_title(name.removeprefix(prefix))})
    return {title: group for title, group in groups.items() if group}


def _titled_answers(example: Example, models: Sequence[str]) -> dict[str, str]:
    """Map each different answer to a title, as in "Right, B’s first" where model B finds it."""
    titles = {example.answer: ["Right"]}
    for model, rank, top in zip(models, example.ranks, example.tops, strict=True):
        first = f"{model}’s first{', right too' if rank == 1 and top != example.answer else ''}"
        titles.setdefault(top, []).append(first if len(models) > 1 else "Put first")
    return {answer: ", ".join(parts) for answer, parts in titles.items()}


def _thumbnail(path: str) -> dict[str, Any] | None:
    """Encode a small JPEG as a data URL; None for a picture that cannot be opened."""
    try:
        image = open_image(path)
    except InputError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"src": f"data:image/jpeg;base64,{data}", "width": image.width, "height": image.height}
