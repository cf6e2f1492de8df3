"""Top floor, "Why this match": one dialog for the whole page, which any result of any tab can open.

Place in the flow: `event of a tab -> Pair -> engine.explain -> what explain.js draws (here)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import gradio as gr
from PIL import Image

from alignment.engine import AlignmentEngine, Explanation, as_webp
from alignment.heatmap import heat_colours, patch_overlay
from alignment.preprocess import InputError
from alignment.server.sessions import Immutable, session_state
from alignment.ui.results import Value, cosine
from alignment.ui.strings import error_text, text
from alignment.ui.widgets import data_url, on_event, user_errors, widget

PIXELS = 720
_VERDICTS = {"none": "explain.none", "some": "explain.some", "strong": "explain.strong"}
_SLIGHT = 0.05  # of the full colour; less is no colour
_STOPS = (0, 0.25, 0.5, 0.75, 1)  # colours that the page makes the legend of

_serial = count(1)  # of questions: the page opens the dialog once for each


@dataclass(frozen=True)
class Pair:
    """What is to be explained.

    Attributes:
        image: opened.
        name: of the picture, for those who do not see it.
        caption: as the visitor knows it.
        cosine: as the visitor has seen it; None for what comes out.
    """

    image: Image.Image
    name: str
    caption: str
    cosine: float | None = None


@dataclass(frozen=True)
class ExplanationState(Immutable):
    """What the dialog is about, in no language yet; as it is while the answer is worked out.

    Attributes:
        serial: number of the question, from 1; 0 before there was one.
        caption: in question.
        name: of the picture.
        plain: address of the picture.
        overlay: address of the picture with its relevance.
        explained: the answer.
        error: why there is none.
    """

    serial: int = 0
    caption: str = ""
    name: str = ""
    plain: str = ""
    overlay: str = ""
    explained: Explanation | None = None
    error: InputError | None = None


class ExplanationDialog:
    """See the module."""

    def __init__(self, engine: AlignmentEngine) -> None:
        self.engine = engine

    def build(self, lang: str) -> None:
        """Put the dialog on the page, closed."""
        self.dialog = widget("explain", self._value(lang, ExplanationState()), elem_id="explanation")
        self.asked = session_state(ExplanationState())

    def translate(self, lang: str, asked: ExplanationState) -> Value:
        """Say everything again in another language; open stays open."""
        return self._value(lang, asked)

    def on_event(self, event: Callable[..., Any], pick: Callable[..., Pair | None], inputs: Sequence[Any]) -> None:
        """Let an event open the dialog.

        Args:
            event: such as `results.why`.
            pick: is called with the values of `inputs` and the event; says what to explain, or None.
            inputs: the language, and whatever `pick` needs.
        """

        def answer(event: gr.EventData, lang: str, *values: Any) -> Iterator[list[Any]]:
            for asked in self._answers(lambda: pick(lang, *values, event)):
                yield [asked, self._value(lang, asked)]

        on_event(event, answer, inputs, [self.asked, self.dialog], work="search")

    def _answers(self, pick: Callable[[], Pair | None]) -> Iterator[ExplanationState]:
        """Yield the question at once, then the answer or what was wrong."""
        asked = ExplanationState(next(_serial))
        try:
            with user_errors():
                if (pair := pick()) is None:
                    return
                small = pair.image.copy()
                small.thumbnail((PIXELS, PIXELS))
                asked = replace(asked, caption=pair.caption, name=pair.name, plain=data_url(as_webp(small, PIXELS)))
                yield asked
                yield self._answer(asked, pair, small)
        except InputError as error:
            yield replace(asked, error=error)

    def _answer(self, asked: ExplanationState, pair: Pair, small: Image.Image) -> ExplanationState:
        explained = self.engine.explain(pair.image, pair.caption)
        if pair.cosine is not None:
            explained = replace(explained, cosine=pair.cosine)
        overlay = patch_overlay(small, explained.places, limits=explained.scale.places)
        return replace(asked, overlay=data_url(as_webp(overlay, PIXELS)), explained=explained)

    # ------------------------------------------------------------ what is shown

    def _value(self, lang: str, asked: ExplanationState) -> Value:
        value: Value = {
            "serial": asked.serial,
            "title": text(lang, "explain.title"),
            "close": text(lang, "explain.close"),
            "caption": asked.caption,
            "lang": "zh" if any("\u4e00" <= character <= "\u9fff" for character in asked.caption) else None,
            "plain": asked.plain,
            "alt": asked.name,
            "picture": text(lang, "explain.places"),
        }
        if asked.error:
            return {**value, "error": error_text(lang, asked.error)}
        if asked.explained is None:
            return {**value, "busy": text(lang, "explain.busy") if asked.serial else ""}
        return {**value, **_answer_value(lang, asked, asked.explained)}


def _answer_value(lang: str, asked: ExplanationState, explained: Explanation) -> Value:
    scale = explained.scale
    numbers = {"unrelated": cosine(scale.unrelated), "most": cosine(scale.noise_band[1])}
    verdict = text(lang, _VERDICTS[explained.strength], **numbers)
    return {
        "alt": text(lang, "explain.picture", name=asked.name),
        "overlay": asked.overlay,
        "score": {
            "heading": text(lang, "explain.score"),
            "said": text(lang, "explain.cosine", cosine=cosine(explained.cosine)) + verdict,
            "verdict": verdict,
            "note": text(lang, "explain.score.note"),
            "axis": _axis(lang, explained),
        },
        "places": {
            "note": text(lang, "explain.places.note"),
            "slider": text(lang, "explain.places.slider"),
            "plain": text(lang, "explain.places.plain"),
            "overlay": text(lang, "explain.places.overlay"),
            "low": f"≤ {_short(scale.places[0])}",
            "high": f"≥ {_short(scale.places[1])}",
            "colours": [f"#{bytes(colour).hex()}" for colour in heat_colours(_STOPS, dark=True)],
        },
        "words": {
            "heading": text(lang, "explain.words"),
            "note": text(lang, "explain.words.note"),
            "low": text(lang, "explain.against", value=_signed(-scale.words)),
            "high": text(lang, "explain.for", value=_signed(scale.words)),
        },
        "terms": _terms(asked.caption, explained),
        "fixed": text(lang, "explain.fixed"),
    }


def _axis(lang: str, explained: Explanation) -> Value:
    """Put the pair's cosine beside those of unrelated ones; places are shares of the axis."""
    scale = explained.scale
    low, high = scale.cosines

    def at(value: float) -> float:
        return min(max((value - low) / (high - low), 0), 1)

    return {
        "at": at(explained.cosine),
        "mean": at(scale.unrelated),
        "band": [at(end) for end in scale.noise_band],
        "pair": text(lang, "explain.pair", cosine=cosine(explained.cosine)),
        "unrelated": text(lang, "explain.unrelated", unrelated=cosine(scale.unrelated)),
    }


def _terms(caption: str, explained: Explanation) -> list[Value]:
    """Cut the caption into its words, with what each adds, and what stands between them."""
    terms: list[Value] = []
    end = 0
    for word in explained.words:
        terms.append({"text": caption[end : word.start]})
        added = round(word.contributions[0], 3) + 0.0
        share = min(abs(added) / explained.scale.words, 1)
        kind = "nothing" if share < _SLIGHT else "for" if added > 0 else "against"
        terms.append({"text": word.word, "number": _signed(added), "kind": kind, "share": share})
        end = word.end
    return [term for term in (*terms, {"text": caption[end:]}) if term["text"].strip()]


def _signed(value: float) -> str:
    """Write what is added, always with a sign, and a minus that is as wide as the plus."""
    return f"{value:+.3f}".replace("-", "−") if value else "0.000"


def _short(value: float) -> str:
    return f"{value:.2f}"
