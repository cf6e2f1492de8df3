"""Floor 3, measurement: recall at k, first as a pure function, then of an encoder over a data set.

    python -m alignment.evaluate --model checkpoints/compact --data DATASET --split dev --json report.json

Place in the flow: `pairs + model -> evaluate (here) -> report`. The convention is CLIP_benchmark's: one query per image
and one per caption, all captions and images of the split as candidates, unit-norm embeddings compared in float32, no
prompt, no logit scale (it would change no rank). Figures that trainers print over a batch, or with one caption per
image, are easier to reach and cannot be compared with these.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from alignment.model import DualEncoder
from alignment.pairs import Pair, read_pairs
from alignment.preprocess import InputError, open_image
from alignment.similarity import cosine_similarity

logger = logging.getLogger(__name__)

KS = (1, 5, 10)
ROUNDING = 1e-6
"""Cosines closer than this are ties: float32 gives equal embeddings scores that differ in the last bits."""

_QUERIES_AT_ONCE = 1024  # rows of the similarity matrix that are in memory together

Progress = Callable[[int, int], None]


class Encoder(Protocol):
    """What is measured; `DualEncoder` is one."""

    def encode_images(self, images: Sequence[str], *, batch_size: int = 16, progress: Progress | None = None) -> Tensor:
        """Embed images, (n, embed_dim) float32 on the CPU."""

    def encode_texts(self, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
        """Embed captions, (n, embed_dim) float32 on the CPU."""


# ---------------------------------------------------------------- pure functions


def retrieval_ranks(similarity: Tensor, positives: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Rank of each query's best positive among the candidates that are none, from 1.

    Ties count against the query: every foreign candidate that scores no less stands before it. The query's other
    positives do not stand in its way.

    Args:
        similarity: (num_queries, num_candidates), any monotone score, higher is closer.
        positives: same shape, bool; several positives per query are allowed.
        tolerance: scores that differ by no more are ties, too.

    Returns:
        (num_queries,) int64.

    Raises:
        ValueError: on shapes that differ, non-finite scores, or a query without a positive.
    """
    if similarity.dim() != 2 or similarity.shape != positives.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"Scores and positives must be one (num_queries, num_candidates) matrix each, the second bool, not "
            f"{tuple(similarity.shape)} and {positives.dtype} {tuple(positives.shape)}."
        )
    if not similarity.isfinite().all():
        raise ValueError("The scores hold NaN or infinity; the model or its precision is broken.")
    if not positives.any(dim=1).all():
        raise ValueError("A query has no positive among the candidates; leave it out, it can never be found.")
    own = similarity.where(positives, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= own - tolerance) & ~positives).sum(dim=1) + 1


def recall_at_k(similarity: Tensor, positives: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """Share of queries that find at least one of their positives among the top k.

    Ties count against the model: a collapsed encoder that scores every pair equally earns 0, not 1. Two queries over
    four candidates, where the first finds its positive second and the other ties with a stranger for the third place:

        scores      .9  .8  .1  .0       positives   0 1 0 0       rank 2
                    .7  .6  .5  .5                   0 0 0 1       rank 4
        recall@1 = 0, recall@2 = 0.5, recall@3 = 0.5, recall@4 = 1

    Args:
        similarity: (num_queries, num_candidates), any monotone score, higher is closer.
        positives: same shape, bool; several positives per query are allowed.
        ks: cut-offs; one beyond the number of candidates is trivially met.

    Returns:
        k -> recall in [0, 1].

    Raises:
        ValueError: on shapes that differ, non-finite scores, a query without a positive, no query at all, or a k
            below 1.

    Source: hit-rate convention of CLIP_benchmark.
    """
    ranks = retrieval_ranks(similarity, positives)
    if len(ranks) == 0 or min(ks, default=1) < 1:
        raise ValueError(f"Recall needs at least one query and cut-offs from 1, not {len(ranks)} and {list(ks)}.")
    return {k: (ranks <= k).double().mean().item() for k in ks}


# ---------------------------------------------------------------- over a data set


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


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
    progress: Callable[[str, int, int], None] | None = None,
) -> RetrievalReport:
    """Measure recall in both directions over a data set.

    An image given twice is one with the captions of both; images without captions or that cannot be opened are left
    out and logged.

    Args:
        encoder: the model.
        pairs: all of them are candidates, so pass one split.
        resamples: bootstrap samples behind the intervals, see `evaluate_embeddings`.
        seed: of the bootstrap.
        batch_size: images per forward pass.
        progress: called with ("images" or "captions", done, total).

    Raises:
        ValueError: when no image with a caption is left, or the embeddings are not finite.
    """
    captioned = _captioned(pairs)
    images, image_embeds = _encode_images(encoder, list(captioned), batch_size, progress)
    texts = [caption for image in images for caption in captioned[image]]
    text_embeds = encoder.encode_texts(texts, progress=_named(progress, "captions"))
    owners = torch.repeat_interleave(torch.tensor([len(captioned[image]) for image in images]))
    return evaluate_embeddings(image_embeds, text_embeds, owners, resamples=resamples, seed=seed)


def evaluate_embeddings(
    image_embeds: Tensor, text_embeds: Tensor, owners: Tensor, *, resamples: int = 1000, seed: int = 0
) -> RetrievalReport:
    """Measure recall in both directions between embeddings.

    Cosines within `ROUNDING` of each other are ties, and ties count against the model.

    Args:
        image_embeds: (num_images, embed_dim).
        text_embeds: (num_texts, embed_dim).
        owners: (num_texts,) index of the image that each text describes; every image needs a text.
        resamples: bootstrap samples; images are drawn with their texts, the candidates stay. 0 gives no interval.
        seed: of the bootstrap; the same draws for every model, so that two reports can be compared.

    Raises:
        ValueError: when the embeddings are not finite, none, or an image has no text.
    """
    everyone = torch.arange(len(image_embeds))
    if len(everyone) == 0 or len(owners) != len(text_embeds) or owners.unique().tolist() != everyone.tolist():
        raise ValueError("Every text must belong to an image and every image must own a text, and there must be some.")
    directions = {
        "image_to_text": _Direction(_ranks(image_embeds, text_embeds, everyone, owners), everyone),
        "text_to_image": _Direction(_ranks(text_embeds, image_embeds, owners, everyone), owners),
    }
    return RetrievalReport(len(everyone), len(owners), _estimates(directions, len(everyone), resamples, seed))


def _captioned(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Map each image that has captions to all of them."""
    captions: dict[str, list[str]] = {}
    for pair in pairs:
        captions.setdefault(pair.image, []).extend(pair.captions)
    captioned = {image: texts for image, texts in captions.items() if texts}
    if not captioned:
        raise ValueError("There is no image with a caption to evaluate on; give a captioned data set.")
    if len(captioned) < len(captions):
        logger.warning("Left out %d images without a caption.", len(captions) - len(captioned))
    return captioned


def _encode_images(
    encoder: Encoder, images: list[str], batch_size: int, progress: Callable[[str, int, int], None] | None
) -> tuple[list[str], Tensor]:
    """Embed the images; if one cannot be opened, find and drop all of that kind and start again."""
    report = _named(progress, "images")
    try:
        return images, encoder.encode_images(images, batch_size=batch_size, progress=report)
    except InputError:
        images = [image for image in images if _opens(image)]
    if not images:
        raise ValueError("None of the images can be opened; check the data set.")
    return images, encoder.encode_images(images, batch_size=batch_size, progress=report)


def _opens(image: str) -> bool:
    try:
        open_image(image)
    except InputError as error:
        logger.warning("Left out %s: %s", image, error)
        return False
    return True


def _named(progress: Callable[[str, int, int], None] | None, name: str) -> Progress | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _ranks(queries: Tensor, candidates: Tensor, query_images: Tensor, candidate_images: Tensor) -> Tensor:
    """Rank block by block; a query and a candidate belong together if they belong to the same image."""
    blocks = zip(queries.split(_QUERIES_AT_ONCE), query_images.split(_QUERIES_AT_ONCE), strict=True)
    ranks = [
        retrieval_ranks(cosine_similarity(block, candidates), owners[:, None] == candidate_images, tolerance=ROUNDING)
        for block, owners in blocks
    ]
    return torch.cat(ranks)


class _Direction:
    """Ranks of one direction in ascending order, ready to be weighed again and again."""

    def __init__(self, ranks: Tensor, images: Tensor) -> None:
        self.ranks, order = ranks.sort()
        self.images = images[order]
        self.within = {k: int((ranks <= k).sum()) for k in KS}

    def statistics(self, name: str, draws: Tensor) -> Iterator[tuple[str, float]]:
        """Name the figures when image i is drawn `draws[i]` times, each with all its queries."""
        cumulative = draws[self.images].cumsum(0)
        total = int(cumulative[-1])
        recalls = {k: int(cumulative[count - 1]) / total if count else 0.0 for k, count in self.within.items()}
        for k, recall in recalls.items():
            yield f"{name}_recall@{k}", recall
        yield f"{name}_recall_sum", sum(recalls.values())
        # The lower median: the first rank that half of the queries do not exceed.
        yield f"{name}_median_rank", float(self.ranks[torch.searchsorted(cumulative, (total + 1) // 2)])


def _statistics(directions: Mapping[str, _Direction], draws: Tensor) -> dict[str, float]:
    figures = dict(item for name, direction in directions.items() for item in direction.statistics(name, draws))
    figures["recall_sum"] = sum(figures[f"{name}_recall_sum"] for name in directions)
    return figures


def _estimates(directions: Mapping[str, _Direction], num_images: int, resamples: int, seed: int) -> dict[str, Estimate]:
    """Compute the figures as they are and their 2.5th and 97.5th percentiles over resampled images."""
    figures = _statistics(directions, torch.ones(num_images, dtype=torch.long))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [value] if resamples == 0 else [] for name, value in figures.items()}
    for _ in range(resamples):
        draws = torch.randint(num_images, (num_images,), generator=generator).bincount(minlength=num_images)
        for name, value in _statistics(directions, draws).items():
            samples[name].append(value)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.double)
    intervals = {name: torch.tensor(values, dtype=torch.double).quantile(quantiles) for name, values in samples.items()}
    return {name: Estimate(value, *intervals[name].tolist()) for name, value in figures.items()}


# ---------------------------------------------------------------- command


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


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alignment.evaluate", description="Recall of a model on a data set."
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--revision", help="of a model on the Hub")
    parser.add_argument("--data", required=True, help="folder, annotation file, or Hub id of a captioned data set")
    parser.add_argument("--format", help="of the data set, if the one found is wrong (see alignment/pairs.py)")
    parser.add_argument("--split", help="train, dev or test; everything if left out")
    parser.add_argument("--device", help="cuda, mps or cpu; the best there is if left out")
    parser.add_argument("--batch-size", type=int, default=16, help="images per forward pass (16)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap samples for the intervals (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a model on a data set and print the figures."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def progress(what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    try:
        pairs = read_pairs(arguments.data, format=arguments.format, split=arguments.split)
        encoder = DualEncoder.load(arguments.model, revision=arguments.revision, device=arguments.device)
        report = evaluate_retrieval(
            encoder,
            pairs,
            resamples=arguments.resamples,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            progress=progress,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"evaluate: {error}") from error
    print(report_table(report))
    if arguments.json:
        settings = {
            name: getattr(arguments, name) for name in ("model", "revision", "data", "split", "resamples", "seed")
        }
        content = settings | {"fingerprint": encoder.fingerprint} | asdict(report)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
