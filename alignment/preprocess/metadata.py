"""What a file says beside its picture: left out before it can cost anything, but for which side is up.

Place in the flow: `file -> strip_metadata (here) -> Pillow -> orientation (here)`. Pillow copies every value that a
metadata directory points at, even when thousands of entries point at the same bytes, so 200 KB of EXIF become 800 MB;
it joins the comments of a GIF one by one, so 30 MB of them take minutes. Only the orientation is needed here.
"""

from __future__ import annotations

import re
import struct

from PIL import Image

from alignment.preprocess.errors import damaged

MAX_PARTS = 20_000
"""Segments, blocks or chunks of a file; each costs a step, and photographs have some hundred."""

MAX_SCANS = 100
"""Times that a JPEG may go over its pixels, which takes as long each time; ten are usual."""

_ORIENTATION, _NUMBERS = 0x0112, {1: "B", 3: "H", 4: "I"}  # its tag; types of a number
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

_EXIF, _SCAN, _END = 0xE1, 0xDA, 0xD9  # markers of JPEG; XMP goes by the same as EXIF
_ALONE = {0x00, 0x01, *range(0xD0, 0xDA)}  # those without a segment
_ASIDE = {*range(0xE0, 0xF0), 0xFE} - {0xE0, 0xEE}  # application data and comments; JFIF and Adobe tell the colours
_HEADER = re.compile(rb"\xff[^\xff]", re.DOTALL)  # more of these bytes before it are padding
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # among pixels

_PROFILE, _PNG_XMP = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0\0"


def strip_metadata(data: bytes) -> bytes:
    """Leave metadata out of a JPEG, PNG, GIF or AVIF file; anything else comes back as it is.

    Raises:
        InputError: when it consists of more parts than a picture has any use for.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _strip_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _strip_png(data)
    if data.startswith(b"GIF8"):
        return _strip_gif(data)
    return _strip_avif(data) if data[4:8] == b"ftyp" else data


# ---------------------------------------------------------------- orientation


def orientation(image: Image.Image) -> int:
    """Tell how a picture from a file lies, EXIF's 1 to 8; 1 where nothing says, or where Pillow has turned it."""
    if image.format == "TIFF":
        return 1
    info = image.info
    profile, xmp = info.get("Raw profile type exif"), info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    exif = info.get("exif") or (_unpacked(profile) if isinstance(profile, str) else b"")
    return _of_exif(exif) or _of_xmp(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp) or 1


def _of_exif(exif: bytes) -> int:
    """Find the orientation in the first directory of EXIF; 0 where it says none."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return 0
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return 0
    (count,) = struct.unpack_from(order + "H", exif, start)
    entries = exif[start + 2 : start + 2 + 12 * count]
    for tag, kind, _, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == _ORIENTATION and kind in _NUMBERS:
            return int(struct.unpack_from(order + _NUMBERS[kind], value)[0])
    return 0


def _of_xmp(xmp: bytes) -> int:
    found = _IN_XMP.search(xmp)
    return int(found[1]) if found else 0


def _unpacked(profile: str) -> bytes:
    """Read the EXIF that ImageMagick writes into a PNG as text: three lines, then hexadecimal numbers."""
    try:
        return bytes.fromhex("".join(profile.split("\n")[3:]))
    except ValueError:
        return b""


# ---------------------------------------------------------------- formats


def _strip_jpeg(data: bytes) -> bytes:
    exif: list[bytes] = []
    kept, xmp, place = [data[:2]], b"", 2
    for _ in range(MAX_PARTS):
        found = _HEADER.search(data, place)
        if found is None:  # no picture follows
            return b"".join(kept)
        place, marker = found.start(), found[0][1]
        if marker == _SCAN:
            break
        end = place + 2 if marker in _ALONE else place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : end]
        if marker not in _ALONE | _ASIDE:
            kept.append(data[place:end])
        elif marker == _EXIF and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif marker == _EXIF and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        place = max(end, place + 2)
    else:
        raise damaged()
    _check_scans(data, place)
    return b"".join([*kept, _upright_segment(_of_exif(b"".join(exif)) or _of_xmp(xmp)), data[place:]])


def _upright_segment(orientation: int) -> bytes:
    """Write EXIF that says the orientation and nothing else; b"" where there is none to say."""
    if not 1 <= orientation <= 8:
        return b""
    exif = b"Exif\0\0MM\0\x2a" + struct.pack(">IHHHIHHI", 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
    return b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif


def _check_scans(data: bytes, place: int) -> None:
    """Count the scans from the first one on; what lies behind the picture, such as a film, may look like some."""
    if data.count(b"\xff\xda", place) <= MAX_SCANS:
        return
    scans = 0
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, place)
        if found is None or found[0][1] == _END:
            return
        scans += found[0][1] == _SCAN
        if scans > MAX_SCANS:
            break
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise damaged()


def _strip_png(data: bytes) -> bytes:
    kept, place = [data[:8]], 8
    for _ in range(MAX_PARTS):
        if place >= len(data):
            return b"".join(kept)
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IEND":
            return b"".join([*kept, data[place:end]])
        if _belongs(data[place + 4 : place + 8], data[place + 8 : place + 32]):
            kept.append(data[place:end])
        place = end
    raise damaged()


def _belongs(kind: bytes, body: bytes) -> bool:
    """Tell whether a chunk of a PNG is needed: the picture, or a text that may say how it lies."""
    if kind in (b"tEXt", b"zTXt"):
        return body.startswith(_PROFILE)
    return body.startswith(_PNG_XMP) if kind == b"iTXt" else kind != b"iCCP"


def _strip_gif(data: bytes) -> bytes:
    """Leave out what stands before the first picture, but for how it is to be shown."""
    place = 13 + (3 * 2 ** ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    kept = [data[:place]]
    steps = 0
    while place < len(data) and data[place] not in b",;":
        start, is_extension = place, data[place] == 0x21
        place += 2 if is_extension else 1
        while is_extension and place < len(data) and data[place]:  # its blocks, up to an empty one
            place, steps = place + 1 + data[place], steps + 1
        place, steps = place + is_extension, steps + 1
        if steps > MAX_PARTS:
            raise damaged()
        if data[start : start + 2] == b"!\xf9":
            kept.append(data[start:place])
    return b"".join([*kept, data[place:]])


def _strip_avif(data: bytes) -> bytes:
    """Call EXIF something else wherever it could be announced, which is anywhere but among the pixels."""
    parts: list[bytes] = []
    place = 0
    for _ in range(MAX_PARTS):
        if place >= len(data):
            return b"".join(parts)
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        end = place + max(size, 8) if size else len(data)
        part = data[place:end]
        parts.append(part if kind == b"mdat" else part.replace(b"Exif", b"none"))
        place = end
    raise damaged()
