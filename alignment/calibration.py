"""Floor 2, how sure a match is: similarities judged against a stored background, and when to say that nothing fits.

Place in the flow: `similarity -> calibration (here) -> gallery -> page`. A cosine says little by itself: one query's
best is 0.5, another's junk is. What a query scores with unrelated items, its background, says how high it reaches by
accident, and the best of many candidates is high more easily than the best of a few. Two logistic curves per
direction, fitted on pairs and non-pairs, make a probability of that.

Source: cohort normalisation of scores, see Matejka et al., Analysis of Score Normalization in Multilingual Speaker
Recognition, Interspeech 2017 (the background is their cohort, `tail` their adaptive selection).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from alignment.similarity import cosine_similarity, top_k
from alignment.verdicts import Lines, Verdict, best

Direction = Literal["image_to_text", "text_to_image"]
"""Which way a search goes; the query comes first."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
TAIL = 5
"""Unrelated items that come closest to a query; their mean is what an accident reaches."""

REFUSED = 0.05
"""Share of the queries whose item is there that a fitted line may refuse."""

RESULTS = 10
"""Results of a search that the fit learns from."""

SIZES: Mapping[Direction, tuple[int, ...]] = {
    "image_to_text": (50, 150, 500, 2000),
    "text_to_image": (10, 30, 100, 400),
}
"""Candidates of the galleries drawn for the fit."""

_SMALLEST_SPREAD = 1e-4  # of cosines; below, the model scores everything alike
_NEAREST = 3  # nonsense around a query
_MISSING = -9.0  # no cosine
_ITERATIONS, _CLOSE = 100, 1e-9  # of Newton's method
_EVIDENCE = ("score", "tail", "mean", "log_size")


@dataclass(frozen=True, eq=False)
class Background:
    """Pictures and captions that have nothing to do with the query: what its scores are judged against.

    Any everyday pictures and captions do, as long as the same model embedded them. More of them, and from the field of
    the gallery, tell accidents from matches more sharply. They are kept with the calibration that was fitted on them.

    Attributes:
        image_embeds: (num_images, embed_dim), at least one.
        text_embeds: (num_texts, embed_dim), at least one.
        empty_image_embeds: (num_empty_images, embed_dim), of pictures of nothing; there may be none.
        nonsense_text_embeds: (num_nonsense_texts, embed_dim), of strings without meaning; there may be none.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    empty_image_embeds: Tensor | None = None
    nonsense_text_embeds: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(embeds.shape) for name, embeds in self.tensors().items()}
        one_width = {len(shape) for shape in shapes.values()} == {2} and len(
            {shape[1] for shape in shapes.values()}
        ) == 1
        if not one_width or not len(self.image_embeds) or not len(self.text_embeds):
            raise ValueError(f"A background needs pictures and captions, (n, embed_dim) of one width, not {shapes}.")

    def tensors(self) -> dict[str, Tensor]:
        """Lay it out for a safetensors file; `Background(**tensors)` undoes it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: embeds for name, embeds in found.items() if embeds is not None}

    @cached_property
    def units(self) -> dict[Direction, tuple[float, float]]:
        """Mean and spread of the cosines between unrelated items: what makes models comparable."""
        similarity = cosine_similarity(self.image_embeds, self.text_embeds).double()
        scores: dict[Direction, Tensor] = {"image_to_text": similarity, "text_to_image": similarity.T}
        return {
            direction: (matrix.mean().item(), max(matrix.std(1, correction=0).mean().item(), _SMALLEST_SPREAD))
            for direction, matrix in scores.items()
        }

    @cached_property
    def _unit(self) -> dict[str, Tensor]:
        """All of it with unit norm: once, and not for every query."""
        return {name: functional.normalize(embeds.float(), dim=-1) for name, embeds in self.tensors().items()}

    def is_senseless(self, query_embeds: Tensor, direction: Direction) -> Tensor:
        """Tell queries that lie among nonsense and empty pictures; (num_queries,) bool.

        Such a query is closer to them than to anything ordinary, and closer than half-way from what is ordinary to
        where they lie among themselves.
        """
        nonsense, ordinary, half_way = self._apart[direction]
        if nonsense is None:
            return torch.zeros(len(query_embeds), dtype=torch.bool)
        here = _nearness(query_embeds, nonsense)
        beyond = here > half_way  # hardly any query is, and then nobody need look at what is ordinary
        return beyond & (here > _nearness(query_embeds, ordinary)) if beyond.any() else beyond

    @cached_property
    def _apart(self) -> dict[Direction, tuple[Tensor | None, Tensor, float]]:
        """Nonsense, what is ordinary, and half-way between them; without enough nonsense there is none."""
        sides: dict[Direction, tuple[Tensor | None, Tensor]] = {
            "image_to_text": (self._unit.get("empty_image_embeds"), self._unit["image_embeds"]),
            "text_to_image": (self._unit.get("nonsense_text_embeds"), self._unit["text_embeds"]),
        }
        found: dict[Direction, tuple[Tensor | None, Tensor, float]] = {}
        for direction, (nonsense, ordinary) in sides.items():
            if nonsense is None or len(nonsense) <= _NEAREST:
                found[direction] = None, ordinary, 0.0
                continue
            # Each of them is nearest to itself, which does not count.
            inside = (nonsense @ nonsense.T).fill_diagonal_(-1).topk(_NEAREST).values.mean()
            found[direction] = nonsense, ordinary, float(inside + _nearness(ordinary, nonsense).mean()) / 2
        return found

    def evidence(
        self, similarity: Tensor, query_embeds: Tensor, num_candidates: int | Tensor, direction: Direction
    ) -> Tensor:
        """Put scores beside what is known of their query; all in units of the background.

        Args:
            similarity: (num_queries, num_results) cosines.
            query_embeds: (num_queries, embed_dim).
            num_candidates: how many were searched, one number or (num_queries,).
            direction: what the queries are.

        Returns:
            (num_queries, num_results, 4) float64: the score; the mean of the background's `TAIL` closest; the mean of
            all of it; the logarithm of the candidates.
        """
        background = self._unit["text_embeds" if direction == "image_to_text" else "image_embeds"]
        centre, spread = self.units[direction]
        unrelated = (_cosines(query_embeds, background).double() - centre) / spread
        sizes = torch.as_tensor(num_candidates, dtype=torch.double).clamp_min(1).log()
        of_query = (
            unrelated.topk(min(TAIL, len(background))).values.mean(1),
            unrelated.mean(1),
            sizes.expand(len(query_embeds)),
        )
        scores = (similarity.double() - centre) / spread
        return torch.stack([scores, *(column[:, None].expand_as(scores) for column in of_query)], dim=-1)


def _cosines(queries: Tensor, items: Tensor) -> Tensor:
    """Score queries against items that have unit norm already."""
    return functional.normalize(queries.float(), dim=-1) @ items.T


def _nearness(queries: Tensor, items: Tensor) -> Tensor:
    """Mean cosine with the nearest few items, which have unit norm."""
    return _cosines(queries, items).topk(min(_NEAREST, len(items))).values.mean(1)


@dataclass(frozen=True)
class Curve:
    """A logistic curve over the evidence: `sigmoid(score * evidence.score + ... + bias)`.

    Attributes:
        score: never negative, so a query's results keep their order.
        tail: of the background's mean of the closest.
        mean: of the background's mean.
        log_size: of the logarithm of the number of candidates.
        bias: what is added.
    """

    score: float
    tail: float
    mean: float
    log_size: float
    bias: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, astuple(self))) or self.score < 0:
            raise ValueError(f"A curve has finite coefficients, that of the score not negative, unlike {self}.")

    def probability(self, evidence: Tensor) -> Tensor:
        """Read the curve at (..., 4) evidence; float64, in [0, 1]."""
        weights = evidence.new_tensor([getattr(self, name) for name in _EVIDENCE])
        return (evidence @ weights + self.bias).sigmoid()

    @classmethod
    def fit(cls, evidence: Tensor, labels: Tensor, *, prior: Curve | None = None, strength: float = 1.0) -> Curve:
        """Find the most likely curve.

        Args:
            evidence: (n, 4).
            labels: (n,) bool or in [0, 1]: whether it was a match, or how likely.
            prior: what few examples stay close to; without one, no dependence on anything.
            strength: how firmly; many examples outweigh it.

        Raises:
            ValueError: without examples, or on evidence that is not finite.
        """
        if not len(evidence) or not evidence.isfinite().all():
            raise ValueError("A curve is fitted on at least one example, and the evidence must be finite.")
        start = torch.tensor(astuple(prior) if prior else (0.0,) * 5, dtype=torch.double)
        found = _logistic_regression(evidence.double(), labels.double(), start, strength)
        if found[0] < 0:  # better scores for worse matches: the score says nothing
            start[0] = 0
            blind = evidence.double() * evidence.new_tensor([0, 1, 1, 1], dtype=torch.double)
            found = _logistic_regression(blind, labels.double(), start, strength)
        return cls(*found.tolist())


@dataclass(frozen=True)
class Judgement:
    """What to think of the results of one query.

    Attributes:
        probabilities: (num_results,) float32, that this very result is a match; in the order of the scores.
        something_fits: probability that any candidate is a match.
        verdicts: of each result, in the order of the scores.
    """

    probabilities: Tensor
    something_fits: float
    verdicts: tuple[Verdict, ...]

    @classmethod
    def of(cls, probabilities: Tensor, something_fits: float, lines: Lines) -> Judgement:
        """Judge by the lines of a direction."""
        return cls(probabilities, something_fits, lines.verdicts(probabilities, something_fits))

    @classmethod
    def meaningless(cls, num_results: int) -> Judgement:
        """Judge the results of a query that is nonsense or an empty picture."""
        verdict: Verdict = "no_meaning"
        return cls(torch.zeros(num_results), 0.0, (verdict,) * num_results)

    @property
    def verdict(self) -> Verdict:
        """What to think of the whole answer."""
        return best(self.verdicts)


@dataclass(frozen=True)
class Calibration:
    """The curves of one model over one background.

    Attributes:
        match: direction -> probability that a result is a match.
        fits: direction -> probability, by the best result, that any candidate is a match.
        lines: direction -> where the verdicts begin.
    """

    match: Mapping[Direction, Curve]
    fits: Mapping[Direction, Curve]
    lines: Mapping[Direction, Lines]

    def __post_init__(self) -> None:
        if any(set(part) != set(DIRECTIONS) for part in (self.match, self.fits, self.lines)):
            raise ValueError(f"A calibration has curves and lines for {' and '.join(DIRECTIONS)}.")

    def probability(
        self,
        similarity: Tensor,
        query_embeds: Tensor,
        direction: Direction,
        *,
        num_candidates: int | Tensor,
        background: Background,
    ) -> Tensor:
        """Say how likely each result is a match, if it is even odds that the candidates hold one.

        Args:
            similarity: (num_queries, num_results) cosines.
            query_embeds: (num_queries, embed_dim).
            direction: what the queries are.
            num_candidates: how many were searched, one number or (num_queries,).
            background: the one it was fitted on, or for borrowed curves one like it.

        Returns:
            (num_queries, num_results) float64; for each query it rises with the similarity.
        """
        return self.match[direction].probability(
            background.evidence(similarity, query_embeds, num_candidates, direction)
        )

    def judge(
        self,
        similarity: Tensor,
        query_embed: Tensor,
        direction: Direction,
        *,
        num_candidates: int,
        background: Background,
    ) -> Judgement:
        """Judge the results of one query.

        Args:
            similarity: (num_results,) cosines; the best of all candidates must be among them.
            query_embed: (embed_dim,).
            direction: what the query is.
            num_candidates: how many were searched.
            background: as in `probability`.
        """
        if not len(similarity):
            return Judgement(torch.empty(0), 0.0, ())
        if background.is_senseless(query_embed[None], direction):
            return Judgement.meaningless(len(similarity))
        evidence = background.evidence(similarity[None], query_embed[None], num_candidates, direction)[0]
        found = float(self.fits[direction].probability(evidence[similarity.argmax()]))
        probabilities = self.match[direction].probability(evidence).float()
        return Judgement.of(probabilities, found, self.lines[direction])

    @classmethod
    def fit(
        cls,
        image_embeds: Tensor,
        text_embeds: Tensor,
        relevance: Tensor,
        background: Background,
        *,
        prior: Calibration | None = None,
        strength: float = 1.0,
        sizes: Mapping[Direction, Sequence[int]] = SIZES,
        seed: int = 0,
    ) -> Calibration:
        """Learn from captioned pictures that the model was not trained on.

        Every query searches galleries drawn from these items, of several sizes. In half of them the items made for
        it (relevance 1) are missing.

        Args:
            image_embeds: (num_images, embed_dim); some may have no caption.
            text_embeds: (num_texts, embed_dim).
            relevance: (num_images, num_texts) in [0, 1]: how likely the text describes the image; 1 for an image's own
                texts.
            background: none of these items.
            prior: curves to fall back on where there are few pairs, such as `BORROWED`.
            strength: how firmly, see `Curve.fit`.
            sizes: candidates of the galleries; those beyond the items at hand are searched as far as they go.
            seed: of the draws.

        Raises:
            ValueError: when no text describes an image.
        """
        similarity = cosine_similarity(image_embeds, text_embeds)
        ways: dict[Direction, tuple[Tensor, Tensor, Tensor]] = {
            "image_to_text": (similarity, relevance, image_embeds),
            "text_to_image": (similarity.T, relevance.T, text_embeds),
        }
        match, fits, lines = {}, {}, {}
        generator = torch.Generator().manual_seed(seed)
        for direction, (scores, truth, queries) in ways.items():
            asked = truth.amax(1) > 0
            if not asked.any():
                raise ValueError("There is no pair to calibrate on: no text describes an image.")
            searches = list(_searches(scores[asked], truth[asked], sizes[direction], generator))
            evidence = [background.evidence(s.similarity, queries[asked], s.sizes, direction) for s in searches]
            right = torch.cat([s.right for s in searches])
            old = (prior.match[direction], prior.fits[direction]) if prior else (None, None)
            seen = torch.cat([s.similarity for s in searches]) > _MISSING
            every, first = torch.cat(evidence), torch.cat(evidence)[:, 0]
            match[direction] = Curve.fit(every[seen], right[seen], prior=old[0], strength=strength)
            found = torch.cat([s.found for s in searches])
            fits[direction] = Curve.fit(first, found, prior=old[1], strength=strength)
            there = fits[direction].probability(first[found >= 0.5])
            lines[direction] = Lines.of(round(float(there.quantile(REFUSED)), 3) if len(there) else 0.5)
        return cls(match, fits, lines)

    def to_dict(self) -> dict[str, Any]:
        """Lay it out for JSON."""
        return {
            "match": {way: asdict(self.match[way]) for way in DIRECTIONS},
            "fits": {way: asdict(self.fits[way]) for way in DIRECTIONS},
            "lines": {way: asdict(self.lines[way]) for way in DIRECTIONS},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Undo `to_dict`; a single line, as older galleries have it, is that of `may_fit`.

        Raises:
            ValueError: on anything else.
        """
        try:
            match, fits = ({way: Curve(**data[part][way]) for way in DIRECTIONS} for part in ("match", "fits"))
            if set(data) != {"match", "fits", "lines"}:
                raise ValueError(f"This is no calibration: its parts are match, fits and lines, not {sorted(data)}.")
            return cls(match, fits, {way: _read_lines(data["lines"][way]) for way in DIRECTIONS})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no calibration: {error!r}.") from error


def _read_lines(written: Mapping[str, float] | float) -> Lines:
    return Lines(**written) if isinstance(written, Mapping) else Lines.of(float(written))


BORROWED = Calibration(
    match={
        "image_to_text": Curve(1.117, 0.201, -2.97, 0.003, -7.001),
        "text_to_image": Curve(1.096, -0.218, 0.257, -0.391, -3.141),
    },
    fits={
        "image_to_text": Curve(0.402, 0.088, -0.685, 0.275, -4.286),
        "text_to_image": Curve(1.271, -0.062, -0.042, -0.287, -3.547),
    },
    lines={"image_to_text": Lines.of(0.299), "text_to_image": Lines.of(0.421)},
)
"""The compact model's curves: how likely a person says that a caption describes a picture, fitted by
`tests/benchmarks/abstention.py` on dev photographs of Flickr8k, COCO and ADE20K. Another model may borrow them, in
units of a background of the same items. A weaker one must not keep them: they say too much of it, until a hundred
captioned pictures of one's own have been fitted on.
"""


# ---------------------------------------------------------------- the fit


@dataclass(frozen=True, eq=False)
class _Search:
    """Results of every query in a gallery drawn for it.

    Attributes:
        similarity: (num_queries, num_results), best first; `_MISSING` where a gallery is smaller than that.
        right: the same shape, how likely a result is a true one.
        found: (num_queries,) how likely the best candidate of all is one.
        sizes: (num_queries,) candidates.
    """

    similarity: Tensor
    right: Tensor
    found: Tensor
    sizes: Tensor


def _searches(
    similarity: Tensor, relevance: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> Iterator[_Search]:
    """Search galleries of each size, with the items made for a query (relevance 1) for a random half of the queries."""
    count, own = len(similarity), relevance >= 1
    for size in sizes:
        kept = torch.empty(count, dtype=torch.bool)
        kept[torch.randperm(count, generator=generator)] = torch.arange(count) % 2 == 0
        lots = torch.rand(relevance.shape, generator=generator).masked_fill(own, torch.inf)
        foreign = (size - own.sum(1) * kept).clamp_min(1).minimum(relevance.shape[1] - own.sum(1))
        drawn = torch.arange(relevance.shape[1]) < foreign[:, None]  # those with the smallest lots
        chosen = torch.zeros_like(own).scatter(1, lots.argsort(1), drawn) | (own & kept[:, None])
        values, ids = top_k(similarity.masked_fill(~chosen, _MISSING), RESULTS)
        right = relevance.gather(1, ids) * (values > _MISSING)
        yield _Search(values, right, (relevance * chosen).amax(1), chosen.sum(1))


def _logistic_regression(evidence: Tensor, labels: Tensor, start: Tensor, strength: float) -> Tensor:
    """Newton's method, damped, from `start` and held near it; (5,), the bias last.

    The columns are standardised within, so that `strength` means the same for each. What is constant stays at `start`.
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
