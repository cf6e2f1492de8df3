"""Calibrate similarities: the probability that a result is a match, and that any candidate is one.

Place in the flow: `similarity + cohort -> calibration (here) -> gallery -> page`. The same cosine is a match for one
query and none for another. Two logistic curves per direction turn the score, the query's scores with unrelated items
(the cohort) and the number of candidates into a probability.

Source: cohort normalisation of scores, see Matejka et al., Analysis of Score Normalization in Multilingual Speaker
Recognition, Interspeech 2017 (`TAIL` is their adaptive selection).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from alignment.confidence.cohort import DIRECTIONS, Cohort, Direction
from alignment.confidence.curve import Curve
from alignment.similarity import cosine_similarity, top_k

Verdict = Literal["fits", "may_fit", "nothing_close", "no_meaning"]
"""Of a result or of a whole answer; `no_meaning`: the query is out of distribution (random text, a blank image)."""

Fetch: TypeAlias = Callable[[Tensor], Tensor]  # embeddings by position

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All verdicts, the best first."""

FITS_THRESHOLD = 0.5
"""Match probability from which a result fits, unless a calibration says otherwise."""

TARGET_FALSE_REJECTION = 0.05
"""Share of the queries with a match that a fitted threshold may reject."""

MIN_FITTED = 100
"""Captioned pictures below which `DEFAULT_CALIBRATION` is used."""

_MAX_FITTED = 1000  # captioned pictures; more only take longer
_MAX_CAPTIONS = 5  # of a picture
_RESULTS = 10  # of a search that the fit learns from
_SIZES: Mapping[Direction, tuple[int, ...]] = {
    "image_to_text": (50, 150, 500, 2000),
    "text_to_image": (10, 30, 100, 400),
}  # candidates of the galleries drawn for the fit
_MISSING = -9.0  # no cosine


@dataclass(frozen=True)
class Thresholds:
    """Match probabilities from which a result fits and may fit, for one direction.

    If the probability that any candidate is a match reaches `may_fit`, the likeliest result may fit in any case.
    """

    fits: float
    may_fit: float

    def __post_init__(self) -> None:
        if not 0 <= self.may_fit <= self.fits <= 1:
            raise ValueError(f"Thresholds are probabilities, `may_fit` not above `fits`, unlike {self}.")

    @classmethod
    def of(cls, may_fit: float) -> Thresholds:
        """Combine a `may_fit` threshold with the default `fits` threshold."""
        return cls(max(FITS_THRESHOLD, may_fit), may_fit)

    def verdict(self, probability: float) -> Verdict:
        """Return the verdict on one result."""
        return "fits" if probability >= self.fits else "may_fit" if probability >= self.may_fit else "nothing_close"

    def verdicts(self, probabilities: Tensor, p_any_match: float) -> tuple[Verdict, ...]:
        """Return the verdicts on the results of one query, from (num_results,) match probabilities."""
        chances = probabilities.tolist()
        found = [self.verdict(chance) for chance in chances]
        if p_any_match >= self.may_fit and best(found) == "nothing_close":
            likeliest = max(chances, default=0.0)
            found = ["may_fit" if chance == likeliest else "nothing_close" for chance in chances]
        return tuple(found)


def best(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a whole answer: that of its best result; `nothing_close` without results."""
    return min(verdicts, key=VERDICTS.index, default="nothing_close")


@dataclass(frozen=True)
class MatchConfidence:
    """Match probabilities and verdicts for the results of one query, in the order of the scores."""

    probabilities: Tensor  # (num_results,) float32, that this very result is a match
    p_any_match: float  # probability that any candidate is a match
    verdicts: tuple[Verdict, ...]

    @classmethod
    def of(cls, probabilities: Tensor, p_any_match: float, thresholds: Thresholds) -> MatchConfidence:
        """Derive the verdicts by the thresholds of a direction."""
        return cls(probabilities, p_any_match, thresholds.verdicts(probabilities, p_any_match))

    @classmethod
    def out_of_distribution(cls, num_results: int) -> MatchConfidence:
        """Rate the results of a query that is a random text or a blank image."""
        verdict: Verdict = "no_meaning"
        return cls(torch.zeros(num_results), 0.0, (verdict,) * num_results)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the whole answer."""
        return best(self.verdicts)


@dataclass(frozen=True)
class Calibration:
    """The curves of one model over one cohort, for each direction."""

    match: Mapping[Direction, Curve]  # probability that a result is a match
    any_match: Mapping[Direction, Curve]  # probability that any candidate is a match, read at the best result
    thresholds: Mapping[Direction, Thresholds]  # where the verdicts begin

    def __post_init__(self) -> None:
        if any(set(part) != set(DIRECTIONS) for part in (self.match, self.any_match, self.thresholds)):
            raise ValueError(f"A calibration has curves and thresholds for {' and '.join(DIRECTIONS)}.")

    @classmethod
    def fit(
        cls,
        image_embeds: Tensor,
        text_embeds: Tensor,
        relevance: Tensor,
        cohort: Cohort,
        *,
        prior: Calibration | None = None,
        strength: float = 1.0,
        seed: int = 0,
    ) -> Calibration:
        """Fit on captioned pictures that the model was not trained on.

        Every query searches galleries drawn from these items, of several sizes. In half of them its own items
        (relevance 1) are missing.

        Args:
            image_embeds: (num_images, embed_dim); some may have no caption.
            text_embeds: (num_texts, embed_dim).
            relevance: (num_images, num_texts) in [0, 1]: how likely the text describes the image; 1 for an image's own
                texts.
            cohort: holds none of these items.
            prior: regularises the fit where there are few pairs, such as `DEFAULT_CALIBRATION`.
            strength: weight of the prior, see `Curve.fit`.
            seed: of the draws.

        Raises:
            ValueError: when no text describes an image.
        """
        similarity = cosine_similarity(image_embeds, text_embeds)
        images, texts = (functional.normalize(embeds.float(), dim=-1) for embeds in (image_embeds, text_embeds))
        ways: dict[Direction, tuple[Tensor, Tensor, Tensor]] = {
            "image_to_text": (similarity, relevance, images),
            "text_to_image": (similarity.T, relevance.T, texts),
        }
        match: dict[Direction, Curve] = {}
        any_match: dict[Direction, Curve] = {}
        thresholds: dict[Direction, Thresholds] = {}
        generator = torch.Generator().manual_seed(seed)
        for direction, (scores, truth, queries) in ways.items():
            asked = truth.amax(1) > 0
            if not asked.any():
                raise ValueError("There is no pair to calibrate on: no text describes an image.")
            searches = list(draw_searches(scores[asked], truth[asked], _SIZES[direction], generator))
            similarities, right, found, _ = map(torch.cat, zip(*searches, strict=True))
            evidence = torch.cat([cohort.evidence(s.similarity, queries[asked], s.sizes, direction) for s in searches])
            old = (prior.match[direction], prior.any_match[direction]) if prior else (None, None)
            seen, first = similarities > _MISSING, evidence[:, 0]
            match[direction] = Curve.fit(evidence[seen], right[seen], prior=old[0], strength=strength)
            any_match[direction] = Curve.fit(first, found, prior=old[1], strength=strength)
            there = any_match[direction].probability(first[found >= 0.5])
            may_fit = round(float(there.quantile(TARGET_FALSE_REJECTION)), 3) if len(there) else 0.5
            thresholds[direction] = Thresholds.of(may_fit)
        return cls(match, any_match, thresholds)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that galleries hold."""
        parts: dict[str, Mapping[Direction, Any]]
        parts = {"match": self.match, "fits": self.any_match, "lines": self.thresholds}
        return {name: {way: asdict(part[way]) for way in DIRECTIONS} for name, part in parts.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Invert `to_dict`; a single number among the lines, as in older galleries, is `may_fit`.

        Raises ValueError on anything else.
        """
        try:
            match, any_match = ({way: Curve(**data[part][way]) for way in DIRECTIONS} for part in ("match", "fits"))
            if set(data) != {"match", "fits", "lines"}:
                raise ValueError(f"This is no calibration: its parts are match, fits and lines, not {sorted(data)}.")
            return cls(match, any_match, {way: _read_thresholds(data["lines"][way]) for way in DIRECTIONS})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"This is no calibration: {error!r}.") from error


def _read_thresholds(written: Mapping[str, float] | float) -> Thresholds:
    return Thresholds(**written) if isinstance(written, Mapping) else Thresholds.of(float(written))


DEFAULT_CALIBRATION = Calibration(
    match={
        "image_to_text": Curve(1.116, 0.177, -3.033, 0.008, -6.969),
        "text_to_image": Curve(1.114, -0.227, 0.313, -0.373, -3.198),
    },
    any_match={
        "image_to_text": Curve(0.376, 0.080, -0.661, 0.280, -4.236),
        "text_to_image": Curve(1.290, -0.084, 0.007, -0.254, -3.617),
    },
    thresholds={"image_to_text": Thresholds.of(0.295), "text_to_image": Thresholds.of(0.441)},
)
"""The compact model's curves: how likely a person says that a caption describes a picture, fitted by
`tests/benchmarks/abstention.py` on dev photographs of Flickr8k, COCO and ADE20K. They serve other models too, in units
of a cohort of the same items, until a gallery has a hundred captioned pictures to fit on. For a weaker model they
overstate the probabilities.
"""


# ---------------------------------------------------------------- the fit


class DrawnSearch(NamedTuple):
    """Results of every query in a gallery drawn for it."""

    similarity: Tensor  # (num_queries, num_results), best first; `_MISSING` where a gallery has fewer candidates
    right: Tensor  # the same shape, the relevance of each result
    found: Tensor  # (num_queries,) the highest relevance among all candidates
    sizes: Tensor  # (num_queries,) candidates


def draw_searches(
    similarity: Tensor, relevance: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> Iterator[DrawnSearch]:
    """Search a gallery of each size; a random half of the queries has its own items (relevance 1) in it."""
    count, own = len(similarity), relevance >= 1
    for size in sizes:
        kept = torch.empty(count, dtype=torch.bool)
        kept[torch.randperm(count, generator=generator)] = torch.arange(count) % 2 == 0
        lots = torch.rand(relevance.shape, generator=generator).masked_fill(own, torch.inf)
        foreign = (size - own.sum(1) * kept).clamp_min(1).minimum(relevance.shape[1] - own.sum(1))
        drawn = torch.arange(relevance.shape[1]) < foreign[:, None]  # those with the smallest lots
        chosen = torch.zeros_like(own).scatter(1, lots.argsort(1), drawn) | (own & kept[:, None])
        values, ids = top_k(similarity.masked_fill(~chosen, _MISSING), _RESULTS)
        right = relevance.gather(1, ids) * (values > _MISSING)
        yield DrawnSearch(values, right, (relevance * chosen).amax(1), chosen.sum(1))


# ---------------------------------------------------------------- a gallery's own calibration


@dataclass(frozen=True)
class MatchCalibrator:
    """A calibration with the cohort it was fitted on; `DEFAULT_CALIBRATION` with one of the same items."""

    calibration: Calibration
    cohort: Cohort

    @classmethod
    def restored(cls, calibration: Mapping[str, Any] | None, cohort: Mapping[str, Tensor]) -> MatchCalibrator | None:
        """Restore what a gallery holds; None where that is no calibration or no cohort; ValueError if it is damaged."""
        if calibration is None or not cohort:
            return None
        try:
            tensors = {name: embeds.float() for name, embeds in cohort.items()}
            return cls(Calibration.from_dict(calibration), Cohort(**tensors))
        except TypeError as error:
            raise ValueError(f"This is no cohort: {error}") from error

    def assess(
        self, similarity: Tensor, query_embed: Tensor, direction: Direction, num_candidates: int
    ) -> MatchConfidence:
        """Rate the results of one query, at even odds that the candidates hold a match.

        `similarity` (num_results,) are cosines, the best of all candidates among them; `query_embed` is (embed_dim,),
        unit norm.
        """
        if not len(similarity):
            return MatchConfidence(torch.empty(0), 0.0, ())
        if self.cohort.is_out_of_distribution(query_embed[None], direction):
            return MatchConfidence.out_of_distribution(len(similarity))
        evidence = self.cohort.evidence(similarity[None], query_embed[None], num_candidates, direction)[0]
        curves = self.calibration
        p_any_match = float(curves.any_match[direction].probability(evidence).max())  # that of the best result
        probabilities = curves.match[direction].probability(evidence).float()
        return MatchConfidence.of(probabilities, p_any_match, curves.thresholds[direction])


def fit_calibration(
    picture_ids: Sequence[str], scenes: Sequence[str], image_embeds: Fetch, text_embeds: Fetch, cohort: Cohort
) -> tuple[Calibration, str]:
    """Fit the curves on a gallery's own captioned pictures; below `MIN_FITTED` of them take `DEFAULT_CALIBRATION`.

    On pictures that the model was trained on, the probabilities come out too high.

    `image_embeds` and `text_embeds` return embeddings, (n, embed_dim), by positions: of pictures in `picture_ids`, and
    of captions that describe the pictures whose ids are in `scenes`; the cohort holds none of these items. The second
    value describes what it was fitted on.
    """
    own: dict[str, list[int]] = {id: [] for id in picture_ids}
    for row, scene in enumerate(scenes):
        if scene in own:
            own[scene].append(row)
    captioned = [row for row, id in enumerate(picture_ids) if own[id]]
    if len(captioned) < MIN_FITTED:
        return DEFAULT_CALIBRATION, "borrowed from the compact model"
    chosen = sorted(random.Random(0).sample(captioned, min(len(captioned), _MAX_FITTED)))
    texts = [(place, row) for place, image in enumerate(chosen) for row in own[picture_ids[image]][:_MAX_CAPTIONS]]
    owners, rows = torch.tensor(texts).T
    relevance = (owners[None] == torch.arange(len(chosen))[:, None]).float()
    images, captions = image_embeds(torch.tensor(chosen)).float(), text_embeds(rows).float()
    fitted = Calibration.fit(images, captions, relevance, cohort, prior=DEFAULT_CALIBRATION)
    return fitted, f"fitted on {len(chosen)} pictures with {len(rows)} captions of this gallery"
