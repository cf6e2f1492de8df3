"""Decode a picture to RGB as a person sees it, at its own size or reduced."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignment.preprocess.errors import InputError, damaged
from alignment.preprocess.formats import check_size, from_file, open_path, too_large, unsupported
from alignment.preprocess.metadata import orientation

logger = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]

# EXIF orientation -> what brings the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF


def open_image(source: ImageSource, *, draft_size: int | None = None) -> Image.Image:
    """Decode a picture to RGB as a person sees it: upright, first frame, transparency on white.

    Opening what this returned changes nothing. Size and format are judged from the header, before any pixel is decoded.

    Args:
        source: path, bytes, binary file, PIL image, or array of (height, width[, channels]): uint8, uint16, bool, or
            floating within [0, 1].
        draft_size: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps this many
            pixels; that takes a third of the time or less. None for the full size.

    Returns:
        A new image in mode RGB, without metadata.

    Raises:
        InputError: when it is no picture, empty, damaged, too large, too narrow, or of a kind not read here.
    """
    try:
        with _opened(source) as image:
            check_size(*image.size)
            # Has the decoder leave detail out; formats but JPEG take no notice. The caller's own picture is left alone.
            drafted = (
                image.draft(None, (draft_size, draft_size)) if draft_size is not None and image is not source else None
            )
            image.load()
            rgb = _to_rgb(image) if drafted is None else _trimmed(_to_rgb(image), drafted[1])
            return _upright(rgb, _lies(image) if image is source else orientation(image))
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large() from error
    except Exception as error:  # hostile bytes make decoders raise anything: struct.error, SyntaxError, OverflowError
        raise damaged() from error


def _trimmed(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Cut a reduced picture to what of it is picture: a side that the scale does not divide ends in part of a pixel.

    Left there, it would move everything by up to half a pixel of a model's input, which is a greater loss than all the
    detail that was left out.
    """
    if box[2:] == image.size:
        return image
    return image.resize((int(box[2]), int(box[3])), Image.Resampling.LANCZOS, box=box)


def _opened(source: ImageSource) -> AbstractContextManager[Image.Image]:
    """Open any source as far as its header."""
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller's, so not ours to close
    if isinstance(source, np.ndarray):
        return nullcontext(_from_array(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return from_file(BytesIO(source))
    if isinstance(source, str | os.PathLike):
        return from_file(open_path(Path(source)))
    data = source.read()
    if not isinstance(data, bytes):
        raise InputError("This is text, not a picture; open the file in binary mode.", "image.not_an_image")
    return from_file(BytesIO(data))


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise unsupported(f"Arrays of shape {array.shape}")
    check_size(array.shape[1], array.shape[0])
    if array.dtype != np.uint8:
        if array.dtype.kind not in "bf" and array.dtype != np.uint16:
            raise unsupported(f"Arrays of {array.dtype}")
        array = _to_8bit(array, 65535 if array.dtype == np.uint16 else 1)
    return Image.fromarray(array)


def _to_8bit(values: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """Scale [0, white] to [0, 255]; values beyond have a range that cannot be known, so they are not guessed at."""
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise unsupported(f"Pictures with values outside 0 to {white}")
    return np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scale greyscale of more than 8 bits; `convert` would clip it, which turns photographs white."""
    tags = getattr(image, "tag_v2", {})  # TIFF says here whether it has 12 bits, and whether 0 is white
    white = 1 if image.mode == "F" else 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    values = np.asarray(image)
    grey = _to_8bit(values, white)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey(image)
    if image.mode == "La":  # premultiplied, and one step is all `convert` knows
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # an orientation left behind would turn the picture again the next time it is opened
    return rgb


def _lies(image: Image.Image) -> int:
    """EXIF orientation of the caller's own picture, 1 to 8; a picture is not refused for broken metadata."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        logger.debug("Unreadable EXIF: %s", error)
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
