"""UI, report: the result of the tab "Evaluate", for the page (`evaluate.js`) and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from alignment.engine.dataset_eval import MAX_NAME, RESAMPLES, EvalResult, SuspectedLabel
from alignment.evaluate import KS
from alignment.evaluate.error_analysis import Example
from alignment.model import DualEncoder
from alignment.preprocess import sanitize_text
from alignment.ui.results import percent
from alignment.ui.strings import WORDS, text
from alignment.ui.widgets import Value

SHOWN_NAMES = 5
DIRECTIONS = {"image_to_text": "evaluate.image_to_text", "text_to_image": "evaluate.text_to_image"}

PictureValue = Callable[[str, str], Value]  # of a picture's name and the key of the label below it


def report_value(
    lang: str, result: EvalResult, heading: str, note: str, images: Mapping[str, str], names: Mapping[str, str]
) -> Value:
    """Lay a report out for `evaluate.js`.

    `images` has the addresses of the pictures' thumbnails, `names` what to call those that are not in a zip.
    """

    def picture(name: str, label: str) -> Value:
        shown = "" if name in names else name
        return {"image": images.get(name, ""), "alt": names.get(name, name), "label": text(lang, label), "name": shown}

    worst = [
        {"title": text(lang, title), "items": items}
        for direction, title in DIRECTIONS.items()
        if (items := [_query_value(lang, query, picture) for query in result.worst if query.direction == direction])
    ]
    return {
        "heading": heading,
        "count": text(lang, "evaluate.count", pictures=f"{result.num_images:,}", captions=f"{result.num_texts:,}"),
        "intro": note,
        "table": _table_value(lang, result),
        "meaning": text(lang, "evaluate.meaning"),
        "leftOut": _left_out_value(lang, result),
        "worst": {"title": text(lang, "evaluate.worst"), "note": text(lang, "evaluate.worst.note"), "groups": worst},
        "suspects": {
            "title": text(lang, "evaluate.suspects"),
            "note": text(lang, "evaluate.suspects.note" if result.suspects else "evaluate.suspects.none"),
            "groups": [{"items": [_suspect_value(lang, suspect, picture) for suspect in result.suspects]}],
        },
    }


def _table_value(lang: str, result: EvalResult) -> Value:
    columns = [f"recall@{k}" for k in KS] + ["median_rank"]
    rows = [
        {"title": text(lang, title), "cells": [_cell_value(lang, result, f"{direction}_{name}") for name in columns]}
        for direction, title in DIRECTIONS.items()
    ]
    heads = [text(lang, "evaluate.recall", k=k) for k in KS] + [text(lang, "evaluate.median")]
    return {"caption": text(lang, "evaluate.table"), "heads": heads, "rows": rows}


def _cell_value(lang: str, result: EvalResult, name: str) -> Value:
    found, chance = result.metrics[name], result.chance[name]
    if name.endswith("median_rank"):
        value, low, high, random = (f"{rank:g}" for rank in (found.value, found.low, found.high, chance))
        shares = {}
    else:
        value, low, high, random = percent(found.value), f"{found.low * 100:.1f}", percent(found.high), percent(chance)
        shares = {"share": found.value, "chance": chance}
    said = text(lang, "evaluate.chance", value=random)
    return {"value": value, "interval": f"{low} – {high}", "chanceText": said, **shares}


@cache
def _known_reasons() -> dict[str, str]:
    """Return reason -> key of its sentence; words/evaluate.json lists the reasons beside each sentence."""
    words = json.loads((WORDS / "evaluate.json").read_text("utf-8"))
    return {reason: key for key, entry in words.items() for reason in entry.get("reasons", ())}


def _left_out_value(lang: str, result: EvalResult) -> Value | None:
    items = []
    for reason, names in result.left_out.items():
        known = _known_reasons().get(reason) or ("evaluate.left.unopened" if "." in reason else "evaluate.left.other")
        more = "" if len(names) <= SHOWN_NAMES else text(lang, "drop.more", count=len(names) - SHOWN_NAMES)
        shown = [sanitize_text(name, MAX_NAME) for name in names[:SHOWN_NAMES]]
        items.append({"reason": text(lang, known, count=len(names)), "names": shown, "more": more})
    return {"title": text(lang, "evaluate.left"), "items": items} if items else None


def _query_value(lang: str, query: Example, picture: PictureValue) -> Value:
    rank = text(lang, "evaluate.rank", rank=query.ranks[0])
    if query.direction == "image_to_text":
        lines = {"evaluate.right_caption": query.answer, "evaluate.first_caption": query.tops[0]}
        images = [picture(query.query, "evaluate.query_picture")]
    else:
        lines = {"evaluate.query_caption": query.query}
        right, first = (query.answer, "evaluate.right_picture"), (query.tops[0], "evaluate.first_picture")
        images = [picture(*right), picture(*first)]
    return {"images": images, "lines": _line_values(lang, lines), "rank": rank}


def _suspect_value(lang: str, suspect: SuspectedLabel, picture: PictureValue) -> Value:
    images = [picture(suspect.image, "evaluate.this_picture"), picture(suspect.owner, "evaluate.its_picture")]
    lines = {"evaluate.own_caption": suspect.caption, "evaluate.rival_caption": suspect.rival}
    return {"images": images, "lines": _line_values(lang, lines)}


def _line_values(lang: str, lines: Mapping[str, str]) -> list[Value]:
    return [{"label": text(lang, label), "text": line} for label, line in lines.items()]


def report_json(result: EvalResult, encoder: DualEncoder, name: str) -> bytes:
    """Write a report on the file `name` for programs, with the metric names of `python -m alignment.evaluate`."""
    worst = [
        {
            "direction": one.direction,
            "query": one.query,
            "answer": one.answer,
            "rank": one.ranks[0],
            "first": one.tops[0],
        }
        for one in result.worst
    ]
    suspects = [
        {"image": one.image, "caption": one.caption, "rival": one.rival, "rival_image": one.owner}
        | {"margin": round(one.margin, 4)}
        for one in result.suspects
    ]
    report = {
        "data": name or "starter gallery",
        "model": Path(encoder.name).name,
        "fingerprint": encoder.fingerprint,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_images": result.num_images,
        "num_texts": result.num_texts,
        "resamples": RESAMPLES,
        "metrics": {name: asdict(found) for name, found in result.metrics.items()},
        "chance": dict(result.chance),
        "left_out": {reason: list(names) for reason, names in result.left_out.items()},
        "worst_queries": worst,
        "suspected_wrong_labels": suspects,
    }
    return (json.dumps(report, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace")
