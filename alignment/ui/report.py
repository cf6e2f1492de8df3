"""Top floor, a measured data set in words and numbers: the report of the tab "Evaluate", on the page and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.data.image_folder import UNUSED_SIDECARS
from alignment.data.tables import CLASSES_ONLY
from alignment.engine.dataset_eval import MAX_NAME, RESAMPLES, EvalResult, SuspectedLabel
from alignment.evaluate import KS, Estimate
from alignment.evaluate.error_analysis import Example
from alignment.model import DualEncoder
from alignment.preprocess import sanitize_text
from alignment.ui.results import Value, percent
from alignment.ui.strings import text

SHOWN_NAMES = 5
DIRECTIONS = {"image_to_text": "evaluate.image_to_text", "text_to_image": "evaluate.text_to_image"}
LEFT_OUT = {
    "missing pictures": "evaluate.left.missing",
    "empty captions": "evaluate.left.empty",
    "paths outside the data set": "evaluate.left.outside",
    "lines without a picture": "evaluate.left.no_picture",
    "unreadable lines": "evaluate.left.lines",
    "ends of very long captions": "evaluate.left.long",
    "pictures of a kind not read here": "evaluate.left.kind",
    "kind": "evaluate.left.kind",
    "link": "evaluate.left.link",
    "name": "evaluate.left.name",
    "twice": "evaluate.left.twice",
    "doubles": "evaluate.left.doubles",
    "uncaptioned": "evaluate.left.uncaptioned",
    "pictures that no caption names": "evaluate.left.uncaptioned",
    "captions of images that are not listed": "evaluate.left.missing",
    "lines with more values than columns": "evaluate.left.values",
    "lines with a quotation mark that is not closed": "evaluate.left.quotation",
    "lines with a delimiter in a value without quotation marks": "evaluate.left.delimiter",
    "captions with damaged characters": "evaluate.left.damaged",
    "files not in UTF-8": "evaluate.left.encoding",
    "names that differ from their pictures' in upper and lower case": "evaluate.left.case",
    "pictures of several splits, taken for the first": "evaluate.left.splits",
    "text files beside pictures that hold no words": "evaluate.left.no_words",
    "unreadable captions": "evaluate.left.unread",
    "other files of captions, whose path has to be given": "evaluate.left.other_files",
    UNUSED_SIDECARS: "evaluate.left.other_files",
    "text files that may belong to several pictures": "evaluate.left.other_files",
    "text files beside which no picture of their name lies": "evaluate.left.other_files",
    "addresses on the network, which are not opened": "evaluate.left.outside",
    "further answers of a conversation": "evaluate.left.answers",
    CLASSES_ONLY: "evaluate.left.classes",
    "cut": "evaluate.left.cut",
    "unread": "evaluate.left.unread",
}


def report_value(
    lang: str, trial: EvalResult, heading: str, note: str, images: Mapping[str, str], names: Mapping[str, str]
) -> Value:
    """Lay a report out for `evaluate.js`.

    Args:
        lang: of the page.
        trial: what was measured.
        heading: of it.
        note: below the heading.
        images: picture -> address of its thumbnail.
        names: picture -> what to call it, where that is not its name in the zip.
    """

    def picture(name: str, label: str) -> Value:
        called = names.get(name, name)
        shown = "" if name in names else name
        return {"image": images.get(name, ""), "alt": called, "label": text(lang, label), "name": shown}

    worst = [
        {"title": text(lang, title), "items": items}
        for direction, title in DIRECTIONS.items()
        if (items := [_worst(lang, example, picture) for example in trial.worst if example.direction == direction])
    ]
    return {
        "heading": heading,
        "count": text(lang, "evaluate.count", pictures=f"{trial.num_images:,}", captions=f"{trial.num_texts:,}"),
        "intro": note,
        "table": _table(lang, trial),
        "meaning": text(lang, "evaluate.meaning"),
        "leftOut": _left_out(lang, trial),
        "worst": {"title": text(lang, "evaluate.worst"), "note": text(lang, "evaluate.worst.note"), "groups": worst},
        "suspects": {
            "title": text(lang, "evaluate.suspects"),
            "note": text(lang, "evaluate.suspects.note" if trial.suspects else "evaluate.suspects.none"),
            "groups": [{"items": [_suspect(lang, suspect, picture) for suspect in trial.suspects]}],
        },
    }


def _table(lang: str, trial: EvalResult) -> Value:
    columns = [f"recall@{k}" for k in KS] + ["median_rank"]
    rows = [
        {"title": text(lang, title), "cells": [_cell(lang, trial, f"{direction}_{column}") for column in columns]}
        for direction, title in DIRECTIONS.items()
    ]
    heads = [text(lang, "evaluate.recall", k=k) for k in KS] + [text(lang, "evaluate.median")]
    return {"caption": text(lang, "evaluate.table"), "heads": heads, "rows": rows}


def _cell(lang: str, trial: EvalResult, name: str) -> Value:
    found, chance = trial.metrics[name], trial.chance[name]
    if name.endswith("median_rank"):
        words = [f"{value:g}" for value in (found.value, found.low, found.high, chance)]
        shares = {}
    else:
        words = [percent(found.value), f"{found.low * 100:.1f}", percent(found.high), percent(chance)]
        shares = {"share": found.value, "chance": chance}
    value, low, high, lots = words
    return {
        "value": value,
        "interval": f"{low} – {high}",
        "chanceText": text(lang, "evaluate.chance", value=lots),
        **shares,
    }


def _left_out(lang: str, trial: EvalResult) -> Value | None:
    if not trial.left_out:
        return None
    items = []
    for reason, names in trial.left_out.items():
        known = LEFT_OUT.get(reason) or ("evaluate.left.unopened" if "." in reason else "evaluate.left.other")
        more = "" if len(names) <= SHOWN_NAMES else text(lang, "drop.more", count=len(names) - SHOWN_NAMES)
        shown = [sanitize_text(name, MAX_NAME) for name in names[:SHOWN_NAMES]]
        items.append({"reason": text(lang, known, count=len(names)), "names": shown, "more": more})
    return {"title": text(lang, "evaluate.left"), "items": items}


def _worst(lang: str, example: Example, picture: Any) -> Value:
    rank = text(lang, "evaluate.rank", rank=example.ranks[0])
    if example.direction == "image_to_text":
        lines = [("evaluate.right_caption", example.answer), ("evaluate.first_caption", example.tops[0])]
        images = [picture(example.query, "evaluate.query_picture")]
    else:
        lines = [("evaluate.query_caption", example.query)]
        images = [
            picture(example.answer, "evaluate.right_picture"),
            picture(example.tops[0], "evaluate.first_picture"),
        ]
    return {"images": images, "lines": [{"label": text(lang, key), "text": line} for key, line in lines], "rank": rank}


def _suspect(lang: str, suspect: SuspectedLabel, picture: Any) -> Value:
    lines = [("evaluate.own_caption", suspect.caption), ("evaluate.rival_caption", suspect.rival)]
    return {
        "images": [picture(suspect.image, "evaluate.this_picture"), picture(suspect.owner, "evaluate.its_picture")],
        "lines": [{"label": text(lang, key), "text": line} for key, line in lines],
    }


def report_json(trial: EvalResult, encoder: DualEncoder, name: str) -> bytes:
    """Write a report down for programs; the names of its figures are those of `python -m alignment.evaluate`.

    Args:
        trial: what was measured.
        encoder: with what.
        name: of the file it came in; "" for the worked example.
    """
    report = {
        "data": name or "starter gallery",
        "model": Path(encoder.name).name,
        "fingerprint": encoder.fingerprint,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_images": trial.num_images,
        "num_texts": trial.num_texts,
        "resamples": RESAMPLES,
        "metrics": {name: _numbers(found) for name, found in trial.metrics.items()},
        "chance": dict(trial.chance),
        "left_out": {reason: list(names) for reason, names in trial.left_out.items()},
        "worst_queries": [
            {
                "direction": example.direction,
                "query": example.query,
                "answer": example.answer,
                "rank": example.ranks[0],
                "first": example.tops[0],
            }
            for example in trial.worst
        ],
        "suspected_wrong_labels": [
            {
                "image": suspect.image,
                "caption": suspect.caption,
                "rival": suspect.rival,
                "rival_image": suspect.owner,
                "margin": round(suspect.margin, 4),
            }
            for suspect in trial.suspects
        ],
    }
    return (json.dumps(report, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace")


def _numbers(found: Estimate) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}
