"""Explanations on one scale: what it is taken from, what it makes of photographs, what the dialog is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from alignment.engine import AlignmentEngine, Explanation, Scale
from alignment.explain import UNIT, WordContribution, patch_relevance
from alignment.gallery import Gallery, build_gallery
from alignment.heatmap import patch_overlay
from alignment.model import DualEncoder
from alignment.preprocess import InputError
from alignment.ui.explanation import ExplanationDialog, ExplanationState, Pair
from alignment.ui.strings import strings, text
from tests.http_client import shown

PHOTOGRAPHS = ("cheetah-running", "cat", "coffee", "cameraman", "motorcycle", "rocket")


@pytest.fixture(scope="module")
def engine(compact_engine) -> AlignmentEngine:
    return compact_engine


@pytest.fixture(scope="module")
def own_and_foreign(engine) -> dict[str, tuple[Explanation, Explanation]]:
    """Each photograph explained with its own caption and with that of the next."""
    words = {picture.id: picture.caption("en") for picture in engine.gallery.pictures}
    nexts = (*PHOTOGRAPHS[1:], PHOTOGRAPHS[0])
    return {
        name: tuple(engine.explain(engine.picture_image(name), words[caption]) for caption in (name, other))
        for name, other in zip(PHOTOGRAPHS, nexts, strict=True)
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two pictures, one of which will be gone."""
    for name, colour in (("kept", "red"), ("gone", "blue")):
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{name}.png")
    lines = [{"id": name, "source": f"{name}.png", "en": f"a {name} thing"} for name in ("kept", "gone")]
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return tmp_path


# ---------------------------------------------------------------- the scale


def test_the_scale_is_what_unrelated_items_score(engine):
    mean, spread = engine.gallery.judge.cohort.units["text_to_image"]
    scale = engine.scale
    assert (scale.unrelated, scale.spread) == (mean, spread)
    assert scale.noise_band[0] < mean < scale.noise_band[1] < scale.cosines[1] <= 1
    assert scale.places[0] < scale.places[1]
    assert scale.words > 0


def test_a_gallery_without_a_background_is_its_own(engine):
    known = engine.gallery
    gallery = Gallery(known.pictures, known.captions, known.images.embeds, known.texts.embeds, known.metadata)
    cosines = known.images.embeds @ known.texts.embeds.T
    scale = Scale.of(gallery)
    spread = cosines.std().item()
    assert scale.unrelated == pytest.approx(cosines.mean().item(), abs=0.02 * spread)  # of a sample
    assert scale.spread == pytest.approx(spread, rel=0.02)
    assert scale.spread == pytest.approx(engine.scale.spread, rel=0.3)


def test_where_nothing_can_be_measured_there_is_a_scale_all_the_same(engine):
    empty = Gallery((), (), torch.empty(0, 8), torch.empty(0, 8), engine.gallery.metadata)
    assert Scale.of(empty).spread > 0


def test_strength_is_told_by_the_distance_from_what_is_unrelated():
    scale = Scale(0.1, 0.05)
    found = [Explanation(cosine, (), np.zeros((2, 2), np.float32), scale).strength for cosine in (0.1, 0.23, 0.5)]
    assert found == ["none", "some", "strong"]


# ---------------------------------------------------------------- what is explained


def test_places_are_cosines_of_the_whole(engine):
    image, caption = engine.picture_image("cat"), "a photo of a cat"
    explained = engine.explain(image, caption)
    relevance = patch_relevance(engine.encoder, image, [caption])
    np.testing.assert_allclose(explained.places, relevance.grid[0] / UNIT, atol=1e-5)
    assert explained.places.mean() == pytest.approx(explained.cosine, abs=0.06)
    assert [word.word for word in explained.words] == ["a", "photo", "of", "a", "cat"]


def test_a_foreign_caption_leaves_the_picture_darker(engine, own_and_foreign):
    for name, pair in own_and_foreign.items():
        image = engine.picture_image(name)
        image.thumbnail((256, 256))
        own, foreign = (patch_overlay(image, each.places, limits=each.scale.places, opacity=1.0) for each in pair)
        light = [np.asarray(overlay.convert("L")).mean() for overlay in (own, foreign)]
        assert light[0] > 1.3 * light[1], (name, light)


def test_own_captions_match_and_foreign_ones_do_not(own_and_foreign):
    assert [own.strength for own, _ in own_and_foreign.values()].count("strong") >= 4
    assert {foreign.strength for _, foreign in own_and_foreign.values()} <= {"none", "some"}


def test_an_empty_caption_cannot_be_explained(engine):
    with pytest.raises(InputError):
        engine.explain(engine.picture_image("cat"), " ")


def test_a_picture_whose_file_is_gone_is_opened_from_its_thumbnail(folder, checkpoint):
    encoder = DualEncoder.load(checkpoint("clip"), device="cpu")
    build_gallery(folder, folder / "out", encoder)
    (folder / "gone.png").unlink()
    engine = AlignmentEngine(encoder, Gallery.load(folder / "out", encoder))
    assert engine.picture_image("kept").size == (400, 300)
    assert max(engine.picture_image("gone").size) <= 320
    with pytest.raises(KeyError):
        engine.picture_image("never there")


# ---------------------------------------------------------------- what the dialog is told


def asked(caption: str, *words: tuple[str, int, float], cosine: float = 0.5) -> ExplanationState:
    found = tuple(WordContribution(word, start, start + len(word), (added,)) for word, start, added in words)
    explained = Explanation(cosine, found, np.zeros((2, 2), np.float32), Scale(0.0, 0.1))
    return ExplanationState(7, caption, "a picture", "plain", "overlay", explained)


def test_every_word_has_its_number_and_what_stands_between_is_kept(engine):
    question = asked("A dog, runs!", ("A", 0, 0.0), ("dog", 2, 0.1234), ("runs", 7, -0.05))
    terms = ExplanationDialog(engine).translate("en", question)["terms"]
    assert [term["text"].strip() for term in terms] == ["A", "dog", ",", "runs", "!"]
    assert [term.get("number") for term in terms] == ["0.000", "+0.123", None, "−0.050", None]
    assert [term.get("kind") for term in terms] == ["nothing", "for", None, "against", None]
    assert 0 < terms[3]["share"] < terms[1]["share"] <= 1


def test_the_pair_lies_on_the_axis_also_if_it_is_off_the_scale(engine):
    for cosine, at in ((-1.0, 0), (1.0, 1)):
        axis = ExplanationDialog(engine).translate("en", asked("a", cosine=cosine))["score"]["axis"]
        assert axis["at"] == at
        assert 0 <= axis["band"][0] < axis["mean"] < axis["band"][1] <= 1


def test_the_same_question_is_said_in_both_languages(engine):
    english, chinese = (ExplanationDialog(engine).translate(lang, asked("a dog")) for lang in ("en", "zh"))
    assert english["serial"] == chinese["serial"] == 7
    assert english["labels"].keys() == chinese["labels"].keys() >= {"title", "places.slider", "words.note", "fixed"}
    for said in (*chinese["labels"].values(), chinese["score"]["verdict"], chinese["score"]["said"]):
        assert re.search("[\u4e00-\u9fff]", said)


def test_every_verdict_has_its_words(engine):
    for cosine, key in ((0.0, "none"), (0.25, "some"), (0.9, "strong")):
        value = ExplanationDialog(engine).translate("en", asked("a", cosine=cosine))
        assert value["score"]["verdict"].startswith(strings()["en"][f"explain.{key}"][:8])


def answers(engine: AlignmentEngine, pick) -> list[dict]:
    """What the page is sent after a click."""
    with gr.Blocks() as page:
        explanation, button, language = ExplanationDialog(engine), gr.Button(), gr.Textbox("en")
        explanation.build("en")
        explanation.on_event(button.click, pick, [language])
    handler = page.fns[max(page.fns)].fn
    return [shown(changes[explanation.dialog]) for changes in handler(gr.EventData(None, {}), "en")]


def test_the_dialog_is_busy_first_and_then_explains(engine):
    image = engine.picture_image("cat")
    busy, done = answers(engine, lambda event, lang: Pair(image, "a cat", "a photo of a cat", 0.123))
    assert busy["serial"] == done["serial"] > 0
    assert (busy["busy"], done["busy"]) == (True, False)
    assert busy["caption"] == "a photo of a cat"
    assert "0.123" in done["score"]["said"]  # as the list said it
    assert done["plain"].startswith("data:image/webp;base64,")
    assert done["overlay"] != done["plain"]


def test_what_went_wrong_is_said_in_the_dialog(engine):
    def lost(event, lang):
        raise InputError("The file did not arrive; try again.", "upload.lost")

    assert [value["error"] for value in answers(engine, lost)] == [text("en", "error.upload.lost")]
    *_, empty = answers(engine, lambda event, lang: Pair(Image.new("RGB", (40, 40)), "x", " "))
    assert empty["error"] == text("en", "error.caption.empty")


def test_where_there_is_nothing_to_explain_nothing_opens(engine):
    assert answers(engine, lambda event, lang: None) == []
