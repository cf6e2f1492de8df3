"""The evaluation report as one HTML file without scripts, pictures included.

Place in the flow: `retrieval, zero_shot, error_analysis -> html_report (here) -> file`. `templates/` holds the markup;
jinja2 escapes all text of the data set, and a content security policy forbids the page to load anything.
"""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.evaluate.error_analysis import Example, FalseNegative
from alignment.evaluate.retrieval import (
    LOWER_IS_BETTER,
    Difference,
    Estimate,
    difference_cells,
    estimate_cells,
    metric_title,
)
from alignment.preprocess import InputError, open_image

THUMBNAIL = 160  # pixels of the longer side

_HEADLINES = ("recall_sum", "image_to_text_recall@1", "text_to_image_recall@1", "zero_shot_top1")
_GROUPS = {"image_to_text_": "Image to text", "text_to_image_": "Text to image", "": "Overall"}
_CHANGED, _BOTH_RANKS = ("Got better", "Got worse"), "Rank of the right answer, under A and under B."


def html_page(
    models: Sequence[str], facts: Mapping[str, str], metrics: Mapping[str, Estimate] | Mapping[str, Difference],
    examples: Sequence[Sequence[Example]] = (), negatives: Sequence[FalseNegative] = (),
) -> str:  # fmt: skip
    """Render the report of one model, or the comparison of two; `facts` are data set, sizes and settings by title.

    `examples` are [`worst_queries`] of one model or `changed_queries` of two, `negatives` `suspected_false_negatives`.
    """
    one = len(models) == 1
    titles = {"Worst queries": "Rank of the right answer."} if one else dict.fromkeys(_CHANGED, _BOTH_RANKS)
    names = ("Model",) if one else ("Model A", "Model B")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    rows = {name: {"title": metric_title(name), **_cells(name, found)} for name, found in metrics.items()}
    return environment.get_template("report.html.j2" if one else "comparison.html.j2").render(
        facts={**dict(zip(names, models, strict=True)), **facts},
        tiles=[rows[name] for name in _HEADLINES if name in rows],
        groups=_grouped(rows),
        sections=[(*title, shown) for title, shown in zip(titles.items(), examples, strict=False)],
        negatives=negatives,
        titled_answers=lambda example: _titled_answers(example, [name.removeprefix("Model ") for name in names]),
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
    groups: dict[str, list[dict[str, str]]] = {title: [] for title in _GROUPS.values()}
    for name, row in rows.items():
        prefix = next(prefix for prefix in _GROUPS if name.startswith(prefix))
        groups[_GROUPS[prefix]].append(row | {"title": metric_title(name.removeprefix(prefix))})
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
