"""The encoding of a text file: byte order marks and strict UTF-8 first, then what its bytes make most likely."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from alignment.data.script_detection import encoding_by_script

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Encodings that editors and spreadsheets still write; of equally likely ones the first counts.
_LEGACY = ("gb18030", "big5", "shift_jis", "euc_jp", "cp949", "cp1252", "cp1250", "cp1251")
_CHUNK, _SAMPLE = 2**20, 2**16
_DISORDER = 0.5  # as the detector calls it, beyond which an encoding is out of the question
_EQUAL = 0.005  # difference in disorder that says nothing
_SLIPS = 0.03  # share of empty bytes up to which a text is not UTF-16
_DAMAGED = 0.25  # share of invalid sequences below which a file is UTF-8 with some damage


class Encoding(NamedTuple):
    """How to decode a file.

    Attributes:
        name: as Python's codecs call it.
        damaged: whether some bytes do not fit it.
    """

    name: str
    damaged: bool = False


def encoding_of(file: Path) -> Encoding:
    """Tell how a text file is encoded; it is read to its end only while that may be UTF-8.

    Raises:
        ValueError: when it is no text.
    """
    with file.open("rb") as handle:
        data = handle.read(_CHUNK)
        for mark, name in _MARKS:
            if data.startswith(mark):
                return Encoding(name)
        if b"\0" in data and (wide := _wide(data)):
            return wide
        decoder = codecs.getincrementaldecoder("utf-8")()
        tail = b""
        while data:
            try:
                decoder.decode(data)
            except UnicodeDecodeError:
                return _likeliest(tail + data)
            tail, data = data[-_SAMPLE:], handle.read(_CHUNK)
    return _likeliest(tail) if decoder.getstate()[0] else Encoding("utf-8")


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """Open a text file in its encoding; what does not fit becomes U+FFFD, and line ends become newlines."""
    with file.open(encoding=encoding_of(file).name, errors="replace") as handle:
        yield handle


def read_text(file: Path) -> str:
    """Read a whole text file in its encoding."""
    with open_text(file) as handle:
        return handle.read()


def _wide(data: bytes) -> Encoding | None:
    """Tell the byte order of UTF-16 without a mark by where the empty halves of ASCII characters lie.

    Returns:
        None where the few empty bytes are a slip in another encoding.

    Raises:
        ValueError: when it is no text.
    """
    high, low = data[::2].count(0), data[1::2].count(0)
    if high + low <= _SLIPS * len(data):
        return None
    name = "utf-16-le" if low > high else "utf-16-be"
    text = data[: len(data) // 2 * 2].decode(name, "replace")
    if text.count("\0") or text.count("\ufffd") > len(text) * 0.01:
        raise ValueError("it is no text")
    return Encoding(name)


def _likeliest(data: bytes) -> Encoding:
    """Choose among UTF-8 with some damage and the older encodings."""
    lines = [line for line in data.split(b"\n") if not line.isascii()]
    sample = b"\n".join(lines)[:_SAMPLE]
    text = sample.decode("utf-8", "replace")
    invalid = text.count("\ufffd")
    if invalid <= _DAMAGED * sum(not character.isascii() for character in text.replace("\ufffd", "")):
        return Encoding("utf-8", damaged=True)
    if name := encoding_by_script(sample):
        return Encoding(name)
    from charset_normalizer import from_bytes

    matches = from_bytes(sample, cp_isolation=list(_LEGACY), threshold=_DISORDER)
    found = [match for match in matches if match.encoding in _LEGACY]
    if not found:
        raise ValueError("its encoding is not known; save it as UTF-8")
    least = min(match.chaos for match in found)
    likely = [match for match in found if match.chaos <= least + _EQUAL]
    best = max(likely, key=lambda match: (match.coherence, -_LEGACY.index(match.encoding)))
    return Encoding(best.encoding)
