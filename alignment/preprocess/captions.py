"""Clean captions as they are typed or pasted."""

import re
from collections.abc import Sequence

from alignment.preprocess.refusal import InputError

MAX_CAPTIONS = 200
MAX_CAPTION_CHARS = 1000

_SHOWN = 80  # characters of a name in a list of them

# Control characters, zero-width marks, text-direction overrides and lone surrogates: nothing a caption can mean.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")
# What nobody sees of a text and what turns round the words beside it, but for what joins letters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
)
_BREAKS = re.compile("[\t-\r\x85\u2028\u2029]")


def legible(text: str, limit: int | None = None) -> str:
    """Make a name or a query of somebody else fit to be shown: in one line, and no longer than `limit` characters."""
    shown = _BREAKS.sub(" ", _UNSEEN.sub("", text if limit is None else text[: 10 * limit]))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def few(names: Sequence[str], most: int = 3) -> str:
    """Name the first few of many, each in at most `_SHOWN` characters, and count the rest: "a, b, c and 9 more"."""
    shown = ", ".join(legible(name, _SHOWN) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def clean_caption(text: str) -> str:
    """Collapse whitespace and invisible characters of one caption.

    Raises:
        InputError: when nothing is left, or more than `MAX_CAPTION_CHARS` characters are.
    """
    caption = _collapse(text)
    if not caption:
        raise InputError("The caption is empty; type a few words.", "caption.empty")
    if len(caption) > MAX_CAPTION_CHARS:
        raise InputError(
            "The caption has {length} characters and the limit is {limit}; shorten it.",
            "caption.too_long",
            length=len(caption),
            limit=MAX_CAPTION_CHARS,
        )
    return caption


def parse_captions(text: str, *, limit: int = MAX_CAPTIONS) -> list[str]:
    """Read captions typed one a line; blank lines do not count.

    Raises:
        InputError: on no caption, more than `limit`, or one that is too long.
    """
    lines = _lines(text)
    if not lines:
        raise InputError("There is no caption; type one a line.", "captions.none")
    _check_count(len(lines), limit)
    return [clean_caption(line) for line in lines]


def count_captions(text: str, *, limit: int = MAX_CAPTIONS) -> int:
    """Count captions typed one a line before any more work is done on them.

    Raises:
        InputError: on more than `limit`.
    """
    count = len(_lines(text))
    _check_count(count, limit)
    return count


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if _collapse(line)]


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        message = "There are {count} captions and the limit is {limit}; remove some."
        raise InputError(message, "captions.too_many", count=count, limit=limit)


def _collapse(text: str) -> str:
    return " ".join(_INVISIBLE.sub(" ", text).split())
