"""Accept or refuse a picture file by its header, and decode it to upright RGB, at full or reduced size."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from alignment.picture_limits import LIMITS
from alignment.preprocess.errors import InputError, damaged, empty, unsupported
from alignment.preprocess.metadata import ORIENTATION_TAG, orientation, strip_metadata, tile_pixels

logger = logging.getLogger(__name__)

ImageSource = str | os.PathLike[str] | bytes | Image.Image
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
"""Suffixes, in small letters, by which files in folders and archives are taken for pictures."""

_PILLOW_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_check_size` raises an InputError instead

# Formats that Pillow may open; JPEG includes MPO. Not EPS and PDF, which run programs, nor formats without photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")
_READABLE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\*\x00|MM\x00\*|....ftypavi[fs]|P[1-7Ff]\s|\x00\x00\x01\x00",
    re.DOTALL,
)
_STRIPPED = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|....ftyp", re.DOTALL)
_SLOW_CODECS, _MAX_SLOW_PIXELS = {"ppm", "ppm_plain"}, 2_000_000  # decoded number by number, in Python
_MAX_ICON_BYTES = 4 * 2**20  # the pictures in an icon do not pass through `strip_metadata`
_FOREIGN = {
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "PDF": re.compile(rb"%PDF"),
    "EPS": re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"),
    "SVG": re.compile(rb"\s*<(svg|\?xml)"),
    "JPEG 2000": re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    "Photoshop": re.compile(rb"8BPS"),
}
_TURNS = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM]
_TURNS += [Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90]
_UPRIGHT = dict(enumerate(_TURNS, start=2))  # EXIF orientation -> the operation that turns the picture upright
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


@contextmanager
def _read_header(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture without decoding it, and close the file; an InputError says why it is not read."""
    with file:
        head = file.read(64)
        if not head:
            raise empty()
        if head.startswith(b"\0\0\1\0"):
            _check_icon(file)
        if head.startswith((b"II", b"MM")) and tile_pixels(file) > LIMITS["pixels"]:
            raise _too_large()
        Image.MAX_IMAGE_PIXELS = max(LIMITS["pixels"], _PILLOW_MAX_PIXELS)  # Pillow raises beyond twice as many
        source = BytesIO(strip_metadata(head + file.read())) if _STRIPPED.match(head) else file
        try:
            image = Image.open(source, formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise _unidentified(head) from error
        with image:
            _check_codec(image)
            yield image


def _too_large() -> InputError:
    limit = f"{LIMITS['pixels'] / 1e6:g}"
    return InputError("The picture has more than {limit} megapixels; make it smaller.", "image.too_large", limit=limit)


def _check_size(width: int, height: int) -> None:
    """Raise an InputError on a picture without pixels, with too many, or with one side too long for the other."""
    if min(width, height) < 1:
        raise empty()
    if width * height > LIMITS["pixels"]:
        raise _too_large()
    if max(width, height) > LIMITS["aspect"] * min(width, height):
        message = "One side of the picture is more than {limit} times the other; crop it."
        raise InputError(message, "image.too_narrow", limit=LIMITS["aspect"])


def _check_codec(image: Image.Image) -> None:
    """Refuse codecs whose decoding time is out of proportion to the picture."""
    codecs = {tile[0] for tile in getattr(image, "tile", ())}
    if "bmp_rle" in codecs:  # the run-length data may be of any length, whatever the size in pixels
        raise unsupported(kind="RLE BMP files")
    if codecs & _SLOW_CODECS and image.width * image.height > _MAX_SLOW_PIXELS:
        raise unsupported(kind="PPM files")


def _unidentified(head: bytes) -> InputError:
    """Distinguish a damaged picture, a known format that is not read, and a file that is no picture."""
    if _READABLE.match(head):
        return damaged()
    if name := next((name for name, magic in _FOREIGN.items() if magic.match(head)), None):
        return unsupported(kind=f"{name} files")
    message = "This file is not a picture; choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file."
    return InputError(message, "image.not_an_image")


def _check_icon(file: BinaryIO) -> None:
    """Check the sizes of the pictures in an icon: Pillow decodes one of them when it opens the file."""
    if file.seek(0, 2) > _MAX_ICON_BYTES:
        raise unsupported(kind="ICO files")
    file.seek(4)
    directory = file.read(2 + 16 * int.from_bytes(file.read(2), "little"))
    for entry in range(0, len(directory) - 15, 16):
        file.seek(int.from_bytes(directory[entry + 12 : entry + 16], "little"))
        header = file.read(24)
        if header.startswith(b"\x89PNG"):
            width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        else:  # a bitmap, whose height includes that of its mask
            sides = (header[4:6], header[6:8]) if header[:1] == b"\x0c" else (header[4:8], header[8:12])
            width, height = (abs(int.from_bytes(side, "little", signed=len(side) == 4)) for side in sides)
            height //= 2
        if width * height > LIMITS["pixels"]:
            raise _too_large()


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
            _check_size(*image.size)
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
        raise _too_large() from error
    except Exception as error:  # on malformed files decoders raise anything: struct.error, SyntaxError, OverflowError
        raise damaged() from error


def _open(source: ImageSource) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # the caller closes it
    if not isinstance(source, str | os.PathLike):
        return _read_header(BytesIO(source))
    try:
        if not (path := Path(source)).is_file():  # reading a pipe or a device might never end
            raise FileNotFoundError(path)
        return _read_header(path.open("rb"))
    except OSError as error:
        message = "The file {path} cannot be opened; check its name and whether you may read it."
        raise InputError(message, "image.missing", path=str(path)) from error


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
        raise unsupported(kind=f"Pictures with values outside 0 to {white}")
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
