"""UI, API schemas: the shape of every answer. Gradio makes the schema of the API from these types."""

from typing import Any, TypedDict
from urllib.parse import quote

from torch import Tensor

from alignment.confidence import Verdict
from alignment.engine import Alignment
from alignment.gallery import Caption, Match, Picture, SearchResult
from alignment.similarity import match_probabilities
from alignment.ui.examples import THUMBNAIL_ROUTE

PLACES = 6  # decimals of a number in an answer; float32 has no more


class _Numbers(TypedDict):
    rank: int
    similarity: float
    share: float
    probability: float | None
    verdict: Verdict | None


class _Answer(TypedDict):
    verdict: Verdict | None
    fits: bool
    something_fits: float | None


class PictureMatch(_Numbers):
    """A picture that was found."""

    id: str
    captions: dict[str, str]
    credit: str
    thumbnail: str


class CaptionMatch(_Numbers):
    """A caption that was found."""

    id: str
    text: str
    lang: str


class PicturesFound(_Answer):
    """Answer of `search_images`."""

    matches: list[PictureMatch]


class CaptionsFound(_Answer):
    """Answer of `search_captions`."""

    matches: list[CaptionMatch]


class Matrix(TypedDict):
    """Answer of `similarity_matrix`."""

    similarity: list[list[float]]
    softmax_over_captions: list[list[float]]
    softmax_over_images: list[list[float]]
    sigmoid: list[list[float]] | None
    best_captions: list[int]
    best_images: list[int]


class Embeddings(TypedDict):
    """Answer of `embed_images` and `embed_captions`."""

    embeddings: list[list[float]]
    fingerprint: str


class Description(TypedDict):
    """Answer of `describe`."""

    model: str
    fingerprint: str
    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    images: int
    captions: int
    languages: list[str]
    calibrated: bool
    limits: dict[str, int]


def pictures_found(found: SearchResult[Picture]) -> PicturesFound:
    """Lay ranked pictures out."""
    matches: list[PictureMatch] = [
        {
            "id": match.item.id,
            "captions": dict(match.item.captions),
            "credit": match.item.credit,
            "thumbnail": THUMBNAIL_ROUTE.format(id=quote(match.item.id, safe="")),
            **_numbers(match),
        }
        for match in found.matches
    ]
    return {"matches": matches, **_answer(found)}


def captions_found(found: SearchResult[Caption]) -> CaptionsFound:
    """Lay ranked captions out."""
    matches: list[CaptionMatch] = [
        {"id": match.item.id, "text": match.item.text, "lang": match.item.lang, **_numbers(match)}
        for match in found.matches
    ]
    return {"matches": matches, **_answer(found)}


def matrix(scores: Alignment, logit_bias: float | None) -> Matrix:
    """Lay the scores of pictures against captions out."""
    logits = scores.logits_per_image
    pairs = None if logit_bias is None else rows(match_probabilities(logits, dim=1, logit_bias=logit_bias))
    return {
        "similarity": rows(scores.similarity),
        "softmax_over_captions": rows(match_probabilities(logits, dim=1)),
        "softmax_over_images": rows(match_probabilities(logits, dim=0)),
        "sigmoid": pairs,
        "best_captions": [int(row.argmax()) for row in scores.similarity],
        "best_images": [int(column.argmax()) for column in scores.similarity.T],
    }


def rows(table: Tensor) -> list[list[float]]:
    """Return a table as lists of rounded numbers."""
    return [[round(value, PLACES) for value in row] for row in table.tolist()]


def _numbers(match: Match[Any]) -> _Numbers:
    return {
        "rank": match.rank,
        "similarity": round(match.similarity, PLACES),
        "share": round(match.share, PLACES),
        "probability": None if match.probability is None else round(match.probability, PLACES),
        "verdict": match.verdict,
    }


def _answer(found: SearchResult[Any]) -> _Answer:
    chance = None if found.p_any_match is None else round(found.p_any_match, PLACES)
    return {"verdict": found.verdict, "fits": found.fits, "something_fits": chance}
