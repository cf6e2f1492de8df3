"""Compose a query of captions and pictures, each wanted or unwanted, more or less.

Place in the flow: `typed text -> terms -> Query (here) -> search -> matches`.

    2 x golden retriever + snow - people

A ` + ` or ` - ` with spaces around it separates terms, and so does a full-width ＋ or －. A weight precedes its term.
Text in double quotes is taken literally.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from alignment.confidence import MatchCalibrator, MatchConfidence
from alignment.gallery import Gallery, Picture, SearchResult, modality
from alignment.gallery.modality import Modality
from alignment.preprocess import InputError
from alignment.similarity import cosine_similarity, top_k

MAX_TERMS = 8
MIN_WEIGHT, MAX_WEIGHT = 0.1, 10.0

_CJK = "\u3400-\u9fff\uf900-\ufaff"
# Between blanks or at either end; full-width signs anywhere; a plus also between Chinese characters, which are written
# without blanks. A minus there could be a hyphen.
_SIGN = re.compile(
    rf'"[^"]*"|(?P<sign>(?:(?<=\s)|^)[+\-−](?=\s|$)|[＋－]|(?<=[{_CJK}])\+(?=[{_CJK}]|\d+(?:[.,]\d+)?\s*[x×*]\s*[{_CJK}]))'
)
# "2 x dog", "2x dog", "0.5*dog", "2×狗"; but not "4x4 car", "2x4" or "3 x-rays".
_WEIGHT = re.compile(rf"(?P<weight>\d{{1,6}}(?:[.,]\d{{1,6}})?)\s*(?:[xX](?=\s|[{_CJK}])|[×＊*])\s*(?=[^\d\s])")
MINUS_THRESHOLD = 0.5  # standardised score from which a minus term lowers a picture
_MIN_PICTURES = 3  # to estimate a spread
_SAME = 0.99  # cosine from which a picture is the term itself
_MIN_SPREAD = 1e-4
_CONSIDERED, _GROWTH, _MAX_CONSIDERED = 1000, 4, 16_000  # of many pictures, for one query


@dataclass(frozen=True)
class Term:
    """One part of a query: a caption, or a picture by its id in the gallery or on the page."""

    text: str = ""
    weight: float = 1.0  # negative for a minus term
    picture: str = ""
    embed: Tensor | None = None  # (embed_dim,), unit norm; None until a caption has been embedded

    @property
    def wanted(self) -> bool:
        """Whether it is a plus term."""
        return self.weight > 0

    @property
    def vector(self) -> Tensor:
        """The embedding; ValueError where there is none yet."""
        if self.embed is None:
            raise ValueError(f"{self.text!r} has not been embedded yet.")
        return self.embed


@dataclass(frozen=True)
class Query:
    """Terms with their embeddings, at least one of them a plus term; InputError otherwise."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("The caption is empty; type a few words.", "caption.empty")
        if not any(term.wanted for term in self.terms):
            message = "This says only what to leave out; add something to look for."
            raise InputError(message, "query.only_minus")

    @property
    def captions(self) -> tuple[Term, ...]:
        """The terms that are captions."""
        return tuple(term for term in self.terms if term.text)

    @property
    def wanted_captions(self) -> tuple[Term, ...]:
        """The captions that are plus terms; without any there is no match probability."""
        return tuple(term for term in self.captions if term.wanted)

    @property
    def composed(self) -> bool:
        """Whether it is more than one caption."""
        return len(self.terms) > 1 or not self.wanted_captions


def parse_query(text: str) -> tuple[Term, ...]:
    """Read a typed query, without its empty terms; InputError on too many terms or a weight that is out of bounds."""
    terms, sign, start = [], 1.0, 0
    for found in _SIGN.finditer(text):
        if found["sign"]:
            terms.append(_read_term(text[start : found.start()], sign))
            sign, start = (1.0 if found["sign"] in "+＋" else -1.0), found.end()
    terms.append(_read_term(text[start:], sign))
    read = tuple(term for term in terms if term.text)
    check_count(len(read))
    return read


def check_count(count: int) -> None:
    """Raise InputError when a query has too many terms."""
    if count > MAX_TERMS:
        message = "A query may have {limit} parts and this one has {count}; leave some out."
        raise InputError(message, "query.too_many", limit=MAX_TERMS, count=count)


def _read_term(text: str, sign: float) -> Term:
    text, weight = text.strip(), 1.0
    if found := _WEIGHT.match(text):
        text, weight = text[found.end() :], float(found["weight"].replace(",", "."))
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            bounds = {"low": f"{MIN_WEIGHT:g}", "high": f"{MAX_WEIGHT:g}"}
            raise InputError("A weight lies between {low} and {high}.", "query.weight", **bounds)
    if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return Term(text, sign * weight)


def write_query(terms: Sequence[Term]) -> str:
    """Write the captions of a query so that `parse_query` reads them again; pictures are left out."""
    parts = []
    for term in terms:
        if term.text:
            weight = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} x "
            parts.append(f"{'+' if term.wanted else '-'} {weight}{_quoted(term.text)}")
    return " ".join(parts).removeprefix("+ ")


def _quoted(text: str) -> str:
    try:
        literal = parse_query(text) == (Term(text),)
    except InputError:
        literal = False
    return text if literal or '"' in text else f'"{text}"'


def search(gallery: Gallery, query: Query, k: int) -> SearchResult[Picture]:
    """Find the k pictures that fit a query best, without the pictures in the query itself."""
    if not query.composed:
        return gallery.search_images(query.terms[0].vector, k)
    judge, captions = gallery.judge, query.captions
    ood_captions: tuple[str, ...] = ()
    if judge and captions:
        embeds = torch.stack([term.vector for term in captions])
        flags = judge.cohort.is_out_of_distribution(embeds, "text_to_image").tolist()
        ood_captions = tuple(term.text for term, is_ood in zip(captions, flags, strict=True) if is_ood)
    unrelated = judge.cohort.image_embeds if judge else gallery.images.sample()
    own = [gallery.pictures.position(term.picture) for term in query.terms if term.picture]
    scored, considered = _best(gallery.images, query, unrelated, k + len(own))
    left_out = torch.tensor([position for position in own if position is not None], dtype=torch.int64)
    kept = ~torch.isin(considered, left_out)
    best, order = top_k(scored[kept], len(scored))
    ranked, competing = considered[kept][order], len(gallery.pictures) - int((~kept).sum())

    def assess(places: list[int]) -> MatchConfidence | None:
        if judge is None or not query.wanted_captions:
            return None
        if ood_captions:
            return MatchConfidence.out_of_distribution(len(places))
        return _assess(gallery.images[ranked], query, judge, places, competing)

    found = gallery.rank_images(best, ranked, k, assess)
    return replace(found, composed=True, ood_captions=ood_captions)


def _best(pictures: Modality[Picture], query: Query, unrelated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Score all pictures, or of many a part that includes the k best; returns scores and positions, ascending.

    The plus terms add up to the cosine with one direction, and minus terms only lower a score. So no picture outside
    the nearest to that direction can score higher than the last of these scores for the plus terms alone.
    """
    count = len(pictures)
    if count <= modality.LARGE:
        rows = torch.arange(count)
        return scores(query, pictures[rows], unrelated), rows
    wanted = Query(tuple(term for term in query.terms if term.wanted))
    parts = [term.vector * (term.weight / _units(term.vector, unrelated)[1]) for term in wanted.terms]
    direction = functional.normalize(torch.stack(parts).sum(0), dim=0)
    considered = max(_CONSIDERED, 2 * k)
    while True:
        considered = min(considered, count, _MAX_CONSIDERED)
        rows = pictures.search(direction, considered, considered)[1].sort().values
        embeds = pictures[rows]
        found, bound = scores(query, embeds, unrelated), scores(wanted, embeds, unrelated).min()
        if considered in (count, _MAX_CONSIDERED) or found.topk(min(k, len(found))).values[-1] >= bound:
            return found, rows
        considered *= _GROWTH


def scores(query: Query, pictures: Tensor, unrelated: Tensor) -> Tensor:
    """Score pictures, (n, embed_dim), for a composed query: a weighted sum of standardised cosines, (n,) float64.

    Captions and pictures lie in different cones, and the spread of their cosines over the same pictures differs. So
    each term's cosines are standardised by those with unrelated pictures, (num_unrelated, embed_dim). A minus term
    counts only above `MINUS_THRESHOLD`; subtracted in full, it would rank the pictures least like it above those that
    the plus terms ask for.
    """
    total = torch.zeros(len(pictures)).double()
    for term in query.terms:
        mean, spread = _units(term.vector, unrelated)
        standard = ((pictures.double() @ term.vector.double()) - mean) / spread
        total += term.weight * (standard if term.wanted else (standard - MINUS_THRESHOLD).clamp_min(0))
    return total


def _units(embed: Tensor, unrelated: Tensor) -> tuple[float, float]:
    """Mean and spread of a term's cosines with unrelated pictures, of which it may be one."""
    cosines = unrelated.double() @ embed.double()
    others = cosines[cosines < _SAME]
    if len(others) < _MIN_PICTURES:
        return 0.0, 1.0
    return others.mean().item(), max(others.std(correction=0).item(), _MIN_SPREAD)


def _assess(embeds: Tensor, query: Query, judge: MatchCalibrator, places: list[int], competing: int) -> MatchConfidence:
    """Rate the plus terms as one caption, and each minus term by itself, as if it were independent.

    Weights change the ranking only. Captions of one picture are far from independent: the product of their
    probabilities would be far too low.
    """
    curves = judge.calibration

    def evidence(embed: Tensor) -> Tensor:
        similarity = cosine_similarity(embed[None], embeds)
        return judge.cohort.evidence(similarity, embed[None], competing, "text_to_image")[0]

    captions = torch.stack([term.vector for term in query.wanted_captions])
    wanted = evidence(functional.normalize(captions.sum(0), dim=0))
    matches = curves.match["text_to_image"].probability(wanted)
    any_match = curves.any_match["text_to_image"].probability(wanted)
    for term in query.captions:
        if not term.wanted:
            absent = 1 - curves.match["text_to_image"].probability(evidence(term.vector))
            matches, any_match = matches * absent, any_match * absent
    thresholds = curves.thresholds["text_to_image"]
    return MatchConfidence.of(matches[places].float(), float(any_match.max()), thresholds)
