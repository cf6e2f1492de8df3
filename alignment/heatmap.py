"""Floor 1, colour maps for values, and relevance laid over a photograph.

Place in the flow: `similarity, relevance -> heatmap (here) -> page`. Numpy arrays and PIL images only, no torch.

The colour maps are quadratic Bezier curves through OKLab (Bjorn Ottosson, 2020), sampled at equal distances, so that
equal steps of the value look equal. Lightness is monotone, for greyscale and the colour-blind. The light map runs from
paper to indigo, the dark one from night to pale yellow: high values always stand out.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Control points (lightness, green-red, blue-yellow), inside the sRGB gamut all along the curve.
_LIGHT_CURVE = ((0.975, -0.001, 0.015), (0.74, -0.169, -0.015), (0.31, 0.036, -0.135))
_DARK_CURVE = ((0.22, 0.006, -0.034), (0.55, 0.236, -0.042), (0.945, -0.013, 0.089))
_UNKNOWN = (128, 128, 128)

_OKLAB_TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_LMS_TO_LINEAR_RGB = np.array([
    [4.0767416621, -3.3077115913, 0.2309699292],
    [-1.2684380046, 2.6097574011, -0.3413193965],
    [-0.0041960863, -0.7034186147, 1.7076147010],
])  # fmt: skip


def heat_colours(values: object, *, dark: bool = False) -> NDArray[np.uint8]:
    """Colour values of any shape, clipped to [0, 1]: (..., 3) uint8 sRGB; NaN and infinity become grey.

    `dark` chooses the map for a dark page.
    """
    numbers = np.asarray(values, dtype=np.float64)
    known = np.isfinite(numbers)
    colours = _colour_table(dark)[np.rint(np.clip(np.where(known, numbers, 0), 0, 1) * 255).astype(np.intp)]
    colours[~known] = _UNKNOWN
    return colours


def patch_overlay(
    image: Image.Image, relevance: object, *, limits: tuple[float, float], opacity: float = 0.6
) -> Image.Image:
    """Lay the relevance of patches over the photograph: the least is dark, the most is bright.

    Args:
        image: the picture that the patches cover edge to edge; the result has its size, in RGB.
        relevance: (rows, columns) numbers of any range, first row at the top; what is not finite counts as the least.
        limits: relevance of the first and last colour, low < high, which makes pictures comparable.
        opacity: of the colours over the photograph, in [0, 1].

    Raises ValueError when the relevance is no matrix or empty, or limits or opacity are out of range.
    """
    matrix = np.asarray(relevance, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"Expected a matrix with rows and columns, not shape {matrix.shape}.")
    low, high = limits
    if not low < high:
        raise ValueError(f"Limits must be (low, high), not {limits}.")
    if not 0 <= opacity <= 1:
        raise ValueError(f"Opacity must lie between 0 and 1, it is {opacity}.")
    scaled = (np.where(np.isfinite(matrix), matrix, low) - low) / (high - low)
    # Clipped before it is made smooth, or an outlier would outshine its neighbours. Bicubic overshoots a little at
    # sharp edges; heat_colours clips that.
    patches = Image.fromarray(scaled.clip(0, 1).astype(np.float32))
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
