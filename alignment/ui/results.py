"""UI, results: ranked captions and pictures in words and numbers, for `captions.js` and `pictures.js`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from alignment.gallery import Caption, Match, Picture, SearchResult
from alignment.preprocess import InputError, sanitize_text
from alignment.ui.strings import error_text, labels, text
from alignment.ui.widgets import Value

Item = TypeVar("Item", Picture, Caption)

SHOWN_ALIKE = 24  # near duplicates folded under a result


def captions_value(found: SearchResult[Caption], lang: str, *, total: int) -> Value:
    """Lay ranked captions out; `total` is the number that competed."""

    def caption_value(caption: Caption) -> Value:
        return {"id": caption.id, "text": caption.text, "lang": caption.lang or None}

    return _results_value(("captions", "captions.alike", "rows"), found, lang, total, caption_value)


def pictures_value(
    found: SearchResult[Picture],
    lang: str,
    image_of: Callable[[Picture], str],
    *,
    total: int,
    own: bool = False,
    named: bool = False,
    actions: Sequence[str],
) -> Value:
    """Lay ranked pictures out.

    Args:
        found: the results.
        lang: of the page.
        image_of: returns the address of a picture's thumbnail.
        total: how many pictures competed.
        own: whether they are the visitor's, which are called by their file's name.
        named: whether others without a caption are called so too.
        actions: buttons of a result.
    """

    def picture_value(picture: Picture) -> Value:
        words = picture.source if own else picture.caption(lang) or (sanitize_text(picture.source) if named else "")
        value: Value = {"id": picture.id, "image": image_of(picture), "alt": words or picture.id, "text": words}
        return value | {"credit": picture.credit, "lang": lang if not own and lang in picture.captions else None}

    names = ("photos" if own else "pictures", "pictures.alike", "cards")
    return {**_results_value(names, found, lang, total, picture_value), "actions": list(actions)}


def problem_value(error: InputError, lang: str, key: str) -> Value:
    """Show an error in the place of the results."""
    return {"heading": text(lang, f"{key}.results"), "error": error_text(lang, error)}


def note_value(lang: str, key: str) -> Value:
    """Show a sentence in the place of the results."""
    return {"heading": text(lang, f"{key.split('.')[0]}.results"), "note": text(lang, key)}


def percent(share: float) -> str:
    """Write a probability; only exactly 0 and 1 are shown as 0 and 100."""
    if 0 < share < 0.001:
        return "<0.1 %"
    if 0.999 < share < 1:
        return ">99.9 %"
    return f"{share * 100:.1f} %"


def cosine(value: float) -> str:
    """Write a cosine to three places, never "-0.000"."""
    return f"{round(value, 3) + 0.0:.3f}"


def _results_value(
    names: tuple[str, str, str],
    found: SearchResult[Item],
    lang: str,
    total: int,
    item_value: Callable[[Item], Value],
) -> Value:
    """Lay results out, best first, near duplicates folded under the best of them.

    `names` are the prefix of the words, the key of the sentence that counts near duplicates, and the list's name in the
    value.
    """
    key, alike_key, field = names
    best = max([1e-6, *(match.similarity for match in found.matches[:1])])
    rows = []
    for rank, group in enumerate(found.duplicates or [(match,) for match in found.matches], start=1):
        result, *alike = (
            {**_numbers(match, rank, best, found.composed, lang), **item_value(match.item)}
            for match in group[: SHOWN_ALIKE + 1]
        )
        alike_text = text(lang, alike_key, count=len(group) - 1) if alike else ""
        rows.append({**result, "alike": alike, "alikeText": alike_text})
    words = labels(lang, "result.") | {"remove": text(lang, "photos.remove")}
    shown = {"count": len(rows), "total": f"{total:,}"}
    return {
        "heading": text(lang, f"{key}.results"),
        "count": "" if found.is_out_of_distribution else text(lang, f"{key}.count", **shown),
        "labels": words | ({"cosine": words["score"]} if found.composed else {}),
        "note": _meaning(key, found, lang),
        **({"verdict": _verdict(key, found, lang)} if found.matches and found.verdict else {}),
        field: rows,
    }


def _verdict(key: str, found: SearchResult[Any], lang: str) -> Value:
    """Judge the answer as a whole."""
    if found.is_out_of_distribution:
        why = "result.senseless.part" if found.ood_captions else "result.senseless"
        words = text(lang, why, part="".join(found.ood_captions[:1]))
        return {"step": found.verdict, "text": words, "anyway": text(lang, "result.anyway")}
    return {
        "step": found.verdict,
        "word": text(lang, f"result.{found.verdict}" if found.fits else "result.nothing"),
        "text": text(lang, f"{key}.{found.verdict}", chance=percent(found.p_any_match or 0)),
    }


def _meaning(key: str, found: SearchResult[Any], lang: str) -> str:
    """Explain the numbers."""
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


def _numbers(match: Match[Any], rank: int, best: float, composed: bool, lang: str) -> Value:
    verdict = match.verdict if match.verdict != "no_meaning" else None
    return {
        "rank": rank,
        "rankText": text(lang, "result.rank", rank=rank),
        "step": verdict,
        "word": text(lang, f"result.{verdict}") if verdict else "",
        "cosine": f"{match.similarity + 0.0:.2f}" if composed else cosine(match.similarity),
        "probability": "" if match.probability is None else percent(match.probability),
        "bar": min(max(match.similarity / best, 0), 1),
    }
