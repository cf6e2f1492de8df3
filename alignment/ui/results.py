"""Top floor, ranked results in words and numbers: what the lists of captions and pictures show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from alignment.gallery import Caption, Match, Picture, SearchResult
from alignment.preprocess import InputError, legible
from alignment.ui.strings import error_text, text

Value = dict[str, Any]
Item = TypeVar("Item", Picture, Caption)

SHOWN_ALIKE = 24  # results folded under one
LABELS = {
    "cosine": "result.cosine",
    "match": "result.match",
    "why": "result.why",
    "more": "result.more",
    "less": "result.less",
    "moreShort": "result.more.short",
    "lessShort": "result.less.short",
}


def captions_value(found: SearchResult[Caption], lang: str, *, total: int) -> Value:
    """Lay ranked captions out for `captions.js`, those that say the same folded under the best of them."""

    def row(match: Match[Caption]) -> Value:
        return {"id": match.item.id, "text": match.item.text, "lang": match.item.lang or None}

    rows = _laid_out(found, lang, row, "captions.alike")
    return {**_frame("captions", found, total, lang, len(rows)), "rows": rows}


def pictures_value(
    found: SearchResult[Picture],
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

    def card(match: Match[Picture]) -> Value:
        picture = match.item
        words = picture.source if own else picture.caption(lang) or (legible(picture.source) if named else "")
        known: Value = {"id": picture.id, "image": image_of(picture), "alt": words or picture.id, "text": words}
        known |= {"credit": picture.credit, "lang": lang if not own and lang in picture.captions else None}
        return known

    cards = _laid_out(found, lang, card, "pictures.alike")
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


def _frame(key: str, found: SearchResult[Any], total: int, lang: str, count: int) -> Value:
    labels = {**LABELS, "cosine": "result.score"} if found.composed else LABELS
    frame: Value = {
        "heading": text(lang, f"{key}.results"),
        "count": text(lang, f"{key}.count", count=count, total=f"{total:,}"),
        "labels": {name: text(lang, word) for name, word in labels.items()},
        "note": _meaning(key, found, lang),
    }
    if found.matches and found.verdict:
        frame["verdict"] = _answer(key, found, lang)
    return frame | {"count": ""} if found.is_out_of_distribution else frame


def _answer(key: str, found: SearchResult[Any], lang: str) -> Value:
    """Say what to think of the whole answer."""
    if found.is_out_of_distribution:
        why = "result.senseless.part" if found.ood_captions else "result.senseless"
        words = text(lang, why, part="".join(found.ood_captions[:1]))
        return {"step": found.verdict, "text": words, "anyway": text(lang, "result.anyway")}
    words = text(lang, f"{key}.{found.verdict}", chance=percent(found.p_any_match or 0))
    return {
        "step": found.verdict,
        "word": text(lang, f"result.{found.verdict}" if found.fits else "result.nothing"),
        "text": words,
    }


def _meaning(key: str, found: SearchResult[Any], lang: str) -> str:
    """Say what the numbers mean."""
    if found.is_out_of_distribution or not found.matches:
        return ""
    chance = found.matches[0].probability
    if chance is None:
        return text(lang, "result.meaning.pictures" if found.composed else "result.meaning.uncalibrated")
    if found.composed:
        return text(lang, "result.meaning.composed")
    count = round(100 * chance)
    share = text(lang, f"{key}.meaning.some" if count else f"{key}.meaning.none", count=count)
    return text(lang, f"{key}.meaning", chance=percent(chance), share=share)


def _laid_out(
    found: SearchResult[Item], lang: str, known: Callable[[Match[Item]], Value], alike_key: str
) -> list[Value]:
    """Lay results out, best first; under each, those that are nearly the same.

    Args:
        found: the results.
        lang: of the page.
        known: lays out what is known of an item.
        alike_key: of the sentence that counts what is folded.
    """
    best = max([1e-6, *(match.similarity for match in found.matches[:1])])
    laid_out = []
    for rank, (first, *alike) in enumerate(found.duplicates or [(match,) for match in found.matches], start=1):
        result, *folded = (
            {**_numbers(match, rank, best, found.composed, lang), **known(match)}
            for match in (first, *alike[:SHOWN_ALIKE])
        )
        says = text(lang, alike_key, count=len(alike)) if alike else ""
        laid_out.append({**result, "alike": folded, "alikeText": says})
    return laid_out


def _numbers(match: Match[Any], rank: int, best: float, composed: bool, lang: str) -> Value:
    judged = match.verdict if match.verdict != "no_meaning" else None
    return {
        "rank": rank,
        "rankText": text(lang, "result.rank", rank=rank),
        "step": judged,
        "word": text(lang, f"result.{judged}") if judged else "",
        "cosine": f"{match.similarity + 0.0:.2f}" if composed else cosine(match.similarity),
        "probability": "" if match.probability is None else percent(match.probability),
        "bar": min(max(match.similarity / best, 0), 1),
    }
