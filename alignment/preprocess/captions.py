"""Clean captions as they are typed or pasted."""

import re
import unicodedata
from collections.abc import Sequence

from alignment.preprocess.errors import InputError

MAX_CAPTIONS = 200
MAX_CAPTION_CHARS = 1000

_SHOWN = 80  # characters of a name in a list of them

# Control characters and lone surrogates: nothing a caption can mean, but they part words.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufff9-\ufffb]")
# What does not show and parts no words: soft hyphen, zero-width space, marks and overrides of direction, fillers.
_UNSHOWN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0]"
)
# Zero-width joiners shape letters of Arabic, Indic, Khmer and Mongolian script, and make one emoji of several;
# variation selectors choose how an emoji looks. Elsewhere they mean nothing.
_SHAPED = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1b00-\u1bff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc"
_EMOJI = "\u00a9\u00ae\u203c-\u27bf\u2934-\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_JOINERS = re.compile(
    f"(?<![{_SHAPED}{_EMOJI}\ufe0f])[\u200c\u200d]+|(?<=[{_EMOJI}\ufe0f])[\u200c\u200d]+(?![{_EMOJI}])|\u200c+(?![{_SHAPED}])"
)
_SELECTORS = re.compile(
    f"(?<![{_EMOJI}#*0-9])[\ufe00-\ufe0f]|(?<![\U0001f3f4\U000e0020-\U000e007e])[\U000e0000-\U000e007f]"
)
# What nobody sees of a text and what turns round the words beside it, but for what joins letters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
)
_BREAKS = re.compile("[\t-\r\x85\u2028\u2029]")


def sanitize_text(text: str, limit: int | None = None) -> str:
    """Make a name or a query of somebody else fit to be shown: in one line, and no longer than `limit` characters."""
    shown = _BREAKS.sub(" ", _UNSEEN.sub("", text if limit is None else text[: 10 * limit]))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def join_first(names: Sequence[str], most: int = 3) -> str:
    """Name the first few of many, each in at most `_SHOWN` characters, and count the rest: "a, b, c and 9 more"."""
    shown = ", ".join(sanitize_text(name, _SHOWN) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def clean_caption(text: str) -> str:
    """Compose letters, collapse whitespace, and remove what does not show: a caption means what is seen of it.

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
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = unicodedata.normalize("NFC", _UNSHOWN.sub("", _CONTROLS.sub(" ", text)))
    return " ".join(_JOINERS.sub("", _SELECTORS.sub("", text)).split())
