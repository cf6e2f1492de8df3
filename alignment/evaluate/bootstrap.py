"""Bootstrap intervals over images, of a metric and of the difference between two models.

Place in the flow: `ranks -> bootstrap (here) -> retrieval, zero_shot`. Images are resampled, each with all its
queries; the candidates stay. A seed gives the same draws for every model, so two models measured on one data set are
paired, and the interval of their difference is narrower than their own intervals suggest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Statistics = Callable[[Tensor], Mapping[str, float]]
"""Metrics by name when image i is drawn `draws[i]` times; draws is (num_images,) int64."""

Sampled = Mapping[str, tuple[float, Tensor]]
"""Metrics by name: of the data set, and of its resamples, (num_resamples,) float64; without these the value alone."""

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


def bootstrap(statistics: Statistics, num_images: int, *, resamples: int, seed: int) -> Sampled:
    """Compute metrics of a data set, and of `resamples` draws that depend on `num_images` and `seed` alone."""
    values = statistics(torch.ones(num_images, dtype=torch.long))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [] if resamples else [value] for name, value in values.items()}
    for _ in range(resamples):
        draws = torch.randint(num_images, (num_images,), generator=generator).bincount(minlength=num_images)
        for name, value in statistics(draws).items():
            samples[name].append(value)
    return {name: (value, torch.tensor(samples[name], dtype=torch.double)) for name, value in values.items()}


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
