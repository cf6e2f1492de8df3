"""UI, results: ranked captions and pictures in words and numbers, for `captions.js` and `pictures.js`."""

from collections.abc import Callable
from typing import Any, TypeVar

from alignment.gallery import Caption, Match, Picture, SearchResult
from alignment.ui.strings import labels, text
from alignment.ui.widgets import Value

Item = TypeVar("Item", Picture, Caption)

SHOWN_ALIKE = 24  # near duplicates folded under a result


def results_value(
    key: str, found: SearchResult[Item], lang: str, total: int, item_value: Callable[[Item], Value]
) -> Value:
    """Lay results out, best first, near duplicates folded under the best of them.

    `key` is the prefix of the words, `total` the number of items that competed.
    """
    best = max([1e-6, *(match.similarity for match in found.matches[:1])])
    rows = []
    for rank, group in enumerate(found.duplicates or [(match,) for match in found.matches], start=1):
        result, *alike = (
            {**_numbers(match, rank, best, found.composed, lang), **item_value(match.item)}
            for match in group[: SHOWN_ALIKE + 1]
        )
        alike_key = "captions.alike" if key == "captions" else "pictures.alike"
        alike_text = text(lang, alike_key, count=len(group) - 1) if alike else ""
        rows.append({**result, "alike": alike, "alikeText": alike_text})
    words = {**labels(lang, "result."), "remove": text(lang, "photos.remove")}
    shown = {"count": len(rows), "total": f"{total:,}"}
    return {
        "heading": text(lang, f"{key}.results"),
        "count": "" if found.is_out_of_distribution else text(lang, f"{key}.count", **shown),
        "labels": words | ({"cosine": words["score"]} if found.composed else {}),
        "note": _meaning(key, found, lang),
        **({"verdict": _verdict(key, found, lang)} if found.matches and found.verdict else {}),
        "rows": rows,
    }


def heading_value(lang: str, key: str, **more: str) -> Value:
    """Show a `note` or an `error` in the place of the results."""
    return {"heading": text(lang, f"{key}.results"), **more}


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


def _verdict(key: str, found: SearchResult[Any], lang: str) -> Value:
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
