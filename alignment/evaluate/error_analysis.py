"""The queries behind the figures: the worst, the ones that changed most, and labels that may be missing.

Place in the flow: `embedding -> examples (here) -> page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alignment.evaluate.embedding import Embedded
from alignment.evaluate.ranks import DIRECTIONS, ROUNDING, scored_blocks


@dataclass(frozen=True)
class Example:
    """A query with what each model answered.

    Attributes:
        direction: one of `DIRECTIONS`; of "image_to_text", the query is a path and the rest captions.
        query: the image or the caption.
        answer: of the candidates labelled right, the one the last model likes best.
        ranks: of the best right candidate, one per model.
        tops: what each model puts first.
    """

    direction: str
    query: str
    answer: str
    ranks: tuple[int, ...]
    tops: tuple[str, ...]


@dataclass(frozen=True)
class FalseNegative:
    """An image and a caption that are no pair in the data set, although the model finds them closer than the pairs.

    Attributes:
        image: path.
        caption: its own caption that the model likes best.
        rival: the caption of another image.
        margin: by how much the cosine with the rival exceeds both the image's with its best own caption and the
            rival's with its own image.
    """

    image: str
    caption: str
    rival: str
    margin: float


def worst_queries(embedded: Embedded, count: int) -> list[Example]:
    """Show the queries whose right answer ranks last, those that found it left out.

    Args:
        embedded: the data set by one model.
        count: how many of each direction, at most.
    """
    return [
        example
        for direction in DIRECTIONS
        for example in _examples(direction, _most(embedded.ranks[direction] - 1, count), [embedded])
    ]


def changed_queries(before: Embedded, after: Embedded, count: int) -> tuple[list[Example], list[Example]]:
    """Show the queries whose rank changed most, as a ratio: from 8 to 1 is more than from 800 to 400.

    Args:
        before: the data set by model A.
        after: the same by model B.
        count: how many of each direction and kind, at most.

    Returns:
        Those that got better, and those that got worse.
    """
    better, worse = [], []
    for direction in DIRECTIONS:
        gains = before.ranks[direction].log() - after.ranks[direction].log()
        better += _examples(direction, _most(gains, count), [before, after])
        worse += _examples(direction, _most(-gains, count), [before, after])
    return better, worse


def suspected_false_negatives(embedded: Embedded, count: int) -> list[FalseNegative]:
    """Show unlabelled pairs that score above the labelled ones of both their image and their caption.

    Args:
        embedded: the data set by one model.
        count: how many, at most; one per image.

    Returns:
        By margin, the widest first.
    """
    sides = (embedded.image_embeds, torch.arange(len(embedded.images))), (embedded.text_embeds, embedded.image_of_text)
    units = [functional.normalize(embeds.float(), dim=-1) for embeds, _ in sides]
    of_texts = (units[0][embedded.image_of_text] * units[1]).sum(dim=-1)
    found = [_rivals(scores, positives, of_texts) for _, scores, positives in scored_blocks(*sides)]
    margins, owns, rivals = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
    return [
        FalseNegative(
            embedded.images[image], embedded.texts[owns[image]], embedded.texts[rivals[image]], margins[image]
        )
        for image in _most(torch.tensor(margins) - ROUNDING, count)
    ]


def _rivals(scores: Tensor, positives: Tensor, of_texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each image: the widest margin of a foreign caption, the best own caption, and that foreign caption."""
    own, owns = scores.where(positives, -torch.inf).max(dim=1)
    margins = (scores - own[:, None]).minimum(scores - of_texts).where(~positives, -torch.inf)
    widest, rivals = margins.max(dim=1)
    return widest, owns, rivals


def _most(amounts: Tensor, count: int) -> list[int]:
    """Where the largest positive amounts are, the largest first, and of equals the first."""
    order = amounts.argsort(descending=True, stable=True)[:count]
    return [int(index) for index in order if amounts[index] > 0]


def _examples(direction: str, queries: Sequence[int], models: Sequence[Embedded]) -> list[Example]:
    """Look up what each model answers to some queries; the score matrix is computed for these alone."""
    rows = torch.tensor(queries, dtype=torch.long)
    answers = [_answers(direction, rows, model) for model in models]
    last = models[-1]
    asked, offered = (last.images, last.texts) if direction == "image_to_text" else (last.texts, last.images)
    return [
        Example(
            direction,
            asked[query],
            offered[answers[-1][0][place]],
            tuple(int(model.ranks[direction][query]) for model in models),
            tuple(offered[tops[place]] for _, tops in answers),
        )
        for place, query in enumerate(queries)
    ]


def _answers(direction: str, rows: Tensor, model: Embedded) -> tuple[list[int], list[int]]:
    """For some queries: the best right candidate, and the best of all (among equals a wrong one, as ranks count)."""
    images, texts = (model.image_embeds, torch.arange(len(model.images))), (model.text_embeds, model.image_of_text)
    (embeds, of), candidates = (images, texts) if direction == "image_to_text" else (texts, images)
    right: list[int] = []
    tops: list[int] = []
    for _, scores, positives in scored_blocks((embeds[rows], of[rows]), candidates):
        right += scores.where(positives, -torch.inf).argmax(dim=1).tolist()
        tops += (scores - ROUNDING * positives).argmax(dim=1).tolist()
    return right, tops
