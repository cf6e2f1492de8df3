"""Clean captions as they are typed or pasted."""

import re

from alignment.preprocess.refusal import InputError

MAX_CAPTIONS = 200
MAX_CAPTION_CHARS = 1000

# Control characters, zero-width marks, text-direction overrides and lone surrogates: nothing a caption can mean.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")


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
    lines = [line for line in text.splitlines() if _collapse(line)]
    if not lines:
        raise InputError("There is no caption; type one a line.", "captions.none")
    if len(lines) > limit:
        message = "There are {count} captions and the limit is {limit}; remove some."
        raise InputError(message, "captions.too_many", count=len(lines), limit=limit)
    return [clean_caption(line) for line in lines]


def _collapse(text: str) -> str:
    return " ".join(_INVISIBLE.sub(" ", text).split())
