"""Top floor, ranked results in words and numbers: what the lists of captions and pictures show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignment.gallery import Caption, Found, Match, Picture
from alignment.preprocess import InputError, legible
from alignment.ui.strings import error_text, text

Value = dict[str, Any]

SHOWN_ALIKE = 24  # pictures folded under one
LABELS = {
    "cosine": "result.cosine",
    "match": "result.match",
    "why": "result.why",
    "more": "result.more",
    "less": "result.less",
    "moreShort": "result.more.short",
    "lessShort": "result.less.short",
}


def captions_value(found: Found[Caption], lang: str, *, total: int) -> Value:
    """Lay ranked captions out for `captions.js`."""
    rows = [
        {**_numbers(match, found, lang), "id": match.item.id, "text": match.item.text, "lang": match.item.lang or None}
        for match in found.matches
    ]
    return {**_frame("captions", found, total, lang, len(rows)), "rows": rows}


def pictures_value(
    found: Found[Picture],
    lang: str,
    image_of: Callable[[Picture], str],
    *,
    total: int,
    own: bool = False,
    named: bool = False,
    actions: Sequence[str] = ("why", "more", "less"),
) -> Value:
    """Lay ranked pictures out for `pictures.js`, those that are nearly the same folded under the best of them.

    Args:
        found: the results.
        lang: of the page.
        image_of: address of a picture's thumbnail.
        total: how many pictures competed.
        own: whether they are the visitor's; these are called by their file's name.
        named: whether others that have no caption are called so too.
        actions: what can be done with a result.
    """

    def card(match: Match[Picture], rank: int) -> Value:
        picture = match.item
        words = picture.source if own else picture.caption(lang) or (legible(picture.source) if named else "")
        known: Value = {"id": picture.id, "image": image_of(picture), "alt": words or picture.id, "text": words}
        known |= {"credit": picture.credit, "lang": lang if not own and lang in picture.captions else None}
        return {**_numbers(match, found, lang), "rank": rank, "rankText": text(lang, "result.rank", rank=rank), **known}

    cards = []
    for rank, (first, *alike) in enumerate(found.groups or [(match,) for match in found.matches], start=1):
        folded = [card(match, rank) for match in alike[:SHOWN_ALIKE]]
        says = text(lang, "result.alike", count=len(alike)) if alike else ""
        cards.append({**card(first, rank), "alike": folded, "alikeText": says})
    frame = _frame("photos" if own else "pictures", found, total, lang, len(cards))
    return {**frame, "cards": cards, "actions": list(actions)}


def problem_value(error: InputError, lang: str, key: str) -> Value:
    """Say what went wrong where the results would be."""
    return {"heading": text(lang, f"{key}.results"), "error": error_text(lang, error)}


def note_value(lang: str, key: str) -> Value:
    """Say one sentence where the results would be."""
    return {"heading": text(lang, f"{key.split('.')[0]}.results"), "note": text(lang, key)}


def percent(share: float) -> str:
    """Write a probability; what is nearly nothing or nearly certain does not pass for 0 or 100."""
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{share * 100:.1f} %"


def cosine(value: float) -> str:
    """Write a cosine to three places, without a minus in front of nothing."""
    return f"{round(value, 3) + 0.0:.3f}"


def _frame(key: str, found: Found[Any], total: int, lang: str, count: int) -> Value:
    labels = {**LABELS, "cosine": "result.score"} if found.composed else LABELS
    frame: Value = {
        "heading": text(lang, f"{key}.results"),
        "count": text(lang, f"{key}.count", count=count, total=f"{total:,}"),
        "labels": {name: text(lang, word) for name, word in labels.items()},
        "note": text(lang, _meaning(found)),
    }
    if found.matches and not found.fits:
        why = f"{key}.nothing"
        if found.senseless:
            why = "result.senseless.part" if found.nonsense else "result.senseless"
        frame["count"] = ""
        frame["verdict"] = {
            "title": text(lang, "result.nothing"),
            "text": text(lang, why, chance=percent(found.something_fits or 0), part="".join(found.nonsense[:1])),
            "anyway": text(lang, "result.anyway"),
        }
    return frame


def _meaning(found: Found[Any]) -> str:
    """Tell what the numbers mean; the key of a sentence."""
    if found.something_fits is None:
        return "result.meaning.pictures" if found.composed else "result.meaning.uncalibrated"
    return "result.meaning.composed" if found.composed else "result.meaning"


def _numbers(match: Match[Any], found: Found[Any], lang: str) -> Value:
    best = max(found.matches[0].similarity, 1e-6)
    return {
        "rank": match.rank,
        "rankText": text(lang, "result.rank", rank=match.rank),
        "cosine": f"{match.similarity + 0.0:.2f}" if found.composed else cosine(match.similarity),
        "probability": "" if match.probability is None else percent(match.probability),
        "bar": min(max(match.similarity / best, 0), 1),
    }
