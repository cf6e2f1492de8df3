"""Top floor, the parts of a query: captions as they are typed, pictures beside them, and how the page shows both.

Place in the flow: `search box + pictures -> terms -> engine.compose_query`; and back, when a part is changed by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from alignment.engine import AlignmentEngine, Query, Term, parse_query, write_query
from alignment.preprocess import InputError, sanitize_text
from alignment.server.sessions import Immutable
from alignment.ui.strings import text
from alignment.ui.widgets import user_errors

WEIGHTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
"""The steps of the buttons; any other weight can be typed."""

HELP = (
    ("pictures.help.both", "pictures.help.both.query"),
    ("pictures.help.without", "pictures.help.without.query"),
    ("pictures.help.weight", "pictures.help.weight.query"),
)

_serial = count()  # the page redraws on a new value only, also when a part stays as it is


@dataclass(frozen=True)
class Added:
    """A picture of a query.

    Attributes:
        term: its weight and embedding; `picture` is the gallery's id, or made up for a visitor's own.
        image: address of its thumbnail.
        name: of the visitor's file; "" if it is the gallery's.
    """

    term: Term
    image: str
    name: str = ""


@dataclass(frozen=True)
class TextQuery(Immutable):
    """The query in question.

    Attributes:
        caption: what the search box says.
        query: what to search for; None if something was wrong.
        error: what was wrong.
        pictures: that belong to the query.
    """

    caption: str
    query: Query | None = None
    error: InputError | None = None
    pictures: tuple[Added, ...] = ()


def ask(engine: AlignmentEngine, caption: str, pictures: tuple[Added, ...] = ()) -> TextQuery:
    """Read and embed a query, or find out why it cannot be."""
    caption = sanitize_text(caption)
    try:
        with user_errors():
            terms = [*parse_query(caption), *(added.term for added in pictures)]
            return TextQuery(caption, engine.compose_query(terms), pictures=pictures)
    except InputError as error:
        return TextQuery(caption, error=error, pictures=pictures)


def captions_of(asked: TextQuery) -> tuple[Term, ...]:
    """Read the captions of a query; none of one that cannot be read."""
    try:
        return parse_query(asked.caption)
    except InputError:
        return ()


# ---------------------------------------------------------------- changes by hand


def changed(asked: TextQuery, data: object) -> tuple[str, tuple[Added, ...]]:
    """Do what an event of `composer.js` asks; a page could send anything, and then nothing changes.

    Returns:
        What the search box says afterwards, and the pictures.
    """
    sent = data if isinstance(data, dict) else {}
    act, said, picture = (sent.get(key) for key in ("act", "text", "picture"))
    for place, added in enumerate(asked.pictures):
        if added.term.picture == picture:
            new = _changed(added.term, act)
            return asked.caption, _put(asked.pictures, place, new and replace(added, term=new))
    captions = captions_of(asked)
    places = [place for place, term in enumerate(captions) if term.text == said]
    if not places:
        return asked.caption, asked.pictures
    place = sent["index"] if sent.get("index") in places else places[0]
    return write_query(_put(captions, place, _changed(captions[place], act))), asked.pictures


def liked(pictures: tuple[Added, ...], added: Added) -> tuple[Added, ...]:
    """Add a picture to a query; one that is there already counts more, or turns round."""
    for place, old in enumerate(pictures):
        if old.term.picture == added.term.picture:
            again = old.term.wanted == added.term.wanted
            return _put(pictures, place, replace(old, term=_changed(old.term, "more") if again else added.term))
    return (*pictures, added)


def _changed(term: Term, act: object) -> Any:
    """Change a term as a button says; None if it goes."""
    weight, sign = abs(term.weight), 1 if term.wanted else -1
    if act == "remove":
        return None
    if act == "flip":
        return replace(term, weight=-term.weight)
    if act == "more":
        return replace(term, weight=sign * next((step for step in WEIGHTS if step > weight), weight))
    if act == "less":
        return replace(term, weight=sign * next((step for step in reversed(WEIGHTS) if step < weight), weight))
    return term


def _put(items: tuple[Any, ...], place: int, new: Any) -> tuple[Any, ...]:
    return (*items[:place], *([] if new is None else [new]), *items[place + 1 :])


# ---------------------------------------------------------------- what is shown


def composer_value(lang: str, asked: TextQuery, names: Sequence[str]) -> dict[str, Any]:
    """Lay the terms out for `composer.js`; one caption by itself needs no telling apart.

    Args:
        lang: of the page.
        asked: the query.
        names: what to call each of its pictures.
    """
    captions = captions_of(asked)
    if len(captions) == 1 and captions[0].weight == 1 and not asked.pictures:
        captions = ()
    terms = [{**_term(lang, term.text, term), "text": term.text} for term in captions]
    for added, name in zip(asked.pictures, names, strict=True):
        terms.append({**_term(lang, name, added.term), "picture": added.term.picture, "image": added.image})
    return {"serial": next(_serial), "label": text(lang, "pictures.terms"), "terms": terms}


def _term(lang: str, name: str, term: Term) -> dict[str, Any]:
    weight = abs(term.weight)
    return {
        "name": name,
        "wanted": term.wanted,
        "says": text(lang, "pictures.term.plus" if term.wanted else "pictures.term.minus", name=name),
        "weight": f"{weight:g}×",
        "least": weight <= WEIGHTS[0],
        "most": weight >= WEIGHTS[-1],
        "labels": {
            "flip": text(lang, "pictures.term.avoid" if term.wanted else "pictures.term.want", name=name),
            "less": text(lang, "pictures.term.less", name=name),
            "more": text(lang, "pictures.term.more", name=name),
            "remove": text(lang, "pictures.term.remove", name=name),
        },
    }


def help_value(lang: str) -> dict[str, Any]:
    """Lay the short help out for `composer.js`."""
    return {
        "help": text(lang, "pictures.help"),
        "lines": [{"query": text(lang, query), "says": text(lang, says)} for says, query in HELP],
        "notes": [text(lang, "pictures.help.picture"), text(lang, "pictures.help.literal")],
    }
