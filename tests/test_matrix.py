"""Pictures against captions under one model or two, what is paired by name, and what the page is told."""

import json
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from alignment.engine import AlignmentEngine, Scale, SecondModel
from alignment.engine.matrix import COLOUR_LIMITS, named_captions
from alignment.gallery import build_gallery
from alignment.model import DualEncoder
from alignment.preprocess.captions import caption_lines
from alignment.ui.examples import Examples
from alignment.ui.explanation import ExplanationDialog
from alignment.ui.matrix_tab import NUM_COMPARED, MatrixTab
from alignment.ui.strings import text
from alignment.ui.uploads import PhotoState
from alignment.ui.widgets import as_json


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three pictures with captions."""
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for row, name in enumerate(("one", "two", "three")):
        image = Image.effect_noise((90 + 30 * row, 60), 80).convert("RGB")
        image.paste((40 * row, 200 - 60 * row, 90), (0, 0, 40, 60))
        image.save(folder / f"{name}.png")
        lines.append({"id": name, "source": f"{name}.png", "en": f"picture {name}", "zh": f"图片{name}"})
    (folder / "pictures.jsonl").write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def engine_of(checkpoint, source, tmp_path_factory):
    """Serve a tiny model, if wanted with a second one: `engine_of("clip", "siglip")`."""

    def make(name: str, second: str = "") -> AlignmentEngine:
        encoder = DualEncoder.load(checkpoint(name), device="cpu")
        gallery = build_gallery(source, tmp_path_factory.mktemp("gallery"), encoder)
        other = SecondModel(DualEncoder.load(checkpoint(second), device="cpu"), Scale(0.0, 0.1)) if second else None
        return AlignmentEngine(encoder, gallery, other)

    return make


@pytest.fixture(scope="module")
def engine(engine_of) -> AlignmentEngine:
    return engine_of("clip", "chinese-clip")


@pytest.fixture(scope="module")
def tab(engine) -> MatrixTab:
    return tab_of(engine)


def tab_of(engine: AlignmentEngine) -> MatrixTab:
    tab = MatrixTab(engine, Examples(engine), ExplanationDialog(engine))
    with gr.Blocks():
        language = gr.Radio(["en", "zh"])
        tab.explanation.build("en")
        tab.build(language, "en")
    return tab


# ---------------------------------------------------------------- file names


NAMES = ["cat.jpg", "My Dog.PNG", "img_1.jpg", "sea, 2.jpg"]


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("cat.jpg: a cat asleep", (0, "a cat asleep")),
        ("CAT.JPG:a cat", (0, "a cat")),
        ("  my dog.png\ta dog", (1, "a dog")),
        ("img_1.jpg , the first", (2, "the first")),
        ("cat.jpg：一只猫", (0, "一只猫")),
        ("sea, 2.jpg, waves", (3, "waves")),  # a name that holds a comma
        ("cat: a cat asleep", (0, "a cat asleep")),
        ("cat.jpg:", (None, "cat.jpg:")),  # no caption is left
        ("cat.jpg a cat", (None, "cat.jpg a cat")),
        ("catalogue.jpg: a book", (None, "catalogue.jpg: a book")),
        ("a cat, asleep", (None, "a cat, asleep")),
    ],
)
def test_a_caption_names_its_picture_at_the_beginning_of_the_line(line, read):
    assert named_captions([line], NAMES) == [read]


def test_a_name_without_its_ending_counts_only_where_every_line_has_one():
    assert named_captions(["cat: asleep", "img_1, by the sea"], NAMES) == [(0, "asleep"), (2, "by the sea")]
    mixed = named_captions(["cat, black and white", "a dog"], NAMES)
    assert mixed == [(None, "cat, black and white"), (None, "a dog")]


def test_several_captions_may_name_one_picture_and_blank_lines_do_not_count():
    lines = caption_lines("cat.jpg: one\n \n\u200b\ncat.jpg: two", limit=2)
    assert named_captions(lines, NAMES) == [(0, "one"), (0, "two")]


def test_a_name_that_two_pictures_share_names_neither():
    assert named_captions(["cat.jpg: a cat"], ["cat.jpg", "Cat.jpg"]) == [(None, "cat.jpg: a cat")]
    assert named_captions(["cat: a cat"], ["cat.jpg", "cat.png"]) == [(None, "cat: a cat")]
    assert named_captions(["cat.png: a cat"], ["cat.jpg", "cat.png"]) == [(1, "a cat")]


# ---------------------------------------------------------------- two models


def test_both_models_score_the_pictures_from_their_pixels(engine, pictures, encoded):
    files = [(f"{row}.png", encoded(image, "PNG")) for row, image in enumerate(pictures)]
    photos, _ = engine.add_photos(engine.no_photos(both=True), files[:2])
    photos, _ = engine.add_photos(photos, files[2:])
    captions = ["two cats", "狗"]
    first, second = engine.align_both(photos, captions)
    for alignment, encoder in ((first, engine.encoder), (second, engine.second.encoder)):
        expected = encoder.encode_images(pictures) @ encoder.encode_texts(captions).T
        torch.testing.assert_close(alignment.similarity, expected)
        torch.testing.assert_close(alignment.logits_per_image, expected * encoder.logit_scale)


def test_a_picture_that_is_removed_is_gone_for_both_models(engine, pictures, encoded):
    files = [(f"{row}.png", encoded(image, "PNG")) for row, image in enumerate(pictures)]
    photos, _ = engine.add_photos(engine.no_photos(both=True), files)
    fewer = engine.without(photos, photos.gallery.pictures[1].id)
    for all_of_them, rest in zip(
        engine.align_both(photos, ["pasta"]), engine.align_both(fewer, ["pasta"]), strict=True
    ):
        torch.testing.assert_close(rest.similarity, all_of_them.similarity[[0, 2]])


def test_only_the_matrix_asks_the_second_model(engine, engine_of):
    assert engine.no_photos().second_embeds is None
    assert len(engine.align_both(engine.gallery_photos(["one"]), ["pasta"])) == 1
    assert len(engine.align_both(engine.gallery_photos(["one"], both=True), ["pasta"])) == 2
    assert engine_of("clip").gallery_photos(["one"], both=True).second_embeds is None


def test_a_second_model_is_measured_when_it_is_loaded(checkpoint):
    second = SecondModel.load(checkpoint("clip"))
    assert second.scale.spread > 0
    assert -1 < second.scale.unrelated < 1


def test_colours_depend_on_the_model_and_stay_within_cosines():
    assert Scale(0.02, 0.1).limits(*COLOUR_LIMITS) == pytest.approx((-0.18, 0.62))
    assert Scale(0.5, 0.4).limits(*COLOUR_LIMITS) == (pytest.approx(-0.3), 1.0)


# ---------------------------------------------------------------- what the page is told


def test_the_page_is_told_captions_as_rows_and_the_models_side_by_side(tab, engine):
    compared = tab.compare(tab.sample, "two cats\npasta")
    table = tab.table_value("en", compared)
    assert (table["rows"], len(table["columns"])) == (["two cats", "pasta"], 3)
    assert [model["name"] for model in table["models"]] == ["clip", "chinese-clip"]
    for model, alignment in zip(table["models"], compared.alignments, strict=True):
        torch.testing.assert_close(torch.tensor(model["cosines"]), alignment.similarity.T)
        assert (model["scale"], model["bias"]) == (alignment.logit_scale, None)
    assert table["models"][0]["limits"] == list(engine.scale.limits(*COLOUR_LIMITS))
    assert table["views"] == ["cosine", "captions", "pictures"]


def test_the_colours_of_a_table_do_not_depend_on_what_is_compared(tab):
    limits = [
        tab.table_value("en", tab.compare(tab.sample, typed))["models"][0]["limits"] for typed in ("two cats", "x\ny")
    ]
    assert limits[0] == limits[1]


def test_the_second_models_numbers_are_only_told_where_there_is_one(engine_of):
    tab = tab_of(engine_of("clip"))
    assert len(tab.table_value("en", tab.compare(tab.sample, "two cats"))["models"]) == 1


def test_a_model_with_a_bias_is_also_shown_by_its_sigmoid(engine_of):
    engine = engine_of("siglip")
    tab = tab_of(engine)
    table = tab.table_value("zh", tab.compare(tab.sample, "two cats"))
    assert table["views"] == ["cosine", "captions", "pictures", "sigmoid"]
    assert table["models"][0]["bias"] == engine.encoder.logit_bias


def test_pairs_are_by_order_until_a_line_names_a_picture(tab):
    table = tab.table_value("en", tab.compare(tab.sample, "a\nb\nc\nd"))
    assert (table["pairing"], table["owners"]["order"]) == ("order", [0, 1, 2, -1])
    table = tab.table_value("en", tab.compare(tab.sample, "three.png: c\nb\none.png: a"))
    assert (table["pairing"], table["owners"]["name"]) == ("name", [2, -1, 0])
    assert table["rows"] == ["c", "b", "a"]
    assert table["owners"]["none"] == [-1, -1, -1]


def test_what_is_wrong_is_said_instead_of_a_table(tab, engine):
    assert tab.table_value("en", tab.compare(tab.sample, " \n"))["error"] == text("en", "error.captions.none")
    assert "65" in tab.table_value("zh", tab.compare(tab.sample, "a\n" * 65))["error"]
    empty = tab.compare(PhotoState(engine.no_photos(both=True), False), "a cat")
    assert tab.table_value("zh", empty) == {"note": text("zh", "matrix.empty")}


def test_sixty_four_pasted_captions_fit(tab):
    pasted = "\r\n".join(f"caption {row}" for row in range(64))
    assert len(tab.table_value("en", tab.compare(tab.sample, pasted))["rows"]) == 64


def test_a_link_brings_its_captions(tab):
    changes = tab.load_from_url("zh", "a\nb")
    assert changes.keys() == set(tab.url_outputs)
    assert (changes[tab.captions], changes[tab.compared].captions) == ("a\nb", ("a", "b"))
    assert changes[tab.table]["rows"] == ["a", "b"]
    assert changes[tab.drop]["status"] == text("zh", "matrix.sample")


class Event:
    def __init__(self, data: object) -> None:
        self._data = data


@pytest.mark.parametrize("own", [False, True])
def test_a_cell_is_explained_by_its_picture_and_caption(tab, engine, source, own):
    state = tab.sample
    if own:
        photos, _ = engine.add_photos(engine.no_photos(both=True), [("mine.png", (source / "two.png").read_bytes())])
        state = PhotoState(photos, False)
    compared = tab.compare(state, "two cats\npasta")
    picture = state.photos.gallery.pictures[-1]
    pair = tab.find_pair(Event({"caption": 1, "picture": picture.id}), "zh", "", compared)
    assert pair.caption == "pasta"
    assert pair.cosine == pytest.approx(float(compared.alignments[0].similarity[-1, 1]))
    assert pair.name == ("mine.png" if own else "图片three")
    assert pair.image.size == ((120, 60) if own else (150, 60))


PLACE = {"caption": 0, "picture": "one"}


@pytest.mark.parametrize(
    "sent",
    [
        None,
        [],
        {},
        {**PLACE, "caption": 2},
        {**PLACE, "caption": -1},
        {**PLACE, "caption": "0"},
        {**PLACE, "caption": True},
        {**PLACE, "picture": "unknown"},
        {**PLACE, "picture": ["one"]},
    ],
)
def test_a_cell_that_is_not_there_is_not_explained(tab, sent):
    assert tab.find_pair(Event(sent), "en", "", tab.compare(tab.sample, "two cats\npasta")) is None


def test_examples_speak_the_other_language_and_own_captions_stay(tab):
    english, chinese = ("\n".join(tab.examples.queries(lang)[:NUM_COMPARED]) for lang in ("en", "zh"))
    changes = tab.translate("zh", english, tab.compare(tab.sample, english))
    assert changes[tab.captions]["value"] == chinese
    assert list(changes[tab.compared].captions) == changes[tab.table]["rows"] == chinese.split("\n")
    changes = tab.translate("zh", "my own", tab.compare(tab.sample, "my own"))
    assert "value" not in changes[tab.captions]
    assert tab.compared not in changes
    assert changes[tab.table]["rows"] == ["my own"]
    assert changes[tab.table]["labels"]["sort"] == text("zh", "matrix.label.sort")


def test_numbers_of_numpy_and_what_is_no_number_reach_the_page():
    value = {"row": np.arange(2, dtype=np.float32), "one": np.float64(0.5), "none": float("nan")}
    assert json.loads(as_json(value)["json"]) == {"row": [0.0, 1.0], "one": 0.5, "none": None}
