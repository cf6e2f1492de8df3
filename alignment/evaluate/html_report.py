"""The report as a page: one HTML file without scripts that needs nothing else, pictures included.

Place in the flow: `compare, retrieval, examples -> page (here) -> file`. What a data set says is escaped, and the page
forbids itself to load anything.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from alignment.evaluate.bootstrap import LOWER_IS_BETTER, Difference, Estimate
from alignment.evaluate.compare import difference_cells, metric_title
from alignment.evaluate.error_analysis import Example, FalseNegative
from alignment.preprocess import InputError, open_image

THUMBNAIL = 160  # pixels of the longer side

_HEADLINES = ("recall_sum", "image_to_text_recall@1", "text_to_image_recall@1", "zero_shot_top1")
_GROUPS = {"image_to_text_": "Image to text", "text_to_image_": "Text to image", "": "Overall"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def comparison_page(
    names: tuple[str, str],
    facts: Mapping[str, str],
    metrics: Mapping[str, Difference],
    changed: tuple[Sequence[Example], Sequence[Example]] = ((), ()),
    negatives: Sequence[FalseNegative] = (),
) -> str:
    """Write the comparison of two models.

    Args:
        names: what models A and B are called.
        facts: what was measured, on what and how, by title.
        metrics: the differences by name.
        changed: the queries that got better, and those that got worse.
        negatives: pairs whose label may be missing.
    """
    tiles = [_tile(name, *_gain(name, metrics[name])) for name in _HEADLINES if name in metrics]
    head = "<th scope=col>A<th scope=col>B<th scope=col>B − A<th scope=col>B not better"
    rows = {name: _difference_row(name, found) for name, found in metrics.items()}
    better, worse = changed
    return _page(
        "What the second model gains",
        {"Model A": names[0], "Model B": names[1], **facts},
        [
            _tiles(tiles),
            _table(head, rows),
            "<p class=note>Shares in percent, with the 95 % interval of the difference over resampled images, the same "
            "draws for both models. The last column is the share of draws in which B was no better.</p>",
            _examples("Got better", "Rank of the right answer, under A and under B.", better, ("A", "B")),
            _examples("Got worse", "Rank of the right answer, under A and under B.", worse, ("A", "B")),
            _negatives(negatives, "the model with the higher recall sum"),
        ],
    )


def report_page(
    name: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Estimate],
    worst: Sequence[Example] = (),
    negatives: Sequence[FalseNegative] = (),
) -> str:
    """Write the report of one model.

    Args:
        name: what the model is called.
        facts: what was measured, on what and how, by title.
        metrics: the figures by name.
        worst: the queries whose right answer ranks last.
        negatives: pairs whose label may be missing.
    """
    tiles = [_tile(title, *_figure(title, metrics[title])) for title in _HEADLINES if title in metrics]
    rows = {title: "".join(f"<td>{part}" for part in _figure(title, found)[:2]) for title, found in metrics.items()}
    return _page(
        "What the model finds",
        {"Model": name, **facts},
        [
            _tiles(tiles),
            _table("<th scope=col>Value<th scope=col>95 % interval", rows),
            "<p class=note>Shares in percent; the intervals are over resampled images.</p>",
            _examples("Worst queries", "Rank of the right answer.", worst, ("Model",)),
            _negatives(negatives, "the model"),
        ],
    )


# ---------------------------------------------------------------- figures


def _gain(name: str, found: Difference) -> tuple[str, str, str]:
    """Write a difference, its interval, and the class that colours it."""
    *_, value, low, high = difference_cells(name, found)
    sign = -1 if name.endswith(LOWER_IS_BETTER) else 1
    verdict = "up" if min(sign * found.low, sign * found.high) > 0 else ""
    verdict = "down" if max(sign * found.low, sign * found.high) < 0 else verdict
    return value, f"[{low}, {high}]", verdict


def _figure(name: str, found: Estimate) -> tuple[str, str, str]:
    """Write a figure and its interval; nothing colours it."""
    factor, places = (1, 0) if name.endswith(LOWER_IS_BETTER) else (100, 1)
    value, low, high = (f"{number * factor:.{places}f}" for number in (found.value, found.low, found.high))
    return value, f"[{low}, {high}]", ""


def _difference_row(name: str, found: Difference) -> str:
    before, after = difference_cells(name, found)[:2]
    value, interval, verdict = _gain(name, found)
    gain = f"<td class='{verdict}'><b>{value}</b> <small>{interval}</small>"
    return f"<td>{before}<td>{after}{gain}<td>{found.p_not_better:.1%}"


def _tile(name: str, value: str, interval: str, verdict: str) -> str:
    words = {"up": "better", "down": "worse"}.get(verdict, "")
    mark = f" <span class={verdict}>{words}</span>" if words else ""
    return f"<div><b>{value}</b>{mark}<br>{escape(metric_title(name))}<br><small>{interval}</small></div>"


def _tiles(tiles: Sequence[str]) -> str:
    return f"<section class=tiles>{''.join(tiles)}</section>"


def _table(head: str, rows: Mapping[str, str]) -> str:
    """Lay out the figures, one direction after the other."""
    body, left = [], dict(rows)
    for prefix, title in _GROUPS.items():
        group = {name: left.pop(name) for name in list(left) if name.startswith(prefix)}
        lines = [
            f"<tr><th scope=row>{escape(metric_title(name.removeprefix(prefix)))}{row}" for name, row in group.items()
        ]
        if lines:
            body.append(f"<tbody><tr class=group><th scope=rowgroup colspan=6>{title}{''.join(lines)}</tbody>")
    return f"<div class=scroll><table><thead><tr><th>{head}</thead>{''.join(body)}</table></div>"


# ---------------------------------------------------------------- examples


def _examples(title: str, note: str, examples: Sequence[Example], models: Sequence[str]) -> str:
    by_picture = [_card(example, models) for example in examples if example.direction == "image_to_text"]
    by_caption = [_card(example, models) for example in examples if example.direction == "text_to_image"]
    if not by_picture and not by_caption:
        return ""
    parts = [f"<h2>{title}</h2><p class=note>{note}</p>"]
    for asked, cards in (
        ("A picture asks for its captions", by_picture),
        ("A caption asks for its picture", by_caption),
    ):
        if cards:
            parts.append(f"<h3>{asked}</h3><div class=cards>{''.join(cards)}</div>")
    return f"<section>{''.join(parts)}</section>"


def _card(example: Example, models: Sequence[str]) -> str:
    """Show the query, the rank under each model, the right answer, and what each model put first."""
    rank = f"<p class=rank>rank {' → '.join(f'{rank:,}' for rank in example.ranks)}</p>"
    answers = _answers(example, models)
    if example.direction == "image_to_text":
        rows = "".join(f"<dt>{title}<dd dir=auto>{escape(text)}" for text, title in answers.items())
        return f"<article class=wide>{_picture(example.query)}<div>{rank}<dl>{rows}</dl></div></article>"
    query = f"<blockquote dir=auto>{escape(example.query)}</blockquote>"
    shown = "".join(
        f"<figure>{_picture(path)}<figcaption>{title}</figcaption></figure>" for path, title in answers.items()
    )
    return f"<article>{rank}{query}<div class=row>{shown}</div></article>"


def _answers(example: Example, models: Sequence[str]) -> dict[str, str]:
    """Title the answers, each shown once: "Right, B’s first" where model B finds it."""
    titles = {example.answer: ["Right"]}
    for model, rank, top in zip(models, example.ranks, example.tops, strict=True):
        found = f"{model}’s first{', right too' if rank == 1 and top != example.answer else ''}"
        titles.setdefault(top, []).append(found if len(models) > 1 else "Put first")
    return {answer: ", ".join(parts) for answer, parts in titles.items()}


def _negatives(negatives: Sequence[FalseNegative], judge: str) -> str:
    if not negatives:
        return ""
    cards = [
        f"<article class=wide>{_picture(found.image)}<div><p class=rank>margin {found.margin:.3f}</p><dl>"
        f"<dt>Its own caption<dd dir=auto>{escape(found.caption)}"
        f"<dt>Another picture’s caption<dd dir=auto>{escape(found.rival)}</dl></div></article>"
        for found in negatives
    ]
    note = (
        f"Pairs that the data set does not label, but that {judge} scores above the labelled ones of both their "
        "picture and their caption. Look at them: where the caption fits, the label is missing and the model was "
        "blamed for being right; elsewhere the model errs."
    )
    title = f"<h2>Suspected false negatives</h2><p class=note>{note}</p>"
    return f"<section>{title}<div class=cards>{''.join(cards)}</div></section>"


def _picture(path: str) -> str:
    """Put a small JPEG into the page."""
    name = escape(Path(path).name, quote=True)
    try:
        image = open_image(path)
    except InputError:
        return f"<p class=missing>{name}</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" width={image.width} height={image.height} alt="{name}">'


# ---------------------------------------------------------------- page


def _page(title: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    rows = "".join(f"<dt>{escape(name)}<dd>{escape(value)}" for name, value in facts.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1><dl class=facts>{rows}</dl></header>\n"
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5a6675; --paper: #fff; --card: #f5f6f8; --line: #dde1e7;
  --up: #11703c; --down: #a92020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --dim: #a2adba; --paper: #14181d; --card: #1e242b;
  --line: #353d47; --up: #6fd39a; --down: #ff9a92; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 12px; } h2 { font-size: 1.25rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 20px 0 8px; }
dl { margin: 0; } dd { margin: 0 0 6px; overflow-wrap: anywhere; } article { font-size: .93rem; line-height: 1.4; }
dt, small, .note, figcaption { color: var(--dim); } dt, figcaption { font-size: .8rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; } .facts dt { font-size: inherit; }
.facts dd { margin: 0; }
.note { max-width: 70ch; margin: 4px 0 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(105px, 1fr)); gap: 12px; margin: 24px 0; }
.tiles div, article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.tiles b { font-size: 1.6rem; line-height: 1.2; }
.up { color: var(--up); } .down { color: var(--down); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 500; } th:first-child { text-align: left; } thead th { color: var(--dim); }
.group th { padding-top: 16px; font-weight: 700; } td small { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px; }
.wide { display: flex; gap: 12px; align-items: flex-start; } .wide > div { min-width: 0; }
.rank { margin: 0 0 6px; font-weight: 600; font-variant-numeric: tabular-nums; }
blockquote { margin: 0 0 10px; overflow-wrap: anywhere; }
.row { display: flex; gap: 10px; } figure { margin: 0; flex: 0 1 160px; min-width: 0; }
img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
.wide > img { max-width: 40%; } .missing { color: var(--dim); overflow-wrap: anywhere; }
@media (max-width: 480px) { th, td { padding: 5px 4px; font-size: .85rem; } td small { display: block; } }
"""
