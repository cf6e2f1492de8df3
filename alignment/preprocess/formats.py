"""Accept or refuse a picture file by its header: its format and its size, before any pixel is decoded."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from alignment.picture_limits import LIMITS
from alignment.preprocess.errors import InputError, damaged, empty, unsupported
from alignment.preprocess.metadata import strip_metadata, tile_pixels

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
"""Suffixes, in small letters, by which files in folders and archives are taken for pictures."""

_PILLOW_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `check_size` raises an InputError instead

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


def open_path(path: Path) -> BinaryIO:
    """Open a file for reading; raise an InputError if it does not exist, is no regular file, or may not be read."""
    try:
        if not path.is_file():  # reading a pipe or a device might never end
            raise FileNotFoundError(path)
        return path.open("rb")
    except OSError as error:
        message = "The file {path} cannot be opened; check its name and whether you may read it."
        raise InputError(message, "image.missing", path=str(path)) from error


@contextmanager
def read_header(file: BinaryIO) -> Iterator[Image.Image]:
    """Open a picture without decoding it, and close the file; an InputError says why it is not read."""
    with file:
        head = file.read(64)
        if not head:
            raise empty()
        if head.startswith(b"\0\0\1\0"):
            _check_icon(file)
        if head.startswith((b"II", b"MM")) and tile_pixels(file) > LIMITS["pixels"]:
            raise too_large()
        Image.MAX_IMAGE_PIXELS = max(LIMITS["pixels"], _PILLOW_MAX_PIXELS)  # Pillow raises beyond twice as many
        source = BytesIO(strip_metadata(head + file.read())) if _STRIPPED.match(head) else file
        try:
            image = Image.open(source, formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise _unidentified(head) from error
        with image:
            _check_codec(image)
            yield image


def too_large() -> InputError:
    """Make the error for a picture with more pixels than the limit."""
    limit = f"{LIMITS['pixels'] / 1e6:g}"
    return InputError("The picture has more than {limit} megapixels; make it smaller.", "image.too_large", limit=limit)


def check_size(width: int, height: int) -> None:
    """Raise an InputError on a picture without pixels, with too many, or with one side too long for the other."""
    if min(width, height) < 1:
        raise empty()
    if width * height > LIMITS["pixels"]:
        raise too_large()
    if max(width, height) > LIMITS["aspect"] * min(width, height):
        message = "One side of the picture is more than {limit} times the other; crop it."
        raise InputError(message, "image.too_narrow", limit=LIMITS["aspect"])


def _check_codec(image: Image.Image) -> None:
    """Refuse codecs whose decoding time is out of proportion to the picture."""
    codecs = {tile[0] for tile in getattr(image, "tile", ())}
    if "bmp_rle" in codecs:  # the run-length data may be of any length, whatever the size in pixels
        raise unsupported("Run-length BMP files")
    if codecs & _SLOW_CODECS and image.width * image.height > _MAX_SLOW_PIXELS:
        raise unsupported("PPM files")


def _unidentified(head: bytes) -> InputError:
    """Distinguish a damaged picture, a known format that is not read, and a file that is no picture."""
    if _READABLE.match(head):
        return damaged()
    if name := next((name for name, magic in _FOREIGN.items() if magic.match(head)), None):
        return unsupported(f"{name} files")
    message = "This file is not a picture; choose a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file."
    return InputError(message, "image.not_an_image")


def _check_icon(file: BinaryIO) -> None:
    """Check the sizes of the pictures in an icon: Pillow decodes one of them when it opens the file."""
    if file.seek(0, 2) > _MAX_ICON_BYTES:
        raise unsupported("ICO files")
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
            raise too_large()
