"""Fit and read a logistic curve: from the features of a search result to the probability that it is a match.

Place in the flow: `cohort features -> curve (here) -> calibration`.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_ITERATIONS, _CLOSE = 100, 1e-9  # of Newton's method


@dataclass(frozen=True)
class Curve:
    """A logistic curve over the features of `Cohort.evidence`: `sigmoid(score * evidence.score + ... + bias)`."""

    score: float  # weight of the result's score; never negative, so a query's results keep their order
    tail: float  # weight of the mean over the cohort's closest items
    mean: float  # weight of the mean over the whole cohort
    log_size: float  # weight of the logarithm of the number of candidates
    bias: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, astuple(self))) or self.score < 0:
            raise ValueError(f"A curve has finite coefficients, that of the score not negative, unlike {self}.")

    def probability(self, evidence: Tensor) -> Tensor:
        """Evaluate the curve at (..., 4) evidence; float64, in [0, 1]."""
        weights = np.array([self.score, self.tail, self.mean, self.log_size])
        return torch.as_tensor(np.exp(-np.logaddexp(0, -(evidence.numpy() @ weights + self.bias))))

    @classmethod
    def fit(cls, evidence: Tensor, labels: Tensor, *, prior: Curve | None = None, strength: float = 1.0) -> Curve:
        """Fit the curve of maximum likelihood, regularised towards a prior.

        Args:
            evidence: (n, 4).
            labels: (n,) bool or in [0, 1]: whether it was a match, or how likely.
            prior: centre of the regularisation; a flat curve if left out.
            strength: weight of the prior; many examples outweigh it.

        Raises:
            ValueError: without examples, or on evidence that is not finite.
        """
        if not len(evidence) or not evidence.isfinite().all():
            raise ValueError("A curve is fitted on at least one example, and the evidence must be finite.")
        start = torch.tensor(astuple(prior) if prior else (0.0,) * 5, dtype=torch.double)
        found = logistic_regression(evidence.double(), labels.double(), start, strength)
        if found[0] < 0:  # better scores for worse matches: the score says nothing
            start[0] = 0
            blind = evidence.double() * evidence.new_tensor([0, 1, 1, 1], dtype=torch.double)
            found = logistic_regression(blind, labels.double(), start, strength)
        return cls(*found.tolist())


def logistic_regression(evidence: Tensor, labels: Tensor, start: Tensor, strength: float) -> Tensor:
    """Minimise the regularised log loss by damped Newton steps; returns (5,), the bias last.

    Columns are standardised first, so that `strength` means the same for each. The weight of a constant column stays
    at `start`.
    """
    mean, spread = evidence.mean(0), evidence.std(0, correction=0)
    spread = torch.where(spread > 1e-9, spread, 1.0)
    columns = torch.cat([(evidence - mean) / spread, torch.ones(len(labels), 1, dtype=torch.double)], dim=1)
    slopes = start[:-1] * spread
    anchor = torch.cat([slopes, (start[-1] + start[:-1] @ mean)[None]])
    weights, found = torch.full((5,), strength, dtype=torch.double), anchor.clone()

    def loss(point: Tensor) -> Tensor:
        logits = columns @ point
        return (functional.softplus(logits) - labels * logits).sum() + weights @ (point - anchor) ** 2 / 2

    for _ in range(_ITERATIONS):
        shares = (columns @ found).sigmoid()
        gradient = columns.T @ (shares - labels) + weights * (found - anchor)
        curvature = (columns * (shares * (1 - shares))[:, None]).T @ columns + weights.diag()
        step = torch.linalg.solve(curvature, gradient)
        while loss(found - step) > loss(found) and step.abs().max() > _CLOSE:
            step = step / 2
        found = found - step
        if step.abs().max() <= _CLOSE:
            break
    slopes = found[:-1] / spread
    return torch.cat([slopes, (found[-1] - slopes @ mean)[None]])
