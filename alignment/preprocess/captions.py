"""Clean captions, and make names that come from outside safe to display."""

import re
import unicodedata
from collections.abc import Sequence

from alignment.preprocess.errors import InputError

MAX_CAPTIONS = 200
MAX_CAPTION_CHARS = 1000
_MAX_LISTED_CHARS = 80  # of each name in `join_first`

# Control characters, line separators and lone surrogates separate words: each becomes a space.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufff9-\ufffb]")
# Invisible within a word: soft hyphen, zero-width space, marks and overrides of direction, fillers.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]"
)
# Zero-width joiners shape letters of Arabic, Indic, Khmer and Mongolian script and combine emoji; variation selectors
# choose the look of an emoji. In all other places they are removed.
_SHAPED = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1b00-\u1bff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc"
_EMOJI = "\u00a9\u00ae\u203c-\u27bf\u2934-\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_JOINERS = re.compile(
    f"(?<![{_SHAPED}{_EMOJI}\ufe0f])[\u200c\u200d]+|(?<=[{_EMOJI}\ufe0f])[\u200c\u200d]+(?![{_EMOJI}])|\u200c+(?![{_SHAPED}])"
)
_SELECTORS = re.compile(
    f"(?<![{_EMOJI}#*0-9])[\ufe00-\ufe0f]|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0000-\U000e007f]"
)
# Removed from names: invisible characters and direction overrides, but not joiners, which change how letters look.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
)
_LINE_BREAKS = re.compile("[\t-\r\x85\u2028\u2029]")


def sanitize_text(text: str, limit: int | None = None) -> str:
    """Make a text safe to display: one line, no invisible characters, at most `limit` characters."""
    shown = _LINE_BREAKS.sub(" ", _UNPRINTABLE.sub("", text if limit is None else text[: 10 * limit]))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def join_first(names: Sequence[str], most: int = 3) -> str:
    """List the first few names, shortened, and count the others: "a, b, c and 9 more"."""
    shown = ", ".join(sanitize_text(name, _MAX_LISTED_CHARS) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def clean_caption(text: str) -> str:
    """Normalise a caption to NFC, remove invisible characters and collapse whitespace.

    Raises:
        InputError: when nothing is left, or more than `MAX_CAPTION_CHARS` characters are.
    """
    caption = _collapse(text)
    if not caption:
        raise InputError("The caption is empty; type a few words.", "caption.empty")
    if len(caption) > MAX_CAPTION_CHARS:
        message = "The caption has {length} characters and the limit is {limit}; shorten it."
        raise InputError(message, "caption.too_long", length=len(caption), limit=MAX_CAPTION_CHARS)
    return caption


def parse_captions(text: str, *, limit: int = MAX_CAPTIONS) -> list[str]:
    """Read one caption a line; raise an InputError on no caption, more than `limit`, or one that is too long."""
    lines = caption_lines(text, limit=limit)
    if not lines:
        raise InputError("There is no caption; type one a line.", "captions.none")
    return [clean_caption(line) for line in lines]


def caption_lines(text: str, *, limit: int) -> list[str]:
    """Split captions, one a line, and skip blank lines; raise an InputError on more than `limit`."""
    lines = [line for line in text.splitlines() if _collapse(line)]
    if len(lines) > limit:
        message = "There are {count} captions and the limit is {limit}; remove some."
        raise InputError(message, "captions.too_many", count=len(lines), limit=limit)
    return lines


def _collapse(text: str) -> str:
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", _CONTROLS.sub(" ", text)))
    return " ".join(_JOINERS.sub("", _SELECTORS.sub("", text)).split())
