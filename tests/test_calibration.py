"""Probabilities known beforehand are found again, few pairs do no harm, and the compact model knows nonsense."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional

from alignment.confidence import (
    DEFAULT_CALIBRATION,
    DIRECTIONS,
    VERDICTS,
    Calibration,
    Cohort,
    Direction,
    MatchCalibrator,
    Thresholds,
)
from alignment.confidence.calibration import FITS_THRESHOLD
from alignment.confidence.cohort import blank_images, random_texts
from alignment.confidence.curve import Curve
from alignment.gallery import Gallery
from alignment.model import DualEncoder

ROOT = Path(__file__).resolve().parents[1]
CURVE = Curve(score=1.5, tail=-0.8, mean=0.3, log_size=-0.5, bias=0.4)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def paired(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures with two captions each, as near to them as the noise lets them be, and what describes what."""
    images = unit(count, 32, seed=seed)
    owners = torch.arange(count).repeat_interleave(2)
    texts = functional.normalize(images[owners] + noise * unit(2 * count, 32, seed=seed + 1), dim=-1)
    return images, texts, (owners[None] == torch.arange(count)[:, None]).float()


def match_probability(
    calibration: Calibration, scores: Tensor, queries: Tensor, direction: Direction, num_candidates: int, cohort: Cohort
) -> Tensor:
    return calibration.match[direction].probability(cohort.evidence(scores, queries, num_candidates, direction))


def evidence(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return Cohort(unit(40, 32, seed=90), unit(200, 32, seed=91))


# ---------------------------------------------------------------- the curve


def test_known_curve_is_found_again() -> None:
    seen = evidence(40_000)
    labels = torch.rand(40_000, generator=torch.Generator().manual_seed(1)) < CURVE.probability(seen)
    found = Curve.fit(seen, labels)
    for name in ("score", "tail", "mean", "log_size", "bias"):
        assert getattr(found, name) == pytest.approx(getattr(CURVE, name), abs=0.06)


def test_fit_ends_where_the_gradient_vanishes() -> None:
    # At the maximum of the likelihood, what is said and what is so agree in sum and along every column.
    seen = evidence(500) * 3 + 7
    labels = CURVE.probability(seen - 7) > torch.rand(500, dtype=torch.double)
    gap = Curve.fit(seen, labels, strength=0).probability(seen) - labels.double()
    assert gap.sum().abs() < 1e-6
    assert (seen.T @ gap).abs().max() < 1e-5


def test_constant_evidence_gives_the_share_of_matches() -> None:
    seen = torch.ones(1000, 4, dtype=torch.double)
    found = Curve.fit(seen, torch.arange(1000) < 300, strength=0.001)
    assert float(found.probability(seen[0])) == pytest.approx(0.3, abs=1e-3)
    assert found.score == 0


def test_separable_examples_leave_finite_curves() -> None:
    seen = evidence(50) * 100
    found = Curve.fit(seen, seen[:, 0] > 0)
    assert math.isfinite(found.score)
    assert found.score > 0


def test_score_that_misleads_is_not_used() -> None:
    seen = evidence(2000)
    found = Curve.fit(seen, seen[:, 0] < 0)
    assert found.score == 0
    assert found.probability(seen).std() < 0.2


def test_few_examples_stay_near_the_prior_and_many_do_not() -> None:
    seen = evidence(20_000)
    labels = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < CURVE.probability(seen)
    far = Curve(4, 0, 0, 0, -3)
    few, many = (Curve.fit(seen[:n], labels[:n], prior=far, strength=10) for n in (4, 20_000))
    assert abs(few.score - far.score) < 1 < abs(many.score - far.score)
    assert many.score == pytest.approx(CURVE.score, abs=0.1)


def test_bad_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Curve.fit(torch.empty(0, 4), torch.empty(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="finite"):
        Curve.fit(torch.full((2, 4), torch.nan), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="not negative"):
        Curve(-1, 0, 0, 0, 0)


# ---------------------------------------------------------------- the cohort


def test_unrelated_scores_are_centred_with_unit_spread(cohort: Cohort) -> None:
    scores = cohort.image_embeds @ cohort.text_embeds.T
    seen = cohort.evidence(scores, cohort.image_embeds, 200, "image_to_text")
    assert seen.shape == (40, 200, 4)
    assert seen[..., 0].mean().abs() < 1e-6
    assert seen[..., 0].std(1, correction=0).mean() == pytest.approx(1, abs=1e-5)
    assert seen[..., 2].mean(0).allclose(seen[..., 0].mean(), atol=1e-6)
    assert seen[0, 0, 1] == pytest.approx(float(seen[0, :, 0].topk(5).values.mean()), abs=1e-5)
    assert (seen[..., 3] == math.log(200)).all()


@pytest.mark.parametrize(("images", "texts"), [((0, 8), (3, 8)), ((3, 8), (3, 7)), ((8,), (3, 8))])
def test_background_that_is_none_is_refused(images: tuple[int, ...], texts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cohort"):
        Cohort(torch.ones(images), torch.ones(texts))


def test_query_among_the_probes_is_out_of_distribution_and_ordinary_ones_are_not() -> None:
    corner = functional.normalize(unit(1, 256, seed=5) + unit(20, 256, seed=6), dim=-1)
    images, texts = unit(40, 256, seed=1), unit(40, 256, seed=2)
    cohort = Cohort(images, texts, nonsense_text_embeds=corner[:10])
    queries = torch.cat([corner[10:], unit(50, 256, seed=3)])
    assert cohort.is_out_of_distribution(queries, "text_to_image").tolist() == [True] * 10 + [False] * 50
    assert not cohort.is_out_of_distribution(queries, "image_to_text").any()
    judged = MatchCalibrator(DEFAULT_CALIBRATION, cohort).assess(
        torch.ones(3), corner[10], "text_to_image", num_candidates=3
    )
    assert judged.verdict == "no_meaning"
    assert judged.verdicts == ("no_meaning",) * 3
    assert judged.probabilities.tolist() == [0, 0, 0]


def test_background_goes_through_its_tensors(cohort: Cohort) -> None:
    again = Cohort(**cohort.tensors())
    assert list(again.tensors()) == ["image_embeds", "text_embeds"]
    assert again.units == cohort.units


# ---------------------------------------------------------------- the calibration


def test_probabilities_hold_for_pairs_not_seen(cohort: Cohort) -> None:
    calibration = Calibration.fit(*paired(300, 1.6, seed=1), cohort)
    images, texts, relevance = paired(300, 1.6, seed=7)
    right = relevance.bool()
    lost = right & (torch.arange(300) % 2 == 0)[:, None]  # nothing is there for every other picture
    scores, right = (images @ texts.T).masked_fill(lost, -1), right & ~lost
    values, ids = scores.topk(10, dim=1)
    said = match_probability(calibration, values, images, "image_to_text", 600, cohort)
    truth = right.gather(1, ids)
    assert float(said.mean()) == pytest.approx(float(truth.double().mean()), abs=0.03)
    assert said[truth].mean() > said[~truth].mean() + 0.1


def test_more_candidates_make_the_same_score_less_sure(cohort: Cohort) -> None:
    calibration = Calibration.fit(*paired(200, 1.6, seed=1), cohort)
    query, score = unit(1, 32, seed=5), torch.tensor([[0.6]])
    few, many = (match_probability(calibration, score, query, "text_to_image", n, cohort).item() for n in (10, 1000))
    assert few > many


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.integers(1, 10_000), st.sampled_from(DIRECTIONS))
def test_probability_rises_with_the_score(cosines: list[float], size: int, direction: str) -> None:
    cohort = Cohort(unit(3, 8, seed=1), unit(9, 8, seed=2))
    scores = torch.tensor(sorted(cosines))
    judged = MatchCalibrator(DEFAULT_CALIBRATION, cohort).assess(
        scores, unit(8, seed=3), direction, num_candidates=size
    )
    assert (judged.probabilities.diff() >= 0).all()
    assert judged.probabilities.min() >= 0
    assert judged.probabilities.max() <= 1
    order = [VERDICTS.index(verdict) for verdict in judged.verdicts]
    assert order == sorted(order, reverse=True)  # as the scores rise
    assert judged.verdict == judged.verdicts[-1] == judged.verdicts[int(judged.probabilities.argmax())]


@pytest.mark.parametrize("width", [1, 8])
def test_smallest_background_and_one_candidate(width: int) -> None:
    cohort = Cohort(torch.ones(1, width), torch.ones(1, width))
    judged = MatchCalibrator(DEFAULT_CALIBRATION, cohort).assess(
        torch.tensor([1.0]), torch.ones(width), "image_to_text", num_candidates=1
    )
    assert judged.probabilities.isfinite().all()


def test_search_without_results_fits_nothing(cohort: Cohort) -> None:
    judged = MatchCalibrator(DEFAULT_CALIBRATION, cohort).assess(
        torch.empty(0), unit(32), "text_to_image", num_candidates=0
    )
    assert judged.verdict == "nothing_close"
    assert judged.p_any_match == 0


def test_collapsed_model_is_calibrated_to_the_odds() -> None:
    same = torch.ones(40, 4)
    cohort = Cohort(same[:5], same[:5])
    calibration = Calibration.fit(same, same, torch.eye(40), cohort)
    judged = MatchCalibrator(calibration, cohort).assess(torch.ones(10), same[0], "text_to_image", num_candidates=40)
    assert judged.p_any_match == pytest.approx(0.5, abs=0.05)
    assert float(judged.probabilities.std()) < 1e-6


def test_few_pairs_with_items_that_belong_to_none(cohort: Cohort) -> None:
    images, texts, relevance = paired(6, 1.0, seed=1)
    relevance[:, 6:] = 0
    fitted = Calibration.fit(images, texts, relevance, cohort, prior=DEFAULT_CALIBRATION, strength=20)
    assert fitted.match["text_to_image"].score > 0
    with pytest.raises(ValueError, match="no pair"):
        Calibration.fit(images, texts, torch.zeros_like(relevance), cohort)


def test_captions_that_may_describe_a_picture_count_for_what_they_are_worth(cohort: Cohort) -> None:
    images, texts, relevance = paired(200, 1.6, seed=1)
    fitted = Calibration.fit(images, texts, 0.6 * relevance, cohort)
    values, ids = (images @ texts.T).topk(10, dim=1)
    said = match_probability(fitted, values, images, "image_to_text", 400, cohort)
    truth = 0.6 * relevance.gather(1, ids)
    assert float(said.mean()) == pytest.approx(float(truth.mean()), abs=0.03)


def test_same_seed_gives_the_same_calibration(cohort: Cohort) -> None:
    first, second = (Calibration.fit(*paired(40, 1.0, seed=1), cohort, seed=3) for _ in range(2))
    assert first == second


def test_json_round_trip(cohort: Cohort) -> None:
    fitted = Calibration.fit(*paired(40, 1.0, seed=1), cohort)
    for one in (fitted, DEFAULT_CALIBRATION):
        assert Calibration.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_the_single_line_of_an_older_gallery_is_where_results_may_fit() -> None:
    old = {**DEFAULT_CALIBRATION.to_dict(), "lines": {"image_to_text": 0.315, "text_to_image": 0.8}}
    lines = Calibration.from_dict(old).thresholds
    assert lines == {"image_to_text": Thresholds(FITS_THRESHOLD, 0.315), "text_to_image": Thresholds(0.8, 0.8)}


@pytest.mark.parametrize(
    "change",
    [
        {"lines": {}},
        {"lines": {way: {"fits": 0.2, "may_fit": 0.3} for way in DIRECTIONS}},
        {"lines": {way: {"fits": 0.2} for way in DIRECTIONS}},
        {"lines": dict.fromkeys(DIRECTIONS, 1.2)},
        {"match": None},
        {"more": 1},
        {"fits": {"image_to_text": {}}},
    ],
)
def test_what_is_no_calibration_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"calibration|Thresholds"):
        Calibration.from_dict({**DEFAULT_CALIBRATION.to_dict(), **change})


# ---------------------------------------------------------------- the compact model


@pytest.fixture(scope="module")
def compact() -> tuple[DualEncoder, Gallery, Cohort]:
    encoder = DualEncoder.load(ROOT / "checkpoints" / "compact", device="cpu")
    gallery = Gallery.load(ROOT / "assets" / "gallery", encoder)
    lines = (ROOT / "assets" / "parallel_captions.jsonl").read_text("utf-8").splitlines()
    captions = [caption for line in lines for caption in json.loads(line).values()]
    texts = encoder.encode_texts(random.Random(0).sample(captions, 1024))
    empty, nonsense = encoder.encode_images(blank_images()), encoder.encode_texts(random_texts())
    return encoder, gallery, Cohort(gallery.images.embeds, texts, empty, nonsense)


@pytest.mark.parametrize(
    ("caption", "fits"),
    [
        ("a cheetah runs across the plain", True),
        ("a photographer with a camera on a tripod", True),
        ("a cup of coffee on a saucer", True),
        ("a parked motorcycle", True),
        ("一只猫", True),
        ("asdf jkl qwer zxcv", False),
        ("xqzv bnwp ktrrg ooiu", False),
        ("!!! ??? ... ###", False),
        ("0193 5820 7741", False),
        ("a group of people plays volleyball in a gym", False),
    ],
)
def test_captions_find_pictures_or_nothing(
    compact: tuple[DualEncoder, Gallery, Cohort], caption: str, fits: bool
) -> None:
    encoder, gallery, cohort = compact
    query = encoder.encode_texts([caption])[0]
    judged = MatchCalibrator(DEFAULT_CALIBRATION, cohort).assess(
        gallery.images.embeds @ query, query, "text_to_image", num_candidates=len(gallery.pictures)
    )
    assert (judged.verdict in ("fits", "may_fit")) is fits, f"{judged.p_any_match:.2f}"


@pytest.mark.parametrize("colour", ["gray", "black", "white", "red"])
def test_an_empty_photo_finds_no_caption(compact: tuple[DualEncoder, Gallery, Cohort], colour: str) -> None:
    (query,) = compact[0].encode_images([Image.new("RGB", (300, 200), colour)])
    assert not judge_picture(compact, query)


def test_most_photos_find_captions(compact: tuple[DualEncoder, Gallery, Cohort]) -> None:
    # Every one of them has its caption in the gallery. The line costs some: textures and documents above all.
    found = [judge_picture(compact, embed) for embed in compact[1].images.embeds]
    assert sum(found) > len(found) / 2


def judge_picture(compact: tuple[DualEncoder, Gallery, Cohort], query: Tensor) -> bool:
    _, gallery, cohort = compact
    english = torch.tensor([caption.lang == "en" for caption in gallery.captions])
    scores = gallery.texts.embeds[english] @ query
    judged = MatchCalibrator(DEFAULT_CALIBRATION, cohort).assess(
        scores, query, "image_to_text", num_candidates=len(scores)
    )
    return judged.verdict in ("fits", "may_fit")
