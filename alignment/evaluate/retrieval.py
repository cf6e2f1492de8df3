"""Recall in both directions over a data set, with intervals.

Place in the flow: `embedding -> ranks -> retrieval (here) -> report`. One query per image and one per caption, all
captions and images of the split as candidates, no prompt, no logit scale (it would change no rank). Figures that
trainers print over a batch, or with one caption per image, are easier to reach and cannot be compared with these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.evaluate.bootstrap import Bootstrap, Estimate, bootstrap, estimates
from alignment.evaluate.embedding import Embedded, Encoder, NamedProgress, embed_pairs
from alignment.evaluate.ranks import KS, query_ranks
from alignment.pairs import Pair


@dataclass(frozen=True)
class RetrievalReport:
    """How well images and captions of a data set find each other.

    Attributes:
        num_images: images that were queries and candidates.
        num_texts: the same for captions.
        metrics: for both directions `image_to_text` and `text_to_image` (the query comes first): `..._recall@1`, `@5`,
            `@10` in [0, 1], `..._recall_sum` of these, `..._median_rank` from 1; and `recall_sum`, of all six, in
            [0, 6] (papers print 100 times that).
    """

    num_images: int
    num_texts: int
    metrics: Mapping[str, Estimate]

    def __getitem__(self, name: str) -> float:
        return self.metrics[name].value


def evaluate_retrieval(
    encoder: Encoder,
    pairs: Sequence[Pair],
    *,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    progress: NamedProgress | None = None,
) -> RetrievalReport:
    """Measure recall in both directions over a data set.

    An image given twice is one with the captions of both; images without captions or that cannot be opened are left
    out and logged.

    Args:
        encoder: the model.
        pairs: all of them are candidates, so pass one split.
        resamples: bootstrap samples behind the intervals, see `evaluate_embeddings`; 0 is quick.
        seed: of the bootstrap.
        batch_size: images per forward pass.
        progress: called with ("images" or "captions", done, total).

    Raises:
        ValueError: when no image with a caption is left, or the embeddings are not finite.
    """
    embedded = embed_pairs(encoder, pairs, batch_size=batch_size, progress=progress)
    return evaluate_embedded(embedded, resamples=resamples, seed=seed)


def evaluate_embedded(embedded: Embedded, *, resamples: int = 1000, seed: int = 0) -> RetrievalReport:
    """Measure recall in both directions on a data set that is embedded already, see `evaluate_embeddings`."""
    measured = retrieval_bootstrap(embedded.ranks, embedded.image_of_text, resamples=resamples, seed=seed)
    return RetrievalReport(len(embedded.images), len(embedded.texts), estimates(measured))


def evaluate_embeddings(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, *, resamples: int = 1000, seed: int = 0
) -> RetrievalReport:
    """Measure recall in both directions between embeddings.

    Cosines within `ROUNDING` of each other are ties, and ties count against the model.

    Args:
        image_embeds: (num_images, embed_dim).
        text_embeds: (num_texts, embed_dim).
        image_of_text: (num_texts,) index of the image that each text describes; every image needs a text.
        resamples: bootstrap samples; images are drawn with their texts, the candidates stay. 0 gives no interval.
        seed: of the bootstrap; the same draws for every model, so that two reports can be compared.

    Raises:
        ValueError: when the embeddings are not finite, none, or an image has no text.
    """
    ranks = query_ranks(image_embeds, text_embeds, image_of_text)
    measured = retrieval_bootstrap(ranks, image_of_text, resamples=resamples, seed=seed)
    return RetrievalReport(len(image_embeds), len(image_of_text), estimates(measured))


def retrieval_bootstrap(ranks: Mapping[str, Tensor], image_of_text: Tensor, *, resamples: int, seed: int) -> Bootstrap:
    """Compute the metrics of a `RetrievalReport` as they are and over resampled images.

    Args:
        ranks: of `query_ranks`.
        image_of_text: (num_texts,) index of the image that each text describes.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    everyone = torch.arange(len(ranks["image_to_text"]))
    directions = [
        _Direction("image_to_text", ranks["image_to_text"], everyone),
        _Direction("text_to_image", ranks["text_to_image"], image_of_text),
    ]

    def statistics(draws: Tensor) -> dict[str, float]:
        figures = dict(item for direction in directions for item in direction.statistics(draws))
        figures["recall_sum"] = sum(figures[f"{direction.name}_recall_sum"] for direction in directions)
        return figures

    return bootstrap(statistics, len(everyone), resamples=resamples, seed=seed)


class _Direction:
    """Ranks of one direction in ascending order, ready to be weighed again and again."""

    def __init__(self, name: str, ranks: Tensor, images: Tensor) -> None:
        self.name = name
        self.ranks, order = ranks.sort()
        self.images = images[order]
        self.within = {k: int((ranks <= k).sum()) for k in KS}

    def statistics(self, draws: Tensor) -> Iterator[tuple[str, float]]:
        """Name the figures when image i is drawn `draws[i]` times, each with all its queries."""
        cumulative = draws[self.images].cumsum(0)
        total = int(cumulative[-1])
        recalls = {k: int(cumulative[count - 1]) / total if count else 0.0 for k, count in self.within.items()}
        for k, recall in recalls.items():
            yield f"{self.name}_recall@{k}", recall
        yield f"{self.name}_recall_sum", sum(recalls.values())
        # The lower median: the first rank that half of the queries do not exceed.
        yield f"{self.name}_median_rank", float(self.ranks[torch.searchsorted(cumulative, (total + 1) // 2)])


def report_table(report: RetrievalReport) -> str:
    """Lay a report out as text: recalls in percent with their 95 % intervals."""
    columns = [f"R@{k}" for k in KS]
    lines = [f"{'':14}" + "".join(f"{column:>21}" for column in [*columns, "sum", "median rank"])]
    for direction in ("image_to_text", "text_to_image"):
        cells = [_cell(report.metrics[f"{direction}_recall@{k}"], 100) for k in KS]
        cells.append(_cell(report.metrics[f"{direction}_recall_sum"], 100))
        cells.append(_cell(report.metrics[f"{direction}_median_rank"], 1, places=0))
        lines.append(f"{direction.replace('_', ' '):14}" + "".join(f"{cell:>21}" for cell in cells))
    lines.append(f"recall sum    {_cell(report.metrics['recall_sum'], 100):>21}")
    lines.append(f"{report.num_images} images, {report.num_texts} captions; in brackets 95 % intervals over images")
    return "\n".join(lines)


def _cell(estimate: Estimate, factor: int, places: int = 1) -> str:
    value, low, high = (f"{number * factor:.{places}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
