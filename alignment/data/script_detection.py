"""The encoding of a short text, told by its script: a few words are too little for the statistics of a detector.

Each rule asks for what hardly any text in another encoding has: kana, frequent Chinese characters, accented letters
inside of Latin words, whole words of Cyrillic letters.
"""

from __future__ import annotations

import re
import unicodedata

_FREQUENT = 0.9  # share of frequent characters in Chinese
_KANA = 0.2  # share of kana in Japanese
_KOREAN_LEADS = 6  # different first bytes from which it is no accident that none is above those of Korean
_RUN = re.compile(rb"[\x80-\xff]+")
_ALONE = re.compile(rb"(?<![a-z\x80-\xff])[\x80-\xff]+(?![a-z\x80-\xff])")  # not in a word of plain letters
_SPACED = re.compile(rb"[\x80-\xff] [\x80-\xff]")
_HIRAGANA_AND_KATAKANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u30fc]")
_CYRILLIC_WORD = re.compile(
    r"(?<![^\W\d_])[\u0401\u0404\u0406\u0407\u0410-\u044f\u0451\u0454\u0456\u0457]+(?![^\W\d_])"
)
_MARKS = (
    "\u201c\u201d\u201e\u2018\u2019\u201a\u2013\u2014\u2026\u2022\u00ab\u00bb"  # quotation, dashes, dots
    "\u00a0\u00b0\u20ac\u00a3\u00a9\u00ae\u2122\u00bd\u00d7"
)
_LONGEST = 3  # accented letters and marks in a row


def encoding_by_script(sample: bytes) -> str | None:
    """Tell the encoding of lines that are not ASCII and not UTF-8; None where no rule holds."""
    for name in ("shift_jis", "euc_jp"):
        if _is_japanese(sample, name):
            return name
    if _ALONE.search(sample) and _is_chinese(sample):
        return "gb18030"
    for name in ("cp1252", "cp1250"):
        if _is_latin(sample, name):
            return name
    return "cp1251" if _is_cyrillic(sample) else None


def _decoded(sample: bytes, encoding: str) -> str:
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError:
        return ""


def _beyond_ascii(text: str) -> list[str]:
    return [character for character in text if not character.isascii()]


def _is_japanese(sample: bytes, encoding: str) -> bool:
    """Tell Japanese by its kana, full-width ones, which stand in one place of each encoding."""
    text = _decoded(sample, encoding)
    letters = [letter for letter in _beyond_ascii(text) if unicodedata.category(letter)[0] == "L"]
    is_whole = not any("\uff61" <= letter <= "\uff9f" for letter in letters)
    return is_whole and bool(letters) and len(_HIRAGANA_AND_KATAKANA.findall(text)) >= _KANA * len(letters)


def _is_chinese(sample: bytes) -> bool:
    """Tell GB 2312 by the place of its frequent characters.

    Korean has its syllables in the first part of the same place, with blanks between words; Chinese hardly ever keeps
    to that.
    """
    runs = _RUN.findall(sample)
    if any(len(run) % 2 for run in runs):
        return False
    leads = [lead for run in runs for lead, trail in zip(run[::2], run[1::2], strict=True) if trail >= 0xA1]
    frequent = [lead for lead in leads if 0xB0 <= lead <= 0xD7 or lead in (0xA1, 0xA3)]
    if not leads or len(frequent) < _FREQUENT * sum(map(len, runs)) / 2:
        return False
    syllables = {lead for lead in frequent if lead >= 0xB0}
    is_korean = len(syllables) >= _KOREAN_LEADS or bool(_SPACED.search(sample))
    return not (is_korean and syllables and max(syllables) <= 0xC8)


def _is_latin(sample: bytes, encoding: str) -> bool:
    """Tell Latin letters with accents: few in a row, in words with plain ones; beside them only marks of writing."""
    text = _decoded(sample, encoding)
    if not text or max(map(len, _RUN.findall(sample))) > _LONGEST:
        return False
    words = re.findall(r"[^\W\d_]+", text)
    foreign = [word for word in words if not word.isascii()]
    others = [mark for mark in _beyond_ascii(text) if not mark.isalpha() and mark not in _MARKS]
    is_spanish = all(mark in "\u00bf\u00a1" for mark in others) and not re.search(r"\w[\u00bf\u00a1]", text)
    return is_spanish and sum(not re.search("[A-Za-z]", word) for word in foreign) <= len(foreign) / 2


def _is_cyrillic(sample: bytes) -> bool:
    """Tell Russian and its kin by words of nothing but Cyrillic letters."""
    text = _decoded(sample, "cp1251")
    words = _CYRILLIC_WORD.findall(text)
    letters = sum(map(len, words))
    return bool(words) and letters >= 3 * len(words) and letters >= _FREQUENT * len(_beyond_ascii(text))
