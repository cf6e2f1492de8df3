"""Decode a picture to upright RGB, at full or reduced size."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignment.preprocess.errors import InputError, damaged, unsupported
from alignment.preprocess.formats import check_size, open_path, read_header, too_large
from alignment.preprocess.metadata import ORIENTATION_TAG, orientation

logger = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | Image.Image

_TURNS = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM]
_TURNS += [Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90]
_UPRIGHT = dict(enumerate(_TURNS, start=2))  # EXIF orientation -> the operation that turns the picture upright
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


def open_image(source: ImageSource, *, draft_size: int | None = None) -> Image.Image:
    """Decode the first frame of a picture to RGB: upright, transparency on white.

    Size and format are checked by the header, before any pixel is decoded. A picture that was returned before is
    returned unchanged.

    Args:
        source: path, bytes or PIL image.
        draft_size: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps this many
            pixels; that takes a third of the time or less. None for the full size.

    Returns:
        A new image in mode RGB, without metadata.

    Raises:
        InputError: when it is no picture, empty, damaged, too large, too narrow, or of a kind not read here.
    """
    try:
        with _open(source) as image:
            check_size(*image.size)
            # `draft` changes the image in place, so it is not called on the caller's own; only JPEG supports it.
            size = (draft_size, draft_size) if draft_size is not None and image is not source else None
            drafted = image.draft(None, size) if size else None
            image.load()
            rgb = _to_rgb(image) if drafted is None else _crop_draft(_to_rgb(image), drafted[1])
            turned = _exif_orientation(image) if image is source else orientation(image)
            return rgb.transpose(_UPRIGHT[turned]) if turned in _UPRIGHT else rgb
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large() from error
    except Exception as error:  # on malformed files decoders raise anything: struct.error, SyntaxError, OverflowError
        raise damaged() from error


def _open(source: ImageSource) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller closes it
    return read_header(open_path(Path(source)) if isinstance(source, str | os.PathLike) else BytesIO(source))


def _crop_draft(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Remove the partial pixel at the edge of a picture whose sides are no multiples of the scale.

    It would shift the picture by up to half a pixel of the model's input, a greater error than the lost detail.
    """
    if box[2:] == image.size:
        return image
    return image.resize((int(box[2]), int(box[3])), Image.Resampling.LANCZOS, box=box)


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scale greyscale of more than 8 bits; `convert` would clip it, which turns photographs white.

    Values beyond white are refused, since their range is unknown.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF, which may have 12 bits, and 0 for white
    white = 1 if image.mode == "F" else 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    values: NDArray[Any] = np.asarray(image)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise unsupported(f"Pictures with values outside 0 to {white}")
    grey = np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey(image)
    if image.mode == "La":  # premultiplied alpha, which `convert` takes to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # with the orientation kept, opening the result again would turn it again
    return rgb


def _exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of the caller's own picture, 1 to 8; 1 if the metadata is broken."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception as error:
        logger.debug("Unreadable EXIF: %s", error)
        return 1
