"""Detect the encoding of a text: byte order marks and strict UTF-8, then rules by script, then statistics.

A few words are too little for a statistical detector, so each rule looks for what hardly any text in another encoding
has: kana, frequent Chinese characters, accented letters inside Latin words, whole words of Cyrillic letters.
"""

import codecs
import io
import re
import unicodedata
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

# UTF-32 stands before UTF-16, whose mark it begins with.
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Encodings that editors and spreadsheets still write; of equally likely ones the first counts.
_LEGACY = ("gb18030", "big5", "shift_jis", "euc_jp", "cp949", "cp1252", "cp1250", "cp1251")
_CHUNK_BYTES, _SAMPLE_BYTES = 2**20, 2**16
_MAX_CHAOS = 0.5  # charset-normalizer's measure of disorder, above which an encoding is ruled out
_MAX_NULL_SHARE = 0.03  # null bytes up to which a text is not UTF-16
_MAX_INVALID_SHARE = 0.25  # invalid sequences below which a file is UTF-8 with some damage
_MIN_FREQUENT_SHARE = 0.9  # of frequent characters in Chinese, of letters in Cyrillic
_MIN_KANA_SHARE = 0.2  # of the letters of Japanese
_MIN_KOREAN_LEADS = 6  # different lead bytes from which it is no accident that all are in the Korean range
_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
_NOT_IN_LATIN_WORD = re.compile(rb"(?<![a-z\x80-\xff])[\x80-\xff]+(?![a-z\x80-\xff])")
_SPACED = re.compile(rb"[\x80-\xff] [\x80-\xff]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u30fc]")
_CYRILLIC_WORD = re.compile(r"(?<![^\W\d_])[ЁЄІЇА-яёєії]+(?![^\W\d_])")
_PUNCTUATION = "“”„‘’‚–—…•«»\u00a0°€£©®™½×"
_MAX_LATIN_RUN = 3  # accented letters and punctuation in a row


class Encoding(NamedTuple):
    """How to decode a text."""

    name: str  # of Python's codec
    damaged: bool = False  # some bytes are invalid in it

    @property
    def is_utf8(self) -> bool:
        """Whether it is UTF-8, with or without a byte order mark."""
        return self.name.startswith("utf-8")


def detect_encoding(file: Path) -> Encoding:
    """Detect how a text file is encoded; a ValueError says that it is no text, or that the encoding is unknown."""
    with file.open("rb") as handle:
        return _detect(handle)


def open_text(file: Path) -> TextIO:
    """Open a text file in its encoding; invalid bytes become U+FFFD, and line ends newlines."""
    return file.open(encoding=detect_encoding(file).name, errors="replace")


def read_text(file: Path) -> str:
    """Read a whole text file in its encoding."""
    with open_text(file) as handle:
        return handle.read()


def decode_text(data: bytes) -> tuple[str, Encoding]:
    """Decode a text as `read_text` does, and return its encoding too."""
    encoding = _detect(io.BytesIO(data))
    return data.decode(encoding.name, "replace"), encoding


def _detect(handle: BinaryIO) -> Encoding:
    data = handle.read(_CHUNK_BYTES)
    named = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    if name := named or (_detect_utf16(data) if b"\0" in data else None):
        return Encoding(name)
    decoder, tail = codecs.getincrementaldecoder("utf-8")(), b""
    while data:
        try:
            decoder.decode(data)
        except UnicodeDecodeError:
            return _detect_legacy(tail + data)
        tail, data = data[-_SAMPLE_BYTES:], handle.read(_CHUNK_BYTES)
    return _detect_legacy(tail) if decoder.getstate()[0] else Encoding("utf-8")


def _detect_utf16(data: bytes) -> str | None:
    """Detect UTF-16 without a mark by the null bytes of ASCII characters; a few are a mistake in another encoding."""
    high, low = data[::2].count(0), data[1::2].count(0)
    if high + low <= _MAX_NULL_SHARE * len(data):
        return None
    name = "utf-16-le" if low > high else "utf-16-be"
    text = data[: len(data) // 2 * 2].decode(name, "replace")
    if text.count("\0") or text.count("\ufffd") > len(text) * 0.01:
        raise ValueError("it is no text")
    return name


def _detect_legacy(data: bytes) -> Encoding:
    """Choose between damaged UTF-8 and the older encodings."""
    sample = b"\n".join(line for line in data.split(b"\n") if not line.isascii())[:_SAMPLE_BYTES]
    text = sample.decode("utf-8", "replace")
    if text.count("\ufffd") <= _MAX_INVALID_SHARE * len(_beyond_ascii(text.replace("\ufffd", ""))):
        return Encoding("utf-8", damaged=True)
    return Encoding(_by_script(sample) or _by_statistics(sample))


def _by_statistics(sample: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=list(_LEGACY), threshold=_MAX_CHAOS).best()
    if best is None or best.encoding not in _LEGACY:
        raise ValueError("its encoding is not known; save it as UTF-8")
    return best.encoding


def _by_script(sample: bytes) -> str | None:
    """Detect the encoding of lines that are neither ASCII nor UTF-8; None where no rule applies."""
    for name in ("shift_jis", "euc_jp"):
        if _is_japanese(_decoded(sample, name)):
            return name
    if _NOT_IN_LATIN_WORD.search(sample) and _is_gb2312(sample):
        return "gb18030"
    for name in ("cp1252", "cp1250"):
        if max(map(len, _HIGH_RUN.findall(sample))) <= _MAX_LATIN_RUN and _is_latin(_decoded(sample, name)):
            return name
    return "cp1251" if _is_cyrillic(_decoded(sample, "cp1251")) else None


def _decoded(sample: bytes, encoding: str) -> str:
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError:
        return ""


def _beyond_ascii(text: str) -> list[str]:
    return [character for character in text if not character.isascii()]


def _is_japanese(text: str) -> bool:
    """Recognise Japanese by full-width kana, whose bytes are no kana in the other encoding."""
    letters = [letter for letter in _beyond_ascii(text) if unicodedata.category(letter)[0] == "L"]
    has_half_width = any("\uff61" <= letter <= "\uff9f" for letter in letters)
    return bool(letters) and not has_half_width and len(_KANA.findall(text)) >= _MIN_KANA_SHARE * len(letters)


def _is_gb2312(sample: bytes) -> bool:
    """Recognise Chinese in GB 2312 by the lead bytes of its frequent characters.

    Korean syllables use the first part of that range alone, with spaces between words.
    """
    leads = "".join(_beyond_ascii(_decoded(sample, "gb2312"))).encode("gb2312")[::2]
    syllables = {lead for lead in leads if 0xB0 <= lead <= 0xD7}
    num_frequent = sum(lead in syllables or lead in (0xA1, 0xA3) for lead in leads)
    in_korean_part = bool(syllables) and max(syllables) <= 0xC8
    is_korean = in_korean_part and (len(syllables) >= _MIN_KOREAN_LEADS or bool(_SPACED.search(sample)))
    return bool(leads) and num_frequent >= _MIN_FREQUENT_SHARE * len(leads) and not is_korean


def _is_latin(text: str) -> bool:
    """Recognise Latin script: accented letters in words with plain ones, and no signs but punctuation."""
    accented = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isascii()]
    signs = [sign for sign in _beyond_ascii(text) if not sign.isalpha() and sign not in _PUNCTUATION]
    is_spanish = all(sign in "¿¡" for sign in signs) and not re.search(r"\w[¿¡]", text)
    without_plain = sum(not re.search("[A-Za-z]", word) for word in accented)
    return bool(text) and is_spanish and without_plain <= len(accented) / 2


def _is_cyrillic(text: str) -> bool:
    """Recognise Cyrillic by words of nothing but Cyrillic letters."""
    words = _CYRILLIC_WORD.findall(text)
    letters = sum(map(len, words))
    return bool(words) and letters >= 3 * len(words) and letters >= _MIN_FREQUENT_SHARE * len(_beyond_ascii(text))
