"""UI, report: what the tab "Evaluate" shows and offers: its result, also as a JSON file, and a sample data set."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

from alignment.engine.dataset_eval import MAX_NAME, RESAMPLES, EvalResult, SuspectedLabel
from alignment.evaluate import KS
from alignment.evaluate.error_analysis import DIRECTIONS, Example
from alignment.model import DualEncoder
from alignment.preprocess import sanitize_text
from alignment.ui.results import percent
from alignment.ui.strings import WORDS, labels, text
from alignment.ui.widgets import File, Value

SHOWN_NAMES = 5
SIDE = 320
COLOURS = {"red": "#d03a2f", "blue": "#2f5fd0", "green": "#2c8f4a", "yellow": "#e8b820"}
SHAPES = ("circle", "square", "triangle")
TABLE = "captions"

PictureValue = Callable[[str, str], Value]  # of a picture's name and the label below it


def report_value(
    lang: str, result: EvalResult, heading: str, note: str, images: Mapping[str, str], names: Mapping[str, str]
) -> Value:
    """Lay a report out for `evaluate.js`.

    `images` has the addresses of the pictures' thumbnails, `names` what to call those that are not in a zip.
    """

    def picture(name: str, label: str) -> Value:
        shown = "" if name in names else name
        return {"image": images.get(name, ""), "alt": names.get(name, name), "label": label, "name": shown}

    columns = [*(f"recall@{k}" for k in KS), "median_rank"]
    return {
        "heading": heading,
        "count": text(lang, "evaluate.count", pictures=f"{result.num_images:,}", captions=f"{result.num_texts:,}"),
        "intro": note,
        "labels": labels(lang, "evaluate."),
        "ks": KS,
        "rows": {name: [_cell_value(result, f"{name}_{column}") for column in columns] for name in DIRECTIONS},
        "leftOut": _left_out_values(lang, result),
        "worst": [_query_value(query, picture) for query in result.worst],
        "suspects": [_suspect_value(suspect, picture) for suspect in result.suspects],
    }


def _cell_value(result: EvalResult, name: str) -> Value:
    found, chance = result.metrics[name], result.chance[name]
    if name.endswith("median_rank"):
        value, low, high, random = (f"{rank:g}" for rank in (found.value, found.low, found.high, chance))
        return {"value": value, "interval": f"{low} – {high}", "random": random}
    interval = f"{found.low * 100:.1f} – {percent(found.high)}"
    shares = {"share": found.value, "chance": chance}
    return {"value": percent(found.value), "interval": interval, "random": percent(chance), **shares}


@cache
def _known_reasons() -> dict[str, str]:
    """Return reason -> key of its sentence; words/evaluate.json lists the reasons beside each sentence."""
    words = json.loads((WORDS / "evaluate.json").read_text("utf-8"))
    return {reason: key for key, entry in words.items() for reason in entry.get("reasons", ())}


def _left_out_values(lang: str, result: EvalResult) -> list[Value]:
    items = []
    for reason, names in result.left_out.items():
        known = _known_reasons().get(reason) or ("evaluate.left.unopened" if "." in reason else "evaluate.left.other")
        more = "" if len(names) <= SHOWN_NAMES else text(lang, "drop.more", count=len(names) - SHOWN_NAMES)
        shown = [sanitize_text(name, MAX_NAME) for name in names[:SHOWN_NAMES]]
        items.append({"reason": text(lang, known, count=len(names)), "names": shown, "more": more})
    return items


def _query_value(query: Example, picture: PictureValue) -> Value:
    if query.direction == "image_to_text":
        lines = {"right_caption": query.answer, "first_caption": query.tops[0]}
        images = [picture(query.query, "query_picture")]
    else:
        lines = {"query_caption": query.query}
        images = [picture(query.answer, "right_picture"), picture(query.tops[0], "first_picture")]
    return {"images": images, "lines": lines, "rank": query.ranks[0], "direction": query.direction}


def _suspect_value(suspect: SuspectedLabel, picture: PictureValue) -> Value:
    images = [picture(suspect.image, "this_picture"), picture(suspect.owner, "its_picture")]
    return {"images": images, "lines": {"own_caption": suspect.caption, "rival_caption": suspect.rival}}


def report_json(result: EvalResult, encoder: DualEncoder, name: str) -> bytes:
    """Write a report on the file `name` for programs, with the metric names of `python -m alignment.evaluate`."""
    worst = [
        {"direction": one.direction, "query": one.query, "answer": one.answer}
        | {"rank": one.ranks[0], "first": one.tops[0]}
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


def sample_zip(lang: str) -> File:
    """Draw a few shapes and pack them with a table of captions in this language."""
    table, buffer = io.StringIO(), io.BytesIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "caption"])
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for shape, colour in product(SHAPES, COLOURS):
            name = f"images/{colour}_{shape}.png"
            what = {"colour": text(lang, f"drawing.{colour}"), "shape": text(lang, f"drawing.{shape}")}
            for form in ("drawing.caption", "drawing.caption.other"):
                writer.writerow([name, text(lang, form, **what)])
            file.writestr(name, _draw(shape, COLOURS[colour]))
        file.writestr(f"{TABLE}.csv", "\ufeff" + table.getvalue())  # the mark tells spreadsheets that it is UTF-8
    return "example.zip", "application/zip", buffer.getvalue()


def _draw(shape: str, colour: str) -> bytes:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    low, high = SIDE // 5, SIDE - SIDE // 5
    if shape == "triangle":
        draw.polygon([(SIDE // 2, low), (low, high), (high, high)], fill=colour)
    else:
        (draw.ellipse if shape == "circle" else draw.rectangle)((low, low, high, high), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
