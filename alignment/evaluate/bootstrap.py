"""Intervals by resampling images: of a figure, and of what one model has over another.

Place in the flow: `hits and ranks -> bootstrap (here) -> retrieval, zero_shot, compare`. The images are drawn, each
with all its queries, and the candidates stay. A seed stands for the same draws whatever the model, so two models
measured on one data set are paired, and the interval of their difference is far narrower than their own two suggest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Statistics = Callable[[Tensor], Mapping[str, float]]
"""Figures by name when image i is drawn `draws[i]` times; draws is (num_images,) int64."""

LOWER_IS_BETTER = "median_rank"
"""How the name of a figure ends that is better when it is low."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What a figure gains from model A to model B.

    Attributes:
        before: the figure of A.
        after: the figure of B.
        value: after minus before; of a median rank, a gain is negative.
        low: lower end of the paired 95 % bootstrap interval of `value`.
        high: its upper end.
        p_not_better: share of resamples in which B is no better than A, in [0, 1]. Without resamples 0 or 1.
    """

    before: float
    after: float
    value: float
    low: float
    high: float
    p_not_better: float


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Figures as they are, and what they were over resampled images.

    Attributes:
        figures: name -> value.
        samples: name -> (num_resamples,) float64; the value alone if there was no resampling.
    """

    figures: Mapping[str, float]
    samples: Mapping[str, Tensor]


def bootstrap(statistics: Statistics, num_images: int, *, resamples: int, seed: int) -> Bootstrap:
    """Compute figures as they are and over resampled images.

    Args:
        statistics: the figures of a sample.
        num_images: images to draw from, and to draw.
        resamples: how often; 0 for the figures alone.
        seed: of the draws; they depend on nothing else but `num_images`.
    """
    figures = statistics(torch.ones(num_images, dtype=torch.long))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [value] if resamples == 0 else [] for name, value in figures.items()}
    for _ in range(resamples):
        draws = torch.randint(num_images, (num_images,), generator=generator).bincount(minlength=num_images)
        for name, value in statistics(draws).items():
            samples[name].append(value)
    return Bootstrap(figures, {name: torch.tensor(values, dtype=torch.double) for name, values in samples.items()})


def estimates(one: Bootstrap) -> dict[str, Estimate]:
    """Put an interval around each figure."""
    return {name: Estimate(value, *_interval(one.samples[name])) for name, value in one.figures.items()}


def differences(before: Bootstrap, after: Bootstrap) -> dict[str, Difference]:
    """Compare two models draw by draw; both must have been resampled alike.

    Args:
        before: of model A.
        after: of model B.
    """
    found = {}
    for name, old in before.figures.items():
        new, gains = after.figures[name], after.samples[name] - before.samples[name]
        better = gains < 0 if name.endswith(LOWER_IS_BETTER) else gains > 0
        found[name] = Difference(old, new, new - old, *_interval(gains), (~better).double().mean().item())
    return found


def _interval(samples: Tensor) -> tuple[float, float]:
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high
