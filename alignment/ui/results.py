"""Top floor, ranked results in words and numbers: what the lists of captions and pictures show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignment.gallery import Caption, Gallery, Match, Picture
from alignment.preprocess import InputError
from alignment.ui.strings import error_text, text

Value = dict[str, Any]


def captions_value(matches: Sequence[Match[Caption]], lang: str, *, total: int, sigmoid: bool) -> Value:
    """Lay ranked captions out for `captions.js`."""
    rows = [
        {**_numbers(match, matches, lang), "text": match.item.text, "lang": match.item.lang or None}
        for match in matches
    ]
    return {**_frame("captions", len(rows), total, lang, sigmoid), "rows": rows}


def pictures_value(
    matches: Sequence[Match[Picture]],
    lang: str,
    image_of: Callable[[Picture], str],
    *,
    total: int,
    sigmoid: bool,
    own: bool = False,
) -> Value:
    """Lay ranked pictures out for `pictures.js`; pictures of the visitor's own are called by their file's name."""
    cards = []
    for match in matches:
        picture = match.item
        words = picture.source if own else picture.caption(lang)
        card: Value = {"image": image_of(picture), "alt": words or picture.id, "text": words, "credit": picture.credit}
        card["lang"] = lang if not own and lang in picture.captions else None
        cards.append({**_numbers(match, matches, lang), **card})
    return {**_frame("photos" if own else "pictures", len(cards), total, lang, sigmoid), "cards": cards}


def problem_value(error: InputError, lang: str, key: str) -> Value:
    """Say what went wrong where the results would be."""
    return {"heading": text(lang, f"{key}.results"), "error": error_text(lang, error)}


def note_value(lang: str, key: str) -> Value:
    """Say one sentence where the results would be."""
    return {"heading": text(lang, f"{key.split('.')[0]}.results"), "note": text(lang, key)}


def is_sigmoid(gallery: Gallery) -> bool:
    """Whether the model judges each pair by itself."""
    return gallery.stamp.logit_bias is not None


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


def _frame(key: str, count: int, total: int, lang: str, sigmoid: bool) -> Value:
    return {
        "heading": text(lang, f"{key}.results"),
        "count": text(lang, f"{key}.count", count=count, total=f"{total:,}"),
        "labels": {"cosine": text(lang, "result.cosine"), "match": text(lang, "result.match")},
        "note": text(lang, "meaning.sigmoid" if sigmoid else "meaning.softmax", total=f"{total:,}"),
    }


def _numbers(match: Match[Any], matches: Sequence[Match[Any]], lang: str) -> Value:
    best = max(matches[0].similarity, 1e-6)
    return {
        "rank": match.rank,
        "rankText": text(lang, "result.rank", rank=match.rank),
        "cosine": cosine(match.similarity),
        "probability": percent(match.probability),
        "bar": min(max(match.similarity / best, 0), 1),
    }
