"""UI, sample data set: drawings with captions, as an example of the zip files that the tab "Evaluate" reads."""

import csv
import io
import zipfile
from itertools import product

from PIL import Image, ImageDraw

from alignment.ui.strings import text

SIDE = 320
COLOURS = {"red": "#d03a2f", "blue": "#2f5fd0", "green": "#2c8f4a", "yellow": "#e8b820"}
SHAPES = ("circle", "square", "triangle")
TABLE = "captions"


def sample_zip(lang: str) -> bytes:
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
    return buffer.getvalue()


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
