"""Floor 1, something to look at: a similarity matrix as a picture, and relevance laid over a photograph.

Place in the flow: `similarity -> heatmap (here) -> page or file`. Numpy arrays and PIL images only, no torch.

The two colour maps are our own: quadratic Bezier curves through OKLab, walked at constant speed, so that equal steps
of the value look like equal steps of colour, and lightness never turns back, so that they also read in greyscale and
to the colour-blind. The light one runs from paper to indigo, the dark one from night to pale yellow: high values
always stand out.

Source: OKLab, Bjorn Ottosson 2020; contrast of text, WCAG 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MAX_CELLS_A_SIDE = 4096
"""Rows or columns beyond this cannot be drawn at a pixel a cell without a picture nobody can open."""

_MAX_SIDE = 4096  # pixels the grid may span; the cells of larger matrices shrink
_MAX_LABEL = 260  # pixels a label may take before it ends in an ellipsis
_MIN_FONT = 8  # smaller figures are not readable and left away

# Control points (lightness, green-red, blue-yellow), inside the sRGB gamut all along the curve.
_LIGHT_CURVE = ((0.975, -0.001, 0.015), (0.74, -0.169, -0.015), (0.31, 0.036, -0.135))
_DARK_CURVE = ((0.22, 0.006, -0.034), (0.55, 0.236, -0.042), (0.945, -0.013, 0.089))
_PAPER, _INK, _UNKNOWN = {False: "#ffffff", True: "#14141c"}, {False: "#1b1b23", True: "#ececf2"}, (128, 128, 128)

_OKLAB_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_LMS_TO_LINEAR_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

FloatArray = NDArray[np.float64]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def heat_colours(values: object, *, dark: bool = False) -> NDArray[np.uint8]:
    """Colour values in [0, 1] so that equal steps look equal.

    Args:
        values: array of any shape; clipped to [0, 1], NaN becomes grey.
        dark: the map for a dark page.

    Returns:
        (..., 3) uint8 sRGB.
    """
    numbers = np.asarray(values, dtype=np.float64)
    known = np.isfinite(numbers)
    colours = _colour_table(dark)[np.rint(np.clip(np.where(known, numbers, 0), 0, 1) * 255).astype(np.intp)]
    colours[~known] = _UNKNOWN
    return colours


def similarity_heatmap(
    similarity: object,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    dark: bool = False,
    cell_size: int = 64,
    decimals: int = 2,
    font: str | None = None,
) -> Image.Image:
    """Draw a similarity matrix with its values written in the cells.

    Args:
        similarity: (num_images, num_texts) numbers; a NaN is a grey cell with a dash.
        row_labels: one a row (an image), longer ones end in an ellipsis; numbers from 1 if left out.
        column_labels: one a column (a text), written upwards; numbers from 1 if left out.
        limits: values of the first and last colour; the smallest and largest of the matrix if left out.
        dark: draw for a dark page.
        cell_size: pixels a cell; large matrices get smaller cells, and no figures once these are unreadable.
        decimals: places after the point.
        font: a TrueType file, needed for labels beyond Latin letters (Pillow's own font has no Chinese).

    Returns:
        An RGB image.

    Raises:
        ValueError: when the matrix is not two-dimensional, is empty or too large, or the labels do not fit it.
    """
    matrix = _checked_matrix(similarity)
    rows = _labels(row_labels, matrix.shape[0], "row")
    columns = _labels(column_labels, matrix.shape[1], "column")
    cell = max(1, min(cell_size, _MAX_SIDE // max(matrix.shape)))
    grid = _grid(matrix, _scaled(matrix, limits), cell, dark)
    _write_values(grid, matrix, cell, decimals, font)
    return _with_margins(grid, rows, columns, cell, dark, font)


def patch_overlay(
    image: Image.Image, relevance: object, *, limits: tuple[float, float] | None = None, opacity: float = 0.6
) -> Image.Image:
    """Lay the relevance of patches over the photograph they were cut from.

    What matters least sinks into night, what matters most glows, on dark photographs and on bright ones.

    Args:
        image: the picture the patches cover edge to edge.
        relevance: (rows, columns) numbers of any range, first row at the top; NaN counts as the least.
        limits: relevance of the first and last colour, so that pictures can be compared: one where nothing is relevant
            is dark all over. Left out, these are the smallest and largest here, and relevance that is the same
            everywhere says nothing and leaves the picture as it is.
        opacity: of the colours over the photograph, in [0, 1].

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: when the relevance is not a two-dimensional, non-empty array, the limits are not (low, high)
            with low < high, or the opacity lies outside [0, 1].
    """
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(f"Limits must be (low, high), not {limits}.")
    if not 0 <= opacity <= 1:
        raise ValueError(f"Opacity must lie between 0 and 1, it is {opacity}.")
    matrix = _checked_matrix(relevance)
    finite = matrix[np.isfinite(matrix)]
    if limits is None and (finite.size == 0 or np.ptp(finite) == 0):
        return image.convert("RGB")
    # Clipped before it is made smooth, or a glaring patch would outshine its neighbours.
    patches = Image.fromarray(np.nan_to_num(_scaled(matrix, limits)).clip(0, 1).astype(np.float32))
    # Bicubic is smooth but overshoots a little at sharp edges; heat_colours clips.
    colours = heat_colours(patches.resize(image.size, Image.Resampling.BICUBIC), dark=True)
    blended = np.asarray(image.convert("RGB"), dtype=np.float64) * (1 - opacity) + colours * opacity
    return Image.fromarray(np.rint(blended).astype(np.uint8))


@lru_cache(maxsize=2)
def _colour_table(dark: bool) -> NDArray[np.uint8]:
    """Sample 256 sRGB colours at equal distances along the Bezier curve in OKLab."""
    start, middle, end = np.array(_DARK_CURVE if dark else _LIGHT_CURVE)
    t = np.linspace(0, 1, 2049)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    walked = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    steps = np.linspace(0, walked[-1], 256)
    oklab = np.stack([np.interp(steps, walked, curve[:, axis]) for axis in range(3)], axis=1)
    linear = np.clip((oklab @ _OKLAB_TO_LMS.T) ** 3 @ _LMS_TO_LINEAR_RGB.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


def _checked_matrix(values: object) -> FloatArray:
    """Insist on two dimensions, at least one cell and no more than can be drawn."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0 or max(matrix.shape) > MAX_CELLS_A_SIDE:
        raise ValueError(
            f"Expected a matrix with rows and columns, at most {MAX_CELLS_A_SIDE} of each, not shape {matrix.shape}."
        )
    return matrix


def _scaled(matrix: FloatArray, limits: tuple[float, float] | None) -> FloatArray:
    """Map the limits to 0 and 1; where they coincide everything is in the middle. NaN stays NaN."""
    finite = matrix[np.isfinite(matrix)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 0.0))
    if low > high:
        raise ValueError(f"Limits must be (low, high), not ({low}, {high}).")
    finite_only = np.where(np.isfinite(matrix), matrix, np.nan)
    return (finite_only - low) / (high - low) if high > low else finite_only * 0 + 0.5


def _labels(labels: Sequence[str] | None, count: int, what: str) -> list[str]:
    """Put each label on one line, or number them from 1."""
    if labels is None:
        return [str(number) for number in range(1, count + 1)]
    if len(labels) != count:
        raise ValueError(f"The matrix has {count} {what}s but {len(labels)} {what} labels.")
    return [" ".join(label.split()) for label in labels]


def _grid(matrix: FloatArray, scaled: FloatArray, cell: int, dark: bool) -> Image.Image:
    """Paint the cells, parted by a hairline where there is room for one."""
    pixels = heat_colours(scaled, dark=dark).repeat(cell, axis=0).repeat(cell, axis=1)
    grid = Image.fromarray(pixels)
    if cell >= 16:
        draw = ImageDraw.Draw(grid)
        for x in range(cell, grid.width, cell):
            draw.line([(x, 0), (x, grid.height)], fill=_PAPER[dark])
        for y in range(cell, grid.height, cell):
            draw.line([(0, y), (grid.width, y)], fill=_PAPER[dark])
    return grid


def _write_values(grid: Image.Image, matrix: FloatArray, cell: int, decimals: int, font: str | None) -> None:
    """Write each value into its cell, black or white, whichever reads better on that colour."""
    texts = [[_format(value, decimals) for value in row] for row in matrix]
    longest = max((text for row in texts for text in row), key=len)
    size = min(int(0.8 * cell / _font(font, 100).getlength(longest) * 100), cell // 3)
    if size < _MIN_FONT:
        return
    draw, typeface = ImageDraw.Draw(grid), _font(font, size)
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            centre = (column * cell + cell / 2, row * cell + cell / 2)
            background = grid.getpixel((column * cell + 2, row * cell + 2))
            assert isinstance(background, tuple)
            draw.text(centre, text, fill=_readable_on(background), font=typeface, anchor="mm")


def _format(value: float, decimals: int) -> str:
    """Write fixed places, no minus in front of nothing, a dash for what is not a number."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}" if np.isfinite(value) else "-"


def _readable_on(colour: tuple[int, ...]) -> str:
    """Choose black or white, whichever contrasts more."""
    channels = np.array(colour[:3]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"


def _with_margins(
    grid: Image.Image, rows: list[str], columns: list[str], cell: int, dark: bool, font: str | None
) -> Image.Image:
    """Put the grid on paper, with a label left of each row and, turned upwards, above each column."""
    typeface, gap = _font(font, max(_MIN_FONT + 3, min(16, cell // 3))), 8
    left = [_label(text, typeface, dark) for text in rows] if cell >= _MIN_FONT + 4 else []
    top = [_label(text, typeface, dark).rotate(90, expand=True) for text in columns] if left else []
    x0 = max((label.width for label in left), default=0) + 2 * gap
    y0 = max((label.height for label in top), default=0) + 2 * gap
    canvas = Image.new("RGB", (x0 + grid.width + gap, y0 + grid.height + gap), _PAPER[dark])
    canvas.paste(grid, (x0, y0))
    for index, label in enumerate(left):
        canvas.paste(label, (x0 - gap - label.width, y0 + index * cell + (cell - label.height) // 2))
    for index, label in enumerate(top):
        canvas.paste(label, (x0 + index * cell + (cell - label.width) // 2, y0 - gap - label.height))
    return canvas


def _label(text: str, typeface: Font, dark: bool) -> Image.Image:
    """Draw one line of text as a small picture, shortened to what a margin may take."""
    if len(text) > _MAX_LABEL or typeface.getlength(text) > _MAX_LABEL:
        text = text[:_MAX_LABEL]  # no letter is narrower than a pixel, and measuring a novel takes seconds
        while typeface.getlength(text + "…") > _MAX_LABEL:
            text = text[:-1]
        text = text.rstrip() + "…"
    width, height = int(typeface.getlength(text)) + 2, int(typeface.getbbox("Ágj")[3]) + 2
    label = Image.new("RGB", (max(width, 1), height), _PAPER[dark])
    ImageDraw.Draw(label).text((1, 0), text, fill=_INK[dark], font=typeface)
    return label


def _font(path: str | None, size: int) -> Font:
    """Open the given typeface or the one Pillow carries."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
