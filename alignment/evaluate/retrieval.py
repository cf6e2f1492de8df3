"""Recall in both directions over a data set, with intervals, and the difference between two models.

Place in the flow: `embedding -> retrieval (here) -> report`. One query per image and one per caption, all
captions and images of the split as candidates, no prompt, no logit scale (it would change no rank). Recalls over a
batch, or with one caption per image, are higher and cannot be compared with these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from alignment.evaluate.embedding import Embedded
from alignment.evaluate.ranks import DIRECTIONS, KS

Statistics = Callable[[Tensor], Mapping[str, Tensor]]
"""Metrics by name, each (num_draws,) float64, when draw d has image i `draws[d, i]` times; draws is int64."""

Sampled = Mapping[str, tuple[float, Tensor]]
"""Metrics by name: of the data set, and of its resamples, (num_resamples,) float64; without these the value alone."""

_NUMBERS_AT_ONCE = 2**16  # of draws times images: draws of small data sets are computed together, and all stay in cache
LOWER_IS_BETTER = "median_rank"  # suffix of the metrics that are better when low


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A metric of model A (`before`) and B (`after`), and B minus A with its paired 95 % bootstrap interval.

    A gain of a median rank is negative. `p_not_better` is the share of resamples in which B is no better than A, in
    [0, 1]; without resamples 0 or 1.
    """

    before: float
    after: float
    value: float
    low: float
    high: float
    p_not_better: float


Metric = TypeVar("Metric", Estimate, Difference)


@dataclass(frozen=True)
class RetrievalReport(Generic[Metric]):
    """Retrieval metrics of one model (`Estimate`), or the differences between two (`Difference`).

    The metrics are for both directions `image_to_text` and `text_to_image` (the query comes first): `..._recall@1`,
    `@5`, `@10` in [0, 1], `..._recall_sum` of these, `..._median_rank` from 1; and `recall_sum`, of all six, in [0, 6]
    (papers print 100 times that).
    """

    num_images: int
    num_texts: int
    metrics: Mapping[str, Metric]

    def __getitem__(self, name: str) -> float:
        return self.metrics[name].value


def evaluate_embeddings(
    image_embeds: Tensor, text_embeds: Tensor, image_of_text: Tensor, *, resamples: int = 1000, seed: int = 0
) -> RetrievalReport[Estimate]:
    """Measure recall in both directions between embeddings; ties, cosines within `ROUNDING`, count against the model.

    Embeddings are (num_images, embed_dim) and (num_texts, embed_dim); `image_of_text` (num_texts,) is the index of the
    image that each text describes. The bootstrap draws the same for every model; without `resamples` there is no
    interval. Raises ValueError on non-finite embeddings, no embeddings, or an image without a text.
    """
    names = [""] * len(image_embeds), [""] * len(text_embeds)
    embedded = Embedded(*names, image_of_text, image_embeds, text_embeds)
    return evaluate_embedded(embedded, resamples=resamples, seed=seed)


def evaluate_embedded(embedded: Embedded, *, resamples: int = 1000, seed: int = 0) -> RetrievalReport[Estimate]:
    """Measure recall in both directions on an embedded data set, see `evaluate_embeddings`."""
    sampled = _bootstrap(embedded, resamples, seed)
    return RetrievalReport(len(embedded.images), len(embedded.texts), estimates(sampled))


def compare_retrieval(
    before: Embedded, after: Embedded, *, resamples: int = 1000, seed: int = 0
) -> RetrievalReport[Difference]:
    """Subtract model A (`before`) from model B (`after`); raises ValueError on different images or captions."""
    is_same = list(before.images) == list(after.images) and list(before.texts) == list(after.texts)
    if not is_same or not torch.equal(before.image_of_text, after.image_of_text):
        raise ValueError("The two models were given different images or captions; compare them on the same.")
    sampled = (_bootstrap(model, resamples, seed) for model in (before, after))
    return RetrievalReport(len(before.images), len(before.texts), differences(*sampled))


def _bootstrap(embedded: Embedded, resamples: int, seed: int) -> Sampled:
    sides = zip(embedded.ranks.items(), embedded.sides, strict=True)
    directions = [_statistics(name, ranks, images) for (name, ranks), (_, images) in sides]

    def statistics(draws: Tensor) -> dict[str, Tensor]:
        found = {name: values for direction in directions for name, values in direction(draws).items()}
        return found | {"recall_sum": torch.stack([found[f"{name}_recall_sum"] for name in DIRECTIONS]).sum(0)}

    return bootstrap(statistics, len(embedded.images), resamples=resamples, seed=seed)


def _statistics(direction: str, ranks: Tensor, images: Tensor) -> Statistics:
    """Prepare one direction: with the ranks in ascending order, a resample costs one cumulative sum."""
    ascending, order = ranks.sort()
    images = images[order]
    within = {k: int((ranks <= k).sum()) for k in KS}

    def statistics(draws: Tensor) -> dict[str, Tensor]:
        cumulative = draws[:, images].cumsum(1)
        totals = cumulative[:, -1:]
        hits = {k: cumulative[:, count - 1] if count else torch.zeros(len(draws)) for k, count in within.items()}
        recalls = {k: found.double() / totals[:, 0] for k, found in hits.items()}
        found = {f"{direction}_recall@{k}": recall for k, recall in recalls.items()}
        # The lower median: the first rank that half of the queries do not exceed.
        medians = ascending[torch.searchsorted(cumulative, (totals + 1) // 2)[:, 0]].double()
        sums = torch.stack(list(recalls.values())).sum(0)
        return found | {f"{direction}_recall_sum": sums, f"{direction}_median_rank": medians}

    return statistics


def bootstrap(statistics: Statistics, num_images: int, *, resamples: int, seed: int) -> Sampled:
    """Compute metrics of a data set, and of `resamples` draws of images, each with all its queries; candidates stay.

    The draws depend on `num_images` and `seed` alone. So two models measured on one data set are paired, and the
    interval of their difference is narrower than their own intervals suggest.
    """
    values = statistics(torch.ones(1, num_images, dtype=torch.long))
    generator = torch.Generator().manual_seed(seed)
    num_draws = max(1, _NUMBERS_AT_ONCE // num_images)
    parts = []
    for first in range(0, resamples, num_draws):
        shape = min(num_draws, resamples - first), num_images
        images = torch.randint(num_images, shape, generator=generator)
        counts = torch.zeros(shape, dtype=torch.long).scatter_add_(1, images, torch.ones_like(images))
        parts.append(statistics(counts))
    samples = {name: torch.cat([part[name] for part in parts or [values]]) for name in values}
    return {name: (value.item(), samples[name]) for name, value in values.items()}


def estimates(sampled: Sampled) -> dict[str, Estimate]:
    """Add an interval to each metric."""
    return {name: Estimate(value, *_interval(samples)) for name, (value, samples) in sampled.items()}


def differences(before: Sampled, after: Sampled) -> dict[str, Difference]:
    """Subtract model A (`before`) from model B (`after`) draw by draw; both need the same resamples and seed."""
    found = {}
    for name, (old, old_samples) in before.items():
        new, new_samples = after[name]
        gains = new_samples - old_samples
        better = gains < 0 if name.endswith(LOWER_IS_BETTER) else gains > 0
        found[name] = Difference(old, new, new - old, *_interval(gains), (~better).double().mean().item())
    return found


def _interval(samples: Tensor) -> tuple[float, float]:
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def report_table(report: RetrievalReport[Estimate]) -> str:
    """Format a report as text: recalls in percent with their 95 % intervals."""

    def row(title: str, *names: str) -> str:
        cells = (" ".join(estimate_cells(name, report.metrics[name])) for name in names)
        return f"{title:14}" + "".join(f"{cell:>21}" for cell in cells)

    columns = [*(f"R@{k}" for k in KS), "sum", "median rank"]
    suffixes = [*(f"recall@{k}" for k in KS), "recall_sum", LOWER_IS_BETTER]
    return "\n".join([
        f"{'':14}" + "".join(f"{column:>21}" for column in columns),
        *(row(side.replace("_", " "), *(f"{side}_{suffix}" for suffix in suffixes)) for side in DIRECTIONS),
        row("recall sum", "recall_sum"),
        f"{report.num_images} images, {report.num_texts} captions; in brackets 95 % intervals over images",
    ])  # fmt: skip


def difference_table(metrics: Mapping[str, Difference]) -> str:
    """Format differences as text, shares in percent: A, B, B - A with its interval, and `p_not_better`."""
    lines = [f"{'':26}{'A':>8}{'B':>8}{'B - A':>8}   {'95 % interval':18}{'B not better':>12}"]
    for name, found in metrics.items():
        before, after, gain, interval = difference_cells(name, found)
        figures = f"{before:>8}{after:>8}{gain:>8}   {interval:18}{found.p_not_better:>12.1%}"
        lines.append(f"{metric_title(name):26}{figures}")
    return "\n".join(lines)


def difference_cells(name: str, found: Difference) -> list[str]:
    """Format A, B, the difference and its interval, shares in percent."""
    return [*_cells(name, "", found.before, found.after), *estimate_cells(name, found, "+")]


def estimate_cells(name: str, found: Estimate | Difference, sign: str = "") -> list[str]:
    """Format a value and its interval, shares in percent; `sign` is "+" for differences."""
    value, low, high = _cells(name, sign, found.value, found.low, found.high)
    return [value, f"[{low}, {high}]"]


def _cells(name: str, sign: str, *values: float) -> list[str]:
    factor, places = (1, 0) if name.endswith(LOWER_IS_BETTER) else (100, 1)
    return [f"{round(value * factor, places) + 0.0:{sign}.{places}f}" for value in values]  # + 0.0: no "-0.0"


def metric_title(name: str) -> str:
    """Return the display name of a metric: `image_to_text_recall@1` is "image to text R@1"."""
    return name.replace("recall@", "R@").replace("zero_shot_top", "zero-shot top-").replace("_", " ")
