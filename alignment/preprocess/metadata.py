"""Remove metadata from a picture file before Pillow reads it, and check the directories of a TIFF file.

Place in the flow: `file -> strip_metadata, tile_pixels (here) -> Pillow -> orientation (here)`. Pillow copies every
value that a directory points at, even when thousands of entries point at the same bytes, so 200 KB of EXIF become
800 MB, and turns its numbers into Python objects: two million strip offsets fit into a TIFF file of 8 MB but not into
memory. It joins the comments of a GIF one by one, so 30 MB of them take minutes.
"""

import re
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import BinaryIO

from PIL import Image

from alignment.preprocess.errors import damaged

MAX_PARTS = 20_000
"""Segments, blocks or chunks of a file; each takes a step, and photographs have some hundred."""

MAX_SCANS = 100
"""Progressive scans of a JPEG, each of which takes as long as decoding the picture; ten are usual."""

ORIENTATION_TAG = 0x0112
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

# Markers of JPEG segments. XMP stands in APP1 segments as EXIF does.
_APP1, _START_OF_SCAN, _END_OF_IMAGE = 0xE1, 0xDA, 0xD9
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA)}
_REMOVED = {*range(0xE0, 0xF0), 0xFE} - {0xE0, 0xEE}  # application data and comments; JFIF and Adobe define the colours
_MARKER = re.compile(rb"\xff[^\xff]", re.DOTALL)  # further 0xFF bytes before it are padding
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)

# Chunks of text in a PNG -> beginning of those in which the orientation may be: as ImageMagick writes it, or XMP.
_PNG_TEXTS = {b"iTXt": b"XML:com.adobe.xmp\0\0"} | dict.fromkeys((b"tEXt", b"zTXt"), b"Raw profile type exif\0")

MAX_NUMBERS = 500_000  # in all directories; a picture of 50 megapixels in tiles of 16 x 16 has 400,000
_MAX_REFERENCED, _SLACK_BYTES = 2, 2**16  # bytes referenced by values, as a multiple of the file size, plus slack
_MAX_ENTRIES, _MAX_DIRECTORIES = 4096, 8
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTE_TYPES, _INTEGER_TYPES = (1, 2, 7), (1, 3, 4)  # kept as bytes, not turned into numbers; of an orientation
_SUBDIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS, interoperability
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


def strip_metadata(data: bytes) -> bytes:
    """Remove metadata other than the orientation from JPEG, PNG, GIF and AVIF, and refuse files of too many parts."""
    if data.startswith(b"\xff\xd8\xff"):
        return _strip_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _strip_png(data)
    if data.startswith(b"GIF8"):
        return _strip_gif(data)
    return _strip_avif(data) if data[4:8] == b"ftyp" else data


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of a picture opened from a file; 1 where Pillow applies it (TIFF)."""
    if image.format == "TIFF":
        return 1
    info = image.info
    profile, xmp = info.get("Raw profile type exif"), info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    exif = info.get("exif") or (_from_text(profile) if isinstance(profile, str) else b"")
    return _from_exif(exif) or _from_xmp(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp) or 1


def _from_exif(exif: bytes) -> int:  # the first directory counts; 0 without one
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "")
    entries = _entries(BytesIO(exif), _integer(exif[4:8], order), order, limit=2**16) if order else ()
    for tag, kind, _, value in entries:
        if tag == ORIENTATION_TAG and kind in _INTEGER_TYPES:
            return _integer(value[: _TYPE_SIZES[kind]], order)
    return 0


def _from_xmp(xmp: bytes) -> int:
    found = _IN_XMP.search(xmp)
    return int(found[1]) if found else 0


def _from_text(profile: str) -> bytes:
    """Decode the EXIF that ImageMagick writes into a PNG as text: three lines, then hexadecimal numbers."""
    try:
        return bytes.fromhex("".join(profile.split("\n")[3:]))
    except ValueError:
        return b""


def _segments(data: bytes, at: int, marker_pattern: re.Pattern[bytes]) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of the segments of a JPEG, as far as there are markers."""
    for _ in range(MAX_PARTS):
        found = marker_pattern.search(data, at)
        if found is None:
            return
        marker, start = found[0][1], found.start()
        at = start + 2 + (0 if marker in _WITHOUT_LENGTH else int.from_bytes(data[start + 2 : start + 4], "big"))
        yield marker, start, at
    raise damaged()


def _strip_jpeg(data: bytes) -> bytes:
    kept, xmp = [data[:2]], b""
    exif: list[bytes] = []  # one directory may be split among several segments
    for marker, start, end in _segments(data, 2, _MARKER):
        body = data[start + 4 : end]
        if marker == _START_OF_SCAN:
            _check_scans(data, start)
            return b"".join([*kept, _exif_segment(_from_exif(b"".join(exif)) or _from_xmp(xmp)), data[start:]])
        if marker not in _WITHOUT_LENGTH | _REMOVED:
            kept.append(data[start:end])
        elif marker == _APP1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif marker == _APP1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
    return b"".join(kept)  # no picture follows


def _exif_segment(orientation: int) -> bytes:
    """Write a JPEG segment of EXIF with nothing but the orientation; b"" unless it is 1 to 8."""
    if not 1 <= orientation <= 8:
        return b""
    exif = b"Exif\0\0MM\0\x2a" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION_TAG, 3, 1, orientation, 0, 0)
    return b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif


def _check_scans(data: bytes, at: int) -> None:
    """Count the scans up to the end of the picture; data appended to it, such as a film, may contain the same bytes."""
    scans = 0
    for marker, _, _ in _segments(data, at, _MARKER_IN_SCAN) if data.count(b"\xff\xda", at) > MAX_SCANS else ():
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise damaged()
        if marker == _END_OF_IMAGE:
            return


def _spans(data: bytes, at: int, size: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the consecutive parts of a file, given the size of the part at an offset."""
    for _ in range(MAX_PARTS):
        if at >= len(data):
            return
        yield at, (at := at + size(at))
    raise damaged()


def _strip_png(data: bytes) -> bytes:
    """Remove colour profiles, and texts that cannot contain the orientation."""
    kept = [data[:8]]
    for at, end in _spans(data, 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big")):
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 32]
        if kind == b"iCCP" or (kind in _PNG_TEXTS and not body.startswith(_PNG_TEXTS[kind])):
            continue
        kept.append(data[at:end])
        if kind == b"IEND":
            break
    return b"".join(kept)


def _strip_gif(data: bytes) -> bytes:
    """Remove the extensions before the first picture, but for its graphic control extension."""
    at = 13 + (3 * 2 ** ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    kept, steps = [data[:at]], 0
    while at < len(data) and data[at] not in b",;":
        start, is_extension = at, data[at] == 0x21
        at += 2 if is_extension else 1
        while is_extension and at < len(data) and data[at]:  # its blocks, up to an empty one
            at, steps = at + 1 + data[at], steps + 1
        at, steps = at + is_extension, steps + 1
        if steps > MAX_PARTS:
            raise damaged()
        if data[start : start + 2] == b"!\xf9":
            kept.append(data[start:at])
    return b"".join([*kept, data[at:]])


def _strip_avif(data: bytes) -> bytes:
    """Rename "Exif" in all boxes but those of the pixels, so that the decoder finds none."""

    def size(at: int) -> int:
        declared = int.from_bytes(data[at : at + 4], "big")
        if declared == 1:
            declared = int.from_bytes(data[at + 8 : at + 16], "big")
        return max(declared, 8) if declared else len(data) - at

    boxes = (data[at:end] for at, end in _spans(data, 0, size))
    return b"".join(box if box[4:8] == b"mdat" else box.replace(b"Exif", b"none") for box in boxes)


def tile_pixels(file: BinaryIO) -> int:
    """Check a TIFF file's directories, and return the pixels of one tile, which is decoded whole; 0 without tiles.

    An InputError says that the entries reference more bytes than the file has twice over, or too many numbers.
    """
    length = file.seek(0, 2)
    file.seek(0)
    head = file.read(16)
    if len(head) < 16:
        return 0
    order, is_big_tiff = ">" if head[:2] == b"MM" else "<", head[2:3] == b"\x2b"  # as Pillow recognises BigTIFF
    (first,) = struct.unpack_from(order + "Q", head, 8) if is_big_tiff else struct.unpack_from(order + "I", head, 4)
    waiting, sides = [first], {_TILE_WIDTH: 0, _TILE_HEIGHT: 0}
    referenced = numbers = 0
    for number in range(_MAX_DIRECTORIES):
        for tag, kind, count, value in _entries(file, waiting.pop(), order, is_big_tiff) if waiting else ():
            size = count * _TYPE_SIZES.get(kind, 0)
            numbers += count if kind not in _BYTE_TYPES and size <= length else 0
            if size > len(value):
                referenced += min(size, length)
            elif tag in _SUBDIRECTORIES:
                waiting.append(_integer(value[: _TYPE_SIZES.get(kind, 0)], order))
            elif tag in sides and number == 0:
                sides[tag] = _integer(value[: _TYPE_SIZES.get(kind, 0)], order)
    if referenced > _MAX_REFERENCED * length + _SLACK_BYTES or numbers > MAX_NUMBERS:
        raise damaged()
    return sides[_TILE_WIDTH] * sides[_TILE_HEIGHT]


def _entries(
    file: BinaryIO, offset: int, order: str, is_big_tiff: bool = False, limit: int = _MAX_ENTRIES
) -> Iterator[tuple[int, int, int, bytes]]:
    """Read a directory: (tag, type, count, value or its offset) of each entry."""
    if offset >= 2**62:
        return
    file.seek(offset)
    entry = struct.Struct(order + ("HHQ8s" if is_big_tiff else "HHI4s"))
    count = _integer(file.read(8 if is_big_tiff else 2), order)
    if count > limit:
        raise damaged()
    table = file.read(count * entry.size)
    yield from entry.iter_unpack(table[: len(table) // entry.size * entry.size])


def _integer(data: bytes, order: str) -> int:
    return int.from_bytes(data, "big" if order == ">" else "little")
