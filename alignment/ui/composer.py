"""UI, composer: a query of captions and pictures with weights, its edits by buttons, and its view.

Place in the flow: `search box + pictures -> terms -> engine.compose_query`; an edited term changes the box or pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from alignment.engine import AlignmentEngine, Query, Term, parse_query, write_query
from alignment.preprocess import InputError, sanitize_text
from alignment.server.sessions import Immutable
from alignment.ui.strings import labels, text
from alignment.ui.widgets import Value, user_errors

WEIGHTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # the steps of the buttons; any other weight can be typed

_serial = count()  # the page redraws on a new value only, also when an edit changes nothing


@dataclass(frozen=True)
class QueryPicture:
    """A picture of a query."""

    term: Term  # weight and embedding; its `picture` is an id of the gallery, or a hash of the visitor's file
    image: str  # address of the thumbnail
    name: str = ""  # of the visitor's file; "" for the gallery's


@dataclass(frozen=True)
class TextQuery(Immutable):
    """What the search box and the pictures beside it ask for."""

    caption: str  # in the search box
    query: Query | None = None  # None where there is an error
    error: InputError | None = None
    pictures: tuple[QueryPicture, ...] = ()


def make_query(engine: AlignmentEngine, caption: str, pictures: tuple[QueryPicture, ...] = ()) -> TextQuery:
    """Parse and embed a query; an error becomes part of it."""
    caption = sanitize_text(caption)
    try:
        with user_errors():
            terms = [*parse_query(caption), *(picture.term for picture in pictures)]
            return TextQuery(caption, engine.compose_query(terms), pictures=pictures)
    except InputError as error:
        return TextQuery(caption, error=error, pictures=pictures)


def _caption_terms(asked: TextQuery) -> tuple[Term, ...]:
    try:
        return parse_query(asked.caption)
    except InputError:
        return ()


def edit_query(asked: TextQuery, sent: Mapping[str, Any]) -> tuple[str, tuple[QueryPicture, ...]]:
    """Return search box and pictures after the untrusted event of `composer.js`; an invalid one changes nothing."""
    for place, picture in enumerate(asked.pictures):
        if picture.term.picture == sent.get("picture"):
            new = [replace(picture, term=term) for term in _edit(picture.term, sent.get("act"))]
            return asked.caption, _replace_at(asked.pictures, place, new)
    captions = _caption_terms(asked)
    places = [place for place, term in enumerate(captions) if term.text == sent.get("text")]
    if not places:
        return asked.caption, asked.pictures
    place = sent["index"] if sent.get("index") in places else places[0]
    return write_query(_replace_at(captions, place, _edit(captions[place], sent.get("act")))), asked.pictures


def add_picture(pictures: tuple[QueryPicture, ...], added: QueryPicture) -> tuple[QueryPicture, ...]:
    """Add a picture to a query; one that it has gains weight, or takes the sign of the new one."""
    for place, old in enumerate(pictures):
        if old.term.picture == added.term.picture:
            (term,) = _edit(old.term, "more") if old.term.wanted == added.term.wanted else [added.term]
            return _replace_at(pictures, place, [replace(old, term=term)])
    return (*pictures, added)


def _edit(term: Term, act: object) -> list[Term]:
    """Return the term as a button changes it; nothing if it is removed."""
    weight, sign = abs(term.weight), 1 if term.wanted else -1
    edited = {
        "flip": -term.weight,
        "more": sign * next((step for step in WEIGHTS if step > weight), weight),
        "less": sign * next((step for step in reversed(WEIGHTS) if step < weight), weight),
    }
    return [] if act == "remove" else [replace(term, weight=edited.get(str(act), term.weight))]


def _replace_at(items: tuple[Any, ...], place: int, new: Sequence[Any]) -> tuple[Any, ...]:
    return (*items[:place], *new, *items[place + 1 :])


def composer_value(lang: str, asked: TextQuery, names: Sequence[str]) -> Value:
    """Lay the terms out for `composer.js`, with the names of the pictures; one plain caption needs no chip."""
    captions = asked.query.captions if asked.query else _caption_terms(asked)
    if len(captions) == 1 and captions[0].weight == 1 and not asked.pictures:
        captions = ()
    terms = [{**_term_value(lang, term.text, term), "text": term.text} for term in captions]
    for picture, name in zip(asked.pictures, names, strict=True):
        term = picture.term
        terms.append({**_term_value(lang, name, term), "picture": term.picture, "image": picture.image})
    return {"serial": next(_serial), "labels": labels(lang, "pictures."), "terms": terms}


def _term_value(lang: str, name: str, term: Term) -> Value:
    weight = abs(term.weight)
    return {
        "name": name,
        "wanted": term.wanted,
        "says": text(lang, "pictures.term.plus" if term.wanted else "pictures.term.minus", name=name),
        "weight": f"{weight:g}×",
        "least": weight <= WEIGHTS[0],
        "most": weight >= WEIGHTS[-1],
    }
