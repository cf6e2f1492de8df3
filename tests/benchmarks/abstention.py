"""Measure what probabilities and verdicts are worth: `python tests/benchmarks/abstention.py --data FOLDER ...`.

A caption counts as right for a photograph by how close it is in meaning to what people wrote of it: the cosine of a
sentence encoder with the nearest of the photograph's own captions, turned into a probability by a line that is fitted
on pairs judged by eye (`assets/caption_verdicts.jsonl`: 2, all that is said is there; 1, a person who searched for it
would accept the picture, though a side detail is wrong or not to be seen; 0, the main thing, what it does or the place
is wrong; 1 and 2 fit). Dev photographs search the starter gallery's captions, their captions search the photographs.
For the latter the line is fitted anew, on graded pairs of a caption and another photograph than its own that a search
found. The curves are fitted on one half of the photographs and measured on the other, both ways; the lines on all
pairs, and what is "right" is what they say. Intervals are 95 %, over photographs drawn with all their queries. `--save`
fits on all of them; the result is `DEFAULT_CALIBRATION` of `alignment/confidence/calibration.py`. Nonsense, empty
pictures, and captions that share no content word with those of the starter pictures are to be refused.
Needs the extra `compact` (the sentence encoders); `--diagram` also needs `train`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.compact.features import teacher_embeddings
from alignment.compact.scenes import LANGUAGES, Photo, read_photos
from alignment.confidence import (
    DIRECTIONS,
    Calibration,
    Cohort,
    Direction,
    MatchCalibrator,
    Thresholds,
    build_cohort,
)
from alignment.confidence.calibration import TARGET_FALSE_REJECTION, draw_searches
from alignment.confidence.curve import Curve, logistic_regression
from alignment.gallery.records import read_hand_written
from alignment.model import DualEncoder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "assets" / "gallery" / "sources"
VERDICTS = ROOT / "assets" / "caption_verdicts.jsonl"
SENTENCE_ENCODERS = {"en": "mpnet", "zh": "e5"}
NONSENSE, EMPTY = 60, 30  # of each kind
RESULTS = 10
BINS = 10
FLAT_STRENGTH, PRIOR_STRENGTH = 0.01, 1.0  # of the regularisation of a line, without and with a prior
EVEN_ODDS_SIZE = 100  # pictures in the galleries of `at_even_odds`
AT_EVEN_ODDS = ("said of the first result", "first result right", "calibration error", "AUROC")  # measured there
FUNCTION_WORDS = (
    "a an the of on in at with and is are to by for from it his her its their up down over out into near beside behind "
    "while through two one three some several other another this that as off under between against along front"
)
SEARCHED: dict[Direction, tuple[int, ...]] = {"image_to_text": (200, 1000, 6000), "text_to_image": (10, 23, 100, 800)}
"""Candidates of the galleries that the fit draws."""


# ---------------------------------------------------------------- what should find nothing


def nonsense(seed: int = 1) -> dict[str, list[str]]:
    """Make strings that say nothing, by kind."""
    rng = random.Random(seed)
    ranges = {"han": (0x4E00, 0x9F00), "cyrillic": (0x430, 0x450), "thai": (0xE01, 0xE2E), "hangul": (0xAC00, 0xD7A0)}
    alphabets = {name: [chr(code) for code in range(*bounds)] for name, bounds in ranges.items()}
    lorem = re.findall(
        r"\w+", "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt"
    )

    def word(alphabet: str | list[str], shortest: int, longest: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest)))

    def words(alphabet: str | list[str], most: int) -> str:
        return " ".join(word(alphabet, 2, 8) for _ in range(rng.randint(1, most)))

    def mashing() -> str:
        row = rng.choice(["qwertyuiop", "asdfghjkl", "zxcvbnm"])
        start = rng.randrange(len(row) - 3)
        return row[start : start + rng.randint(3, 5)] * rng.randint(1, 4)

    kinds: dict[str, Callable[[], str]] = {
        "letters": lambda: words(string.ascii_lowercase, 7),
        "mashing": mashing,
        "lorem ipsum": lambda: " ".join(rng.choices(lorem, k=rng.randint(3, 10))),
        "punctuation": lambda: word("!?.,;:-_#*+~/|()[]{}<>@%&=^", 1, 20),
        "digits": lambda: words(string.digits, 5),
        "hashes": lambda: word(string.hexdigits, 16, 40),
        "random Han": lambda: word(alphabets["han"], 3, 14),
        "random Cyrillic, Thai, Hangul": lambda: words(alphabets[rng.choice(["cyrillic", "thai", "hangul"])], 6),
    }
    return {kind: [make() for _ in range(NONSENSE)] for kind, make in kinds.items()}


def blank_images(seed: int = 1) -> dict[str, list[Image.Image]]:
    """Make pictures that show nothing, by kind."""
    rng = np.random.default_rng(seed)
    side = 224

    def grey_noise() -> np.ndarray:
        noise = rng.uniform(40, 215) + rng.normal(0, rng.uniform(5, 60), (side, side, 1))
        return np.broadcast_to(np.clip(noise, 0, 255), (side, side, 3))

    def gradient() -> np.ndarray:
        start, end = rng.uniform(0, 255, (2, 3))
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
        along = np.clip(columns * np.cos(angle) + rows * np.sin(angle) + 0.5, 0, 1)
        return start + (end - start) * along[..., None]

    def blots() -> np.ndarray:
        few = rng.integers(0, 256, (*rng.integers(3, 12, 2), 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(few).resize((side, side), Image.Resampling.BICUBIC))

    kinds: dict[str, Callable[[], np.ndarray]] = {
        "one colour": lambda: np.full((side, side, 3), rng.integers(0, 256, 3)),
        "noise": lambda: rng.integers(0, 256, (side, side, 3)),
        "grey noise": grey_noise,
        "gradient": gradient,
        "blurred blots of colour": blots,
    }
    return {k: [Image.fromarray(make().astype(np.uint8)) for _ in range(EMPTY)] for k, make in kinds.items()}


# ---------------------------------------------------------------- what describes what

Line: TypeAlias = tuple[float, float]  # slope and bias


def read_judged() -> list[dict]:
    """Read the pairs that were judged by eye: a photo, and a scene or the photo whose first caption found it, by id.

    For each language there may be a grade, 0 to 2, and a `second` one, by another judge who did not see the first.
    """
    return [json.loads(line) for line in VERDICTS.read_text("utf-8").splitlines()]


def print_agreement() -> None:
    """Print how often two judges gave a pair the same verdict, fits or not, and Cohen's kappa."""
    both = [
        (pair[language] >= 1, grade >= 1)
        for pair in read_judged()
        for language, grade in pair.get("second", {}).items()
    ]
    one, other = torch.tensor(both, dtype=torch.double).T
    agreed = float((one == other).double().mean())
    chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    print(f"two judges: {agreed:.3f} of {len(both)} pairs alike, kappa {(agreed - chance) / (1 - chance):.3f}")


class Meaning:
    """Cosines in meaning between captions, as probabilities that one describes the other's photograph."""

    def __init__(self, language: str, photos: Sequence[Photo], bank: dict[str, str], cache: Path) -> None:
        self.encoder, self.cache = SENTENCE_ENCODERS[language], cache
        self.owners = torch.tensor([row for row, photo in enumerate(photos) for _ in photo.captions[language]])
        self.texts = [caption for photo in photos for caption in photo.captions[language]]
        embeds = teacher_embeddings(self.encoder, [*self.texts, *bank.values()], cache)
        self.own, self.bank = embeds[: len(self.texts)], embeds[len(self.texts) :]
        rows = {f"{photo.source}/{Path(photo.path).name}": row for row, photo in enumerate(photos)}
        scenes = {scene: row for row, scene in enumerate(bank)}
        pairs = [pair for pair in read_judged() if language in pair and pair["photo"] in rows]

        def judged(key: str, places: dict[str, int]) -> Tensor:
            known = [pair for pair in pairs if pair.get(key) in places]
            return torch.tensor([(rows[pair["photo"]], places[pair[key]], pair[language] >= 1) for pair in known])

        self.first = [int((self.owners == row).nonzero()[0]) for row in range(len(photos))]
        self.judged = judged("scene", scenes)
        self.line = self._fit(f"{language}, scenes", self.bank, self.judged)
        first = self.own[self.first]
        self.caption_line = self._fit(f"{language}, captions", first, judged("caption_of", rows), self.line)

    def _fit(self, what: str, embeds: Tensor, judged: Tensor, prior: Line | None = None) -> Line:
        """Fit slope and bias, from cosine to log odds, on judged pairs, (photo, place in `embeds`, whether it fits)."""
        photo, place, fits = judged.T
        columns = torch.zeros(len(judged), 4, dtype=torch.double)
        columns[:, 0] = cosines = self.to_photos(embeds)[photo, place].double()
        start = torch.zeros(5, dtype=torch.double)
        start[[0, -1]] = torch.tensor(prior or (0.0, 0.0), dtype=torch.double)
        line = logistic_regression(columns, fits.double(), start, PRIOR_STRENGTH if prior else FLAT_STRENGTH)
        slope, bias = float(line[0]), float(line[-1])
        print(
            f"{what}: {len(judged)} judged pairs, {int(fits.sum())} fit; {self.encoder}: AUROC "
            f"{auroc(cosines, fits.bool()):.3f}, even odds at cosine {-bias / slope:.3f}, slope {slope:.1f}"
        )
        return slope, bias

    def to_photos(self, embeds: Tensor) -> Tensor:
        """Cosine with the nearest of each photograph's own captions: (num_photos, len(embeds))."""
        cosines = self.own @ embeds.T
        best = torch.full((int(self.owners.max()) + 1, len(embeds)), -1.0)
        return best.scatter_reduce(0, self.owners[:, None].expand_as(cosines), cosines, "amax")

    def probability(self, embeds: Tensor, line: Line) -> Tensor:
        """How likely a person says that each text describes each photograph: (num_photos, len(embeds))."""
        return (line[0] * self.to_photos(embeds) + line[1]).sigmoid()


def shared_words(photos: Sequence[Photo], bank: Sequence[str], language: str) -> Tensor:
    """Tell which texts share a content word, in Chinese two characters, with a caption of each photograph.

    Returns:
        (num_photos, num_texts) bool.
    """
    own = [_words(" ; ".join(photo.captions[language]), language) for photo in photos]
    said = [_words(text, language) for text in bank]
    places = {word: place for place, word in enumerate(sorted(set().union(*said)))}

    def marks(texts: Sequence[set[str]]) -> Tensor:
        found = torch.zeros(len(texts), len(places))
        for row, words in enumerate(texts):
            found[row, [places[word] for word in words if word in places]] = 1
        return found

    return marks(own) @ marks(said).T > 0


def _words(text: str, language: str) -> set[str]:
    if language == "zh":
        return {run[at : at + 2] for run in re.findall(r"[\u4e00-\u9fff]+", text) for at in range(len(run) - 1)}
    said, function = (re.findall("[a-z]+", part.lower()) for part in (text, FUNCTION_WORDS))
    return {word.rstrip("s") for word in said} - {word.rstrip("s") for word in function}


# ---------------------------------------------------------------- measures


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
    positives = int(labels.sum())
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


def calibration_error(said: Tensor, right: Tensor) -> float:
    """Gap between what was said and what is so, over bins of equal width."""
    bins = (said * BINS).long().clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add(0, bins, said.double() - right.double())
    return float(gaps.abs().sum() / len(said))


@dataclass
class Answers:
    """First results: the probability said, how likely it is right, whether anything fits, and whose query it is."""

    said: Tensor
    right: Tensor
    fits: Tensor
    photo: Tensor
    shared: Tensor  # whether the first shares a content word with the photograph's captions, and one of the first three

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Join the answers to other queries."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def measures(self, rows: Tensor | None = None) -> dict[str, float]:
        """Measure some rows, or all."""
        every = (self.said, self.right, self.fits, self.shared.double())
        said, right, fits, shared = (x if rows is None else x[rows] for x in every)
        sure = said >= 0.5
        return {
            "something fits": float(fits.double().mean()),
            "said of the first result": float(said.double().mean()),
            "first result right": float(right.double().mean()),
            "said at least a half": float(sure.double().mean()),
            "right of these": float(right[sure].double().mean()) if sure.any() else float("nan"),
            "calibration error": calibration_error(said, right),
            "AUROC": auroc(said, right >= 0.5),
            "first shares a word": float(shared[:, 0].mean()),
            "one of three does": float(shared[:, 1].mean()),
            "first, said at least a half": float(shared[sure, 0].mean()),
        }

    def with_intervals(self, resamples: int) -> dict[str, tuple[float, float, float]]:
        """Measure with 95 % intervals over photographs."""
        generator = torch.Generator().manual_seed(0)
        order = self.photo.argsort(stable=True)
        groups = order.split(self.photo.bincount()[self.photo.unique()].tolist())
        samples = []
        for _ in range(resamples):
            drawn = torch.randint(len(groups), (len(groups),), generator=generator).tolist()
            samples.append(list(self.measures(torch.cat([groups[row] for row in drawn])).values()))
        low, high = torch.tensor(samples).nanquantile(torch.tensor([0.025, 0.975]), dim=0).tolist()
        return {name: (value, low[i], high[i]) for i, (name, value) in enumerate(self.measures().items())}


# ---------------------------------------------------------------- the two directions


@dataclass
class Side:
    """The queries of one direction in one language, what they search, and how likely each candidate is right."""

    queries: Tensor
    candidates: Tensor
    relevance: Tensor
    photo: Tensor
    judged: Tensor | None = None  # rows of (photo, candidate, whether it fits), judged by eye
    alone: Tensor | None = None  # the candidates embedded in this language only, as in most galleries
    shared: Tensor | None = None  # (num_queries, num_candidates), see `shared_words`
    texts: Sequence[str] = ()  # the queries, where these are captions

    def of(self, photos: Tensor, direction: Direction) -> Side:
        """Keep the queries of some photographs; where photographs are searched, keep those only."""
        rows = torch.isin(self.photo, photos)
        columns = rows if direction == "text_to_image" else torch.ones(len(self.candidates), dtype=torch.bool)
        relevance = self.relevance[rows][:, columns]
        shared = None if self.shared is None else self.shared[rows][:, columns]
        return Side(self.queries[rows], self.candidates[columns], relevance, self.photo[rows], shared=shared)


Data = dict[Direction, dict[str, Side]]


def load(arguments: argparse.Namespace, encoder: DualEncoder) -> tuple[Data, list[str]]:
    """Embed the dev photographs, a caption of each in each language, and the starter gallery's captions.

    The second value is the data set of each photograph.
    """
    photos = [photo for photo in read_photos(arguments.data, arguments.chinese) if photo.split == "dev"]
    photos = [photo for photo in photos if all(photo.captions.get(language) for language in LANGUAGES)]
    _, captions = read_hand_written(SOURCES)
    images, rows = encoder.encode_images([photo.path for photo in photos]), torch.arange(len(photos))
    found: Data = {direction: {} for direction in DIRECTIONS}
    for language in LANGUAGES:
        bank = {c.scene: c.text for c in captions if c.topic and c.lang == language}
        meaning = Meaning(language, photos, bank, arguments.cache)
        relevance = meaning.probability(meaning.bank, meaning.line).clamp(max=0.999)
        texts = encoder.encode_texts(list(bank.values()))
        shared = shared_words(photos, list(bank.values()), language)
        found["image_to_text"][language] = Side(images, texts, relevance, rows, meaning.judged, texts, shared)
        relevance = meaning.probability(meaning.own[meaning.first], meaning.caption_line).clamp(max=0.999)
        relevance = relevance.fill_diagonal_(1.0).T
        own = [meaning.texts[row] for row in meaning.first]
        shared = shared_words(photos, own, language).T
        queries = encoder.encode_texts(own)
        found["text_to_image"][language] = Side(queries, images, relevance, rows, shared=shared, texts=own)
    sides = found["image_to_text"].values()
    scenes = functional.normalize(torch.stack([side.candidates for side in sides]).mean(0), dim=-1)
    for side in sides:
        side.candidates = scenes  # as `build_gallery` embeds a scene
    return found, [photo.source for photo in photos]


def fit(data: Data, photos: Tensor, cohort: Cohort) -> Calibration:
    """Fit both directions on some photographs, both languages together."""
    match, any_match, thresholds = {}, {}, {}
    for direction, languages in data.items():
        every, right, best, found = [], [], [], []
        generator = torch.Generator().manual_seed(0)
        for whole in languages.values():
            side = whole.of(photos, direction)
            similarity = side.queries @ side.candidates.T
            for s in draw_searches(similarity, side.relevance, SEARCHED[direction], generator):
                evidence, seen = cohort.evidence(s.similarity, side.queries, s.sizes, direction), s.similarity > -1
                every.append(evidence[seen])
                right.append(s.right[seen])
                best.append(evidence[:, 0])
                found.append(s.found)
        match[direction] = Curve.fit(torch.cat(every), torch.cat(right))
        if direction == "image_to_text":
            match[direction] = judged_curve(languages, photos, cohort, match[direction])
        any_match[direction] = Curve.fit(torch.cat(best), torch.cat(found))
        said = any_match[direction].probability(torch.cat(best))
        thresholds[direction] = Thresholds.of(
            round(float(said[torch.cat(found) >= 0.5].quantile(TARGET_FALSE_REJECTION)), 3)
        )
    return Calibration(match, any_match, thresholds)


def judged_evidence(side: Side, candidates: Tensor, photos: Tensor, cohort: Cohort) -> tuple[Tensor, Tensor]:
    """Return the evidence for the pairs judged by eye that a search would show, of some photographs, and which fit."""
    assert side.judged is not None
    photo, scene, fits = side.judged[torch.isin(side.judged[:, 0], photos)].T
    queries = side.queries[photo]
    everything = queries @ candidates.T
    similarity = everything.gather(1, scene[:, None])
    shown = (everything > similarity).sum(1) < RESULTS
    evidence = cohort.evidence(similarity, queries, len(candidates), "image_to_text")[:, 0]
    return evidence[shown], fits[shown].bool()


def judged_curve(languages: dict[str, Side], photos: Tensor, cohort: Cohort, prior: Curve) -> Curve:
    """Fit on the pairs judged by eye: at the same closeness in meaning, what the model finds itself fits more often.

    Scenes count twice: as the starter gallery embeds them, and in each language alone.
    """
    parts = [
        judged_evidence(side, candidates, photos, cohort)
        for side in languages.values()
        for candidates in (side.candidates, side.alone)
    ]
    evidence, labels = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return Curve.fit(evidence, labels, prior=prior)


def answers(side: Side, direction: Direction, calibration: Calibration, cohort: Cohort) -> Answers:
    """Search with every query, and keep what is said of the first result."""
    values, ids = (side.queries @ side.candidates.T).topk(RESULTS, dim=1)
    count, told = len(side.candidates), []
    for similarity, query in zip(values, side.queries, strict=True):
        judged = MatchCalibrator(calibration, cohort).assess(similarity, query, direction, num_candidates=count)
        told.append((float(judged.probabilities[0]), judged.verdict in ("fits", "may_fit")))
    said, fits = zip(*told, strict=True)
    right = side.relevance.gather(1, ids[:, :1]).squeeze(1)
    assert side.shared is not None
    shared = side.shared.gather(1, ids[:, :3])
    either = torch.stack([shared[:, 0], shared.any(1)], dim=1)
    return Answers(torch.tensor(said), right, torch.tensor(fits), side.photo, either)


def at_even_odds(side: Side, calibration: Calibration, cohort: Cohort) -> Answers:
    """Search galleries of `EVEN_ODDS_SIZE` pictures, half of them without the caption's own, as `assess` supposes."""
    similarity, generator = side.queries @ side.candidates.T, torch.Generator().manual_seed(2)
    (found,) = draw_searches(similarity, side.relevance, [EVEN_ODDS_SIZE], generator)
    evidence = cohort.evidence(found.similarity, side.queries, found.sizes, "text_to_image")[:, 0]
    said, right = calibration.match["text_to_image"].probability(evidence), found.right[:, 0].double()
    return Answers(said, right, found.found >= 0.5, side.photo, torch.zeros(len(said), 2))


def cross_fit(
    data: Data, sources: Sequence[str], cohort: Cohort, resamples: int
) -> dict[Direction, tuple[Tensor, Tensor]]:
    """Fit on one half of the photographs and measure on the other, both ways, and print the tables.

    Returns:
        What the reliability diagram shows, by direction: the probability said, and how likely it is right; captions of
        a picture are those judged by eye, pictures of a caption the first results, see `at_even_odds`.
    """
    at_odds: list[Answers] = []
    total = len(data["image_to_text"]["en"].photo)
    half = torch.randperm(total, generator=torch.Generator().manual_seed(1)) % 2
    fitted = [fit(data, (half == part).nonzero()[:, 0], cohort) for part in (0, 1)]
    for direction in DIRECTIONS:
        for language, whole in data[direction].items():
            parts = [
                answers(whole.of((half != part).nonzero()[:, 0], direction), direction, fitted[part], cohort)
                for part in (0, 1)
            ]
            joined = Answers.joined(parts)
            print(f"{direction}, {language}: {len(joined.said)} queries, {len(parts[0].said)} photographs a half")
            for name, (value, low, high) in joined.with_intervals(resamples).items():
                print(f"    {name:28}{value:.3f} [{low:.3f}, {high:.3f}]")
            if direction == "text_to_image":
                halves = [(whole.of((half != part).nonzero()[:, 0], direction), fitted[part]) for part in (0, 1)]
                at_odds.append(
                    Answers.joined([at_even_odds(side, calibration, cohort) for side, calibration in halves])
                )
                print(f"    half of the captions search without their photograph, among {EVEN_ODDS_SIZE}:")
                for name, (value, low, high) in at_odds[-1].with_intervals(resamples).items():
                    if name in AT_EVEN_ODDS:
                        print(f"        {name:28}{value:.3f} [{low:.3f}, {high:.3f}]")
            for source in sorted(set(sources)):
                rows = torch.tensor([sources[row] == source for row in joined.photo.tolist()])
                told = ", ".join(f"{name} {value:.3f}" for name, value in joined.measures(rows).items())
                print(f"    {source}: {told}")
    for name in ("alone", "candidates"):  # captions of one language, then scenes as the starter gallery holds them
        judged = [
            (fitted[part].match["image_to_text"].probability(evidence), fits)
            for part in (0, 1)
            for side in data["image_to_text"].values()
            for evidence, fits in [judged_evidence(side, getattr(side, name), (half != part).nonzero()[:, 0], cohort)]
        ]
        said, fits = torch.cat([said for said, _ in judged]), torch.cat([fits for _, fits in judged])
        sure = fits[said >= 0.5].double()
        print(
            f"judged pairs, {name}: {len(said)}, said {float(said.mean()):.3f}, fit {float(fits.double().mean()):.3f}"
        )
        print(f"    calibration error {calibration_error(said, fits):.3f}, AUROC {auroc(said, fits):.3f}")
        print(f"    said at least a half: {len(sure)}, of which fit {float(sure.mean()):.3f}")
    scenes = said, fits
    both = Answers.joined(at_odds)
    return {"image_to_text": scenes, "text_to_image": (both.said, both.right)}


def refusals(
    data: Data, sources: Sequence[str], calibration: Calibration, cohort: Cohort, encoder: DualEncoder
) -> None:
    """Print what is refused of what should find nothing."""
    pictures, _ = read_hand_written(SOURCES)
    starter = encoder.encode_images([str(picture.path) for picture in pictures])

    def refused(queries: Tensor, candidates: Tensor, direction: Direction) -> str:
        hits = []
        for query in queries:
            similarity = (candidates @ query).topk(min(RESULTS, len(candidates))).values
            judged = MatchCalibrator(calibration, cohort).assess(
                similarity, query, direction, num_candidates=len(candidates)
            )
            hits.append(judged.verdict in ("nothing_close", "no_meaning"))
        return wilson(torch.tensor(hits))

    print("refused:")
    for language, side in data["text_to_image"].items():
        print(f"  captions of dev photographs, {language:35} {refused(side.queries, starter, 'text_to_image')}")
        shown = set().union(*(_words(picture.captions[language], language) for picture in pictures))
        for source in sorted(set(sources)):
            absent = [
                row
                for row, text in enumerate(side.texts)
                if sources[row] == source and not _words(text, language) & shown
            ]
            if absent:
                said = refused(side.queries[absent], starter, "text_to_image")
                print(f"    sharing no content word with the starter pictures', {source:10} {len(absent):3} {said}")
    own = encoder.encode_texts([caption for picture in pictures for caption in picture.captions.values()])
    print(f"  captions of the starter pictures{'':31} {refused(own, starter, 'text_to_image')}")
    for kind, texts in nonsense().items():
        print(f"  {kind:62} {refused(encoder.encode_texts(texts), starter, 'text_to_image')}")
    bank = data["image_to_text"]["en"].candidates
    for kind, images in blank_images().items():
        print(f"  {kind:62} {refused(encoder.encode_images(images), bank, 'image_to_text')}")


def wilson(hits: Tensor) -> str:
    """Print a share with its interval."""
    n, p, z = len(hits), float(hits.double().mean()), 1.96
    centre, reach = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + sign * reach) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:5.1f} [{100 * low:4.1f}, {100 * high:5.1f}]"


def draw(measured: dict[Direction, tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw the reliability diagram: what was said against what is so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, (direction, (said, right)) in zip(figure.subplots(1, 2), measured.items(), strict=True):
        bins = (said * BINS).long().clamp(0, BINS - 1)
        axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
        for place in range(BINS):
            rows = bins == place
            if rows.sum() >= 5:
                x, share = float(said[rows].mean()), float(right[rows].double().mean())
                spread = 1.96 * (share * (1 - share) / int(rows.sum())) ** 0.5
                axes.errorbar(x, share, spread, fmt="o", color="#1f5fa8", capsize=3)
                axes.annotate(str(int(rows.sum())), (x, share), (6, -10), textcoords="offset points")
        axes.set(
            title=direction.replace("_", " ").replace("image", "picture"),
            xlabel="probability said", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1),
        )  # fmt: skip
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "compact"))
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="folders, as for alignment.compact")
    parser.add_argument("--chinese", type=Path, help="Flickr8k's Chinese captions")
    parser.add_argument("--cache", type=Path, default=Path("runs/compact"), help="folder for sentence embeddings")
    parser.add_argument("--save", type=Path, help="JSON file for the calibration fitted on all photographs")
    parser.add_argument("--diagram", type=Path, help="PNG file for the reliability diagram")
    parser.add_argument("--resamples", type=int, default=500)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    encoder = DualEncoder.load(arguments.model, device="cpu")
    cohort, (data, sources) = build_cohort(encoder), load(arguments, encoder)
    print_agreement()
    measured = cross_fit(data, sources, cohort, arguments.resamples)
    whole = fit(data, torch.arange(len(data["image_to_text"]["en"].photo)), cohort)
    refusals(data, sources, whole, cohort, encoder)
    print(json.dumps(whole.to_dict(), indent=2))
    if arguments.save:
        arguments.save.write_text(json.dumps(whole.to_dict(), indent=2) + "\n", "utf-8")
    if arguments.diagram:
        draw(measured, arguments.diagram)


if __name__ == "__main__":
    main()
