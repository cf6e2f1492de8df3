"""UI, explanation: "Why this match", one dialog of the page that any result of any tab can open.

Place in the flow: `event of a tab -> Pair -> engine.explain -> what explain.js draws (here)`.
"""

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
from alignment.ui.results import cosine
from alignment.ui.strings import error_text, labels, text
from alignment.ui.widgets import Changes, Value, data_url, on_event, user_errors, widget

PIXELS = 720
_VERDICTS = {"none": "explain.none", "some": "explain.some", "strong": "explain.strong"}
_MIN_SHARE = 0.05  # of the full colour; a word with less is not coloured
_STOPS = (0, 0.25, 0.5, 0.75, 1)  # colours from which the page makes the legend

_serial = count(1)  # of questions: the page opens the dialog once for each


@dataclass(frozen=True)
class Pair:
    """A picture and a caption to explain."""

    image: Image.Image
    name: str  # of the picture, for screen readers
    caption: str
    cosine: float | None = None  # that the visitor has seen; None to show the explanation's own


@dataclass(frozen=True)
class ExplanationState(Immutable):
    """What the dialog is about, in no language yet; as it is while the answer is computed."""

    serial: int = 0  # number of the question; 0 before the first
    caption: str = ""
    name: str = ""  # of the picture
    plain: str = ""  # address of the picture
    overlay: str = ""  # address of the picture with its heat map
    explained: Explanation | None = None
    error: InputError | None = None


class ExplanationDialog:
    """The dialog."""

    def __init__(self, engine: AlignmentEngine) -> None:
        self.engine = engine

    def build(self, lang: str) -> None:
        """Put the dialog on the page, closed."""
        self.dialog = widget("explain", self.translate(lang, ExplanationState()), elem_id="explanation")
        self.state = session_state(ExplanationState())

    def on_event(self, event: Callable[..., Any], find_pair: Callable[..., Pair | None], inputs: Sequence[Any]) -> None:
        """Let an event open the dialog on the pair that `find_pair` returns, if any, given event and `inputs`."""

        def explain(event: gr.EventData, lang: str, *values: Any) -> Iterator[Changes]:
            for state in self._answer(lambda: find_pair(event, lang, *values)):
                yield {self.state: state, self.dialog: self.translate(lang, state)}

        on_event(event, explain, inputs, [self.state, self.dialog], work="search")

    def _answer(self, find_pair: Callable[[], Pair | None]) -> Iterator[ExplanationState]:
        """Yield the question at once, then the answer or the error."""
        state = ExplanationState(next(_serial))
        try:
            with user_errors():
                if (pair := find_pair()) is None:
                    return
                small = pair.image.copy()
                small.thumbnail((PIXELS, PIXELS))
                state = replace(state, caption=pair.caption, name=pair.name, plain=data_url(as_webp(small, PIXELS)))
                yield state
                explained = self.engine.explain(pair.image, pair.caption)
                overlay = patch_overlay(small, explained.places, limits=explained.scale.places)
                if pair.cosine is not None:
                    explained = replace(explained, cosine=pair.cosine)
                yield replace(state, overlay=data_url(as_webp(overlay, PIXELS)), explained=explained)
        except InputError as error:
            yield replace(state, error=error)

    def translate(self, lang: str, state: ExplanationState) -> Value:
        """Lay the dialog out for `explain.js`; an open one stays open in another language."""
        value: Value = {
            "serial": state.serial,
            "labels": labels(lang, "explain."),
            "caption": state.caption,
            "lang": "zh" if any("\u4e00" <= character <= "\u9fff" for character in state.caption) else None,
            "plain": state.plain,
            "alt": state.name,
            "busy": state.serial > 0 and not state.error and not state.explained,
        }
        if state.error:
            return {**value, "error": error_text(lang, state.error)}
        return {**value, **_answer_value(lang, state, state.explained)} if state.explained else value


def _answer_value(lang: str, state: ExplanationState, explained: Explanation) -> Value:
    scale = explained.scale
    numbers = {"unrelated": cosine(scale.unrelated), "most": cosine(scale.noise_band[1])}
    verdict = text(lang, _VERDICTS[explained.strength], **numbers)
    return {
        "alt": text(lang, "explain.picture", name=state.name),
        "overlay": state.overlay,
        "score": {
            "said": text(lang, "explain.cosine", cosine=cosine(explained.cosine)) + verdict,
            "verdict": verdict,
            "axis": _axis_value(lang, explained),
        },
        "places": {
            "low": f"≤ {scale.places[0]:.2f}",
            "high": f"≥ {scale.places[1]:.2f}",
            "colours": [f"#{bytes(colour).hex()}" for colour in heat_colours(_STOPS, dark=True)],
        },
        "words": {
            "low": text(lang, "explain.against", value=_signed(-scale.words)),
            "high": text(lang, "explain.for", value=_signed(scale.words)),
        },
        "terms": _term_values(state.caption, explained),
    }


def _axis_value(lang: str, explained: Explanation) -> Value:
    """Place the pair's cosine among those of unrelated pairs; positions are shares of the axis."""
    scale = explained.scale
    low, high = scale.cosines

    def position(value: float) -> float:
        return min(max((value - low) / (high - low), 0), 1)

    return {
        "at": position(explained.cosine),
        "mean": position(scale.unrelated),
        "band": [position(end) for end in scale.noise_band],
        "pair": text(lang, "explain.pair", cosine=cosine(explained.cosine)),
        "unrelated": text(lang, "explain.unrelated", unrelated=cosine(scale.unrelated)),
    }


def _term_values(caption: str, explained: Explanation) -> list[Value]:
    """Split the caption into its words, with what each contributes, and the text between them."""
    terms: list[Value] = []
    end = 0
    for word in explained.words:
        terms.append({"text": caption[end : word.start]})
        added = round(word.contributions[0], 3) + 0.0
        share = min(abs(added) / explained.scale.words, 1)
        kind = "nothing" if share < _MIN_SHARE else "for" if added > 0 else "against"
        terms.append({"text": word.word, "number": _signed(added), "kind": kind, "share": share})
        end = word.end
    return [term for term in (*terms, {"text": caption[end:]}) if term["text"].strip()]


def _signed(value: float) -> str:
    """Write a number with its sign, the minus as wide as the plus."""
    return f"{value:+.3f}".replace("-", "−") if value else "0.000"
