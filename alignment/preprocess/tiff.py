"""Check the directories of a TIFF file before Pillow reads them.

Pillow copies every value that a directory points at and turns its numbers into Python objects: two million strip
offsets fit into a file of 8 MB but not into memory.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO

from alignment.preprocess.errors import damaged

MAX_NUMBERS = 500_000  # in all directories; a picture of 50 megapixels in tiles of 16 x 16 has 400,000
_MAX_REFERENCED, _SLACK_BYTES = 2, 2**16  # bytes referenced by values, as a multiple of the file size, plus slack
_MAX_ENTRIES, _MAX_DIRECTORIES = 4096, 8
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTE_TYPES = (1, 2, 7)  # kept as bytes, not turned into numbers
_SUBDIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS, interoperability
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


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


def _entries(file: BinaryIO, offset: int, order: str, is_big_tiff: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """Read a directory: (tag, type, count, value or its offset) of each entry."""
    if offset >= 2**62:
        return
    file.seek(offset)
    entry = struct.Struct(order + ("HHQ8s" if is_big_tiff else "HHI4s"))
    count = _integer(file.read(8 if is_big_tiff else 2), order)
    if count > _MAX_ENTRIES:
        raise damaged()
    table = file.read(count * entry.size)
    yield from entry.iter_unpack(table[: len(table) // entry.size * entry.size])


def _integer(data: bytes, order: str) -> int:
    return int.from_bytes(data, "big" if order == ">" else "little")
