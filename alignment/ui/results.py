"""Top floor, ranked results in words and numbers: what the lists of captions and pictures show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignment.gallery import Caption, Found, Match, Picture
from alignment.preprocess import InputError
from alignment.ui.strings import error_text, text

Value = dict[str, Any]


def captions_value(found: Found[Caption], lang: str, *, total: int) -> Value:
    """Lay ranked captions out for `captions.js`."""
    rows = [
        {**_numbers(match, found, lang), "id": match.item.id, "text": match.item.text, "lang": match.item.lang or None}
        for match in found.matches
    ]
    return {**_frame("captions", found, total, lang), "rows": rows}


def pictures_value(
    found: Found[Picture], lang: str, image_of: Callable[[Picture], str], *, total: int, own: bool = False
) -> Value:
    """Lay ranked pictures out for `pictures.js`; pictures of the visitor's own are called by their file's name."""
    cards = []
    for match in found.matches:
        picture = match.item
        words = picture.source if own else picture.caption(lang)
        card: Value = {"id": picture.id, "image": image_of(picture), "alt": words or picture.id, "text": words}
        card |= {"credit": picture.credit, "lang": lang if not own and lang in picture.captions else None}
        cards.append({**_numbers(match, found, lang), **card})
    return {**_frame("photos" if own else "pictures", found, total, lang), "cards": cards}


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


def _frame(key: str, found: Found[Any], total: int, lang: str) -> Value:
    judged = found.something_fits is not None
    frame: Value = {
        "heading": text(lang, f"{key}.results"),
        "count": text(lang, f"{key}.count", count=len(found.matches), total=f"{total:,}"),
        "labels": {name: text(lang, f"result.{name}") for name in ("cosine", "match", "why", "more", "less")},
        "note": text(lang, "result.meaning" if judged else "result.meaning.uncalibrated"),
    }
    if found.matches and not found.fits:
        why = "result.senseless" if found.senseless else f"{key}.nothing"
        frame["verdict"] = {
            "title": text(lang, "result.nothing"),
            "text": text(lang, why, chance=percent(found.something_fits or 0)),
            "anyway": text(lang, "result.anyway"),
        }
    return frame


def _numbers(match: Match[Any], found: Found[Any], lang: str) -> Value:
    best = max(found.matches[0].similarity, 1e-6)
    return {
        "rank": match.rank,
        "rankText": text(lang, "result.rank", rank=match.rank),
        "cosine": cosine(match.similarity),
        "probability": "" if match.probability is None else percent(match.probability),
        "bar": min(max(match.similarity / best, 0), 1),
    }
