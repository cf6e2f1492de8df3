"""A gallery says when nothing fits: with the compact model and its starter gallery, and with curves of its own."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from alignment.confidence import DEFAULT_CALIBRATION, DIRECTIONS, Cohort, cohort, fit_calibration
from alignment.confidence.calibration import MIN_FITTED
from alignment.gallery import Gallery, build_gallery
from alignment.gallery.writer import write_gallery
from alignment.model import DualEncoder

ROOT = Path(__file__).resolve().parents[1]
STARTER, COMPACT = ROOT / "assets" / "gallery", ROOT / "checkpoints" / "compact"


@pytest.fixture(scope="module")
def compact() -> DualEncoder:
    return DualEncoder.load(COMPACT, device="cpu")


@pytest.fixture(scope="module")
def starter(compact) -> Gallery:
    return Gallery.load(STARTER, compact)


# ---------------------------------------------------------------- what a person sees


@pytest.mark.parametrize("query", ["a cat with green eyes", "a red motorcycle", "一只猫", "一杯咖啡"])
def test_what_is_there_fits(compact, starter, query):
    found = starter.search_images(compact.encode_texts([query])[0], 5)
    assert found.fits
    assert not found.is_out_of_distribution
    probabilities = [match.probability for match in found.matches]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] > 0.3 > probabilities[-1]


@pytest.mark.parametrize("query", ["a plate of spaghetti", "children playing football", "一群人在沙滩上打排球"])
def test_what_is_not_there_does_not(compact, starter, query):
    found = starter.search_images(compact.encode_texts([query])[0], 5)
    assert not found.fits
    assert not found.is_out_of_distribution
    assert found.matches  # the least bad ones are there all the same


@pytest.mark.parametrize("query", ["asdf asdf asdf", "xqzt bvvk wpl", "!!! ??? ///", "82734 99182"])
def test_gibberish_finds_nothing(compact, starter, query):
    found = starter.search_images(compact.encode_texts([query])[0], 5)
    assert not found.fits


def test_an_empty_picture_finds_nothing(compact, starter):
    noise = np.random.default_rng(5).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (640, 480), "white"), Image.new("RGB", (640, 480), "navy"), Image.fromarray(noise)):
        found = starter.search_captions(compact.encode_images([image])[0], 5, lang="en")
        assert (found.fits, found.is_out_of_distribution) == (False, True)
        assert {match.probability for match in found.matches} == {0.0}


# ---------------------------------------------------------------- how it is kept


def test_the_starter_gallerys_background_is_up_to_date(starter):
    assert starter.metadata.judged_by.endswith(cohort.cohort_version())
    assert starter.judge is not None
    assert starter.judge.calibration == DEFAULT_CALIBRATION


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for row in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{row}.png")
        lines.append(json.dumps({"id": f"p{row}", "source": f"{row}.png", "en": f"picture number {row}"}))
    (folder / "pictures.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def test_a_gallery_keeps_its_judge_and_a_second_build_its_background(checkpoint, tmp_path, monkeypatch):
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    source, out = photos(tmp_path / "photos", 3), tmp_path / "out"
    built = build_gallery(source, out, encoder)
    loaded = Gallery.load(out, encoder)
    assert built.judge is not None
    assert loaded.judge is not None
    for name, embeds in built.judge.cohort.tensors().items():
        torch.testing.assert_close(loaded.judge.cohort.tensors()[name], embeds)
    assert loaded.metadata == built.metadata

    def again(*args: object) -> None:
        raise AssertionError("the background is embedded again")

    monkeypatch.setattr("alignment.gallery.build.build_cohort", again)
    build_gallery(source, out, encoder)


def test_a_gallery_from_before_is_searched_without_probabilities(checkpoint, tmp_path, caplog):
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    built = build_gallery(photos(tmp_path / "photos", 3), tmp_path / "out", encoder, calibrate=False)
    assert built.judge is None
    with caplog.at_level(logging.WARNING):
        found = Gallery.load(tmp_path / "out", encoder).search_images(encoder.encode_texts(["two cats"])[0], 3)
    assert "python -m alignment.gallery build" in caplog.text
    assert (found.verdict, found.fits, found.p_any_match) == (None, True, None)
    assert {match.verdict for match in found.matches} == {None}
    assert [match.probability for match in found.matches] == [None] * 3


@pytest.mark.parametrize("damage", ["curve", "cohort"])
def test_a_damaged_judge_is_an_error_that_says_what_to_run(checkpoint, tmp_path, damage):
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    built = build_gallery(photos(tmp_path / "photos", 2), tmp_path / "out", encoder)
    metadata, tensors = built.metadata, built.judge.cohort.tensors()
    if damage == "curve":
        metadata = replace(metadata, calibration={"match": {}})
    else:
        tensors = {"image_embeds": tensors["image_embeds"]}
    embeds = {"picture": [built.images.embeds], "caption": [built.texts.embeds]}
    write_gallery(
        tmp_path / "out",
        built.pictures,
        built.captions,
        embeds,
        encoder.embed_dim,
        metadata,
        tensors,
        lambda picture: None,
    )
    with pytest.raises(ValueError, match=r"python -m alignment\.gallery build"):
        Gallery.load(tmp_path / "out", encoder)


# ---------------------------------------------------------------- fitting on a gallery's own pairs


def unit(*shape: int, seed: int) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("count", "borrowed"), [(MIN_FITTED - 1, True), (MIN_FITTED, False)])
def test_curves_are_fitted_where_there_are_pairs_enough_and_borrowed_elsewhere(count, borrowed):
    images = unit(count + 20, 32, seed=1)
    ids = [f"p{row}" for row in range(count + 20)]  # twenty have no caption
    texts = functional.normalize(images[:count] + 0.8 * unit(count, 32, seed=2), dim=-1)
    background = Cohort(unit(30, 32, seed=3), unit(100, 32, seed=4))
    calibration, how = fit_calibration(ids, ids[:count], images.__getitem__, texts.__getitem__, background)
    assert (calibration == DEFAULT_CALIBRATION) is borrowed
    assert how.startswith("borrowed" if borrowed else f"fitted on {count} pictures")
    assert set(calibration.thresholds) == set(DIRECTIONS)


def test_borrowed_curves_of_the_compact_model_were_fitted_against_this_background():
    paths, captions = cohort.cohort_items()
    assert len(paths) == 23
    assert len(captions) == len(set(captions)) == cohort.COHORT_CAPTIONS
