"""The directories of a TIFF file, looked over before Pillow copies all they name and counts out all their numbers.

The places of two million strips fit into a file of 8 MB, and as Python's numbers into none.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from alignment.preprocess.errors import damaged

MAX_NUMBERS = 500_000
"""Numbers in the directories; a picture of 50 megapixels in tiles of 16 x 16 has 400,000."""

_SHARED = 2  # times a file's bytes may be named: two values may well share their place
_SLACK = 2**16
_MAX_ENTRIES, _MAX_DIRECTORIES = 4096, 8
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BYTES = (1, 2, 7)  # types that stay as they are
_BELOW = (34665, 34853, 40965)  # tags of the directories that Pillow reads along: EXIF, GPS, interoperability
_TILE_SIDES = (322, 323)


def tile_pixels(file: BinaryIO) -> int:
    """Look a TIFF file's directories over.

    Returns:
        Pixels of a tile, which is decoded whole however small the picture; 0 where there are none.

    Raises:
        InputError: when they name the same bytes over and over, or more numbers than any picture needs.
    """
    length = file.seek(0, 2)
    file.seek(0)
    head = file.read(16)
    order, large = ">" if head[:2] == b"MM" else "<", head[2:3] == b"\x2b"  # as Pillow tells BigTIFF
    if len(head) < 16:
        return 0
    waiting = [struct.unpack_from(order + "Q", head, 8)[0] if large else struct.unpack_from(order + "I", head, 4)[0]]
    sides: dict[int, int] = {}
    named = numbers = looked = 0
    while waiting and looked < _MAX_DIRECTORIES:
        looked += 1
        for tag, kind, count, value in _entries(file, waiting.pop(), order, large):
            size = count * _SIZES.get(kind, 0)
            if size > len(value):
                named += min(size, length)
            elif tag in _BELOW or (tag in _TILE_SIDES and looked == 1):
                number = int.from_bytes(value[: _SIZES.get(kind, 0)], "big" if order == ">" else "little")
                if tag in _BELOW:
                    waiting.append(number)
                else:
                    sides[tag] = number
            numbers += count if kind not in _BYTES and size <= length else 0
    if named > _SHARED * length + _SLACK or numbers > MAX_NUMBERS:
        raise damaged()
    return sides.get(_TILE_SIDES[0], 0) * sides.get(_TILE_SIDES[1], 0)


def _entries(file: BinaryIO, place: int, order: str, large: bool) -> list[tuple[int, int, int, bytes]]:
    """Read a directory's entries: tag, type, how many, and the value or where it lies."""
    if place >= 2**62:
        return []
    file.seek(place)
    form = struct.Struct(order + ("HHQ8s" if large else "HHI4s"))
    head = file.read(8 if large else 2)
    count = int.from_bytes(head, "big" if order == ">" else "little")
    if count > _MAX_ENTRIES:
        raise damaged()
    table = file.read(count * form.size)
    return list(form.iter_unpack(table[: len(table) // form.size * form.size]))
