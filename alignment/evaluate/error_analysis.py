"""Queries behind the metrics: the worst, those that changed most, and suspected false negatives.

Place in the flow: `embedding -> error_analysis (here) -> html_report`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alignment.evaluate.embedding import Embedded
from alignment.evaluate.ranks import DIRECTIONS, ROUNDING, scored_blocks
from alignment.similarity import cosine_similarity


@dataclass(frozen=True)
class Example:
    """A query with the answers of one or two models; an image is a path."""

    direction: str  # one of `DIRECTIONS`
    query: str
    answer: str  # the positive that the last model scores highest
    ranks: tuple[int, ...]  # of the best positive, one per model
    tops: tuple[str, ...]  # the first candidate of each model


@dataclass(frozen=True)
class FalseNegative:
    """An image and the caption of another (`rival`) that score above the labelled pairs of both.

    `caption` is the best-scored of the image's own captions. `margin` is by how much the cosine with the rival exceeds
    both the image's with that caption and the rival's with its own image.
    """

    image: str
    caption: str
    rival: str
    margin: float


def worst_queries(embedded: Embedded, count: int) -> list[Example]:
    """Select at most `count` queries of each direction whose answer ranks last, those at rank 1 left out."""
    last = {direction: _largest(embedded.ranks[direction] - 1, count) for direction in DIRECTIONS}
    return [example for direction, queries in last.items() for example in _examples(direction, queries, [embedded])]


def changed_queries(before: Embedded, after: Embedded, count: int) -> tuple[list[Example], list[Example]]:
    """Select at most `count` queries of each direction that got better from model A to B most, and that got worse most.

    Changes of the rank are ratios: from 8 to 1 is more than from 800 to 400.
    """
    better, worse = [], []
    for direction in DIRECTIONS:
        gains = before.ranks[direction].log() - after.ranks[direction].log()
        better += _examples(direction, _largest(gains, count), [before, after])
        worse += _examples(direction, _largest(-gains, count), [before, after])
    return better, worse


def suspected_false_negatives(embedded: Embedded, count: int) -> list[FalseNegative]:
    """Select at most `count` images with such a caption, one caption each, the widest margin first."""
    images, texts = (functional.normalize(embeds.float(), dim=-1) for embeds, _ in embedded.sides)
    text_scores = (images[embedded.image_of_text] * texts).sum(dim=-1)  # of the captions with their own images
    found = [_rivals(scores, positives, text_scores) for _, scores, positives in scored_blocks(*embedded.sides)]
    margins, owns, rivals = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
    names = embedded.texts
    return [
        FalseNegative(embedded.images[image], names[owns[image]], names[rivals[image]], margins[image])
        for image in _largest(torch.tensor(margins) - ROUNDING, count)
    ]


def _rivals(scores: Tensor, positives: Tensor, text_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each image the widest margin of a negative, the best own caption, and that negative."""
    own_scores, owns = scores.where(positives, -torch.inf).max(dim=1)
    margins = (scores - own_scores[:, None]).minimum(scores - text_scores).where(~positives, -torch.inf)
    widest, rivals = margins.max(dim=1)
    return widest, owns, rivals


def _largest(values: Tensor, count: int) -> list[int]:
    """Return the indices of the largest positive values in descending order, the first of equals first."""
    order = values.argsort(descending=True, stable=True)[:count]
    return [int(index) for index in order if values[index] > 0]


def _examples(direction: str, queries: Sequence[int], models: Sequence[Embedded]) -> list[Example]:
    """Look up the answers of each model to some queries; only their rows of the score matrix are computed."""
    by_image, last, rows = direction == DIRECTIONS[0], models[-1], torch.tensor(queries, dtype=torch.long)
    asked, offered = (last.images, last.texts) if by_image else (last.texts, last.images)
    tops = []
    for model in models:
        (embeds, images), candidates = model.sides if by_image else model.sides[::-1]
        scores, positives = cosine_similarity(embeds[rows], candidates[0]), images[rows, None] == candidates[1]
        best = scores.where(positives, -torch.inf).argmax(dim=1).tolist()
        tops.append((scores - ROUNDING * positives).argmax(dim=1).tolist())  # a negative comes first among equals
    ranks = [model.ranks[direction][rows].tolist() for model in models]
    answers = zip(queries, best, zip(*ranks, strict=True), zip(*tops, strict=True), strict=True)
    return [
        Example(direction, asked[query], offered[answer], of_models, tuple(offered[top] for top in firsts))
        for query, answer, of_models, firsts in answers
    ]
