import pytest
import torch

from alignment.engine import Term
from alignment.ui.composer import WEIGHTS, QueryPicture, TextQuery, add_picture, composer_value, edit_query

CAT = QueryPicture(Term(picture="cat", embed=torch.ones(2)), "thumbnails/cat.webp")
MINE = QueryPicture(Term(picture="0af3", weight=-1.0, embed=torch.ones(2)), "data:,", "mine.jpg")
ASKED = TextQuery("2 x dog + snow - cat", pictures=(CAT, MINE))


def weights(pictures: tuple[QueryPicture, ...]) -> list[float]:
    return [added.term.weight for added in pictures]


@pytest.mark.parametrize(
    ("act", "text", "box"),
    [
        ("more", "dog", "3 x dog + snow - cat"),
        ("less", "dog", "1.5 x dog + snow - cat"),
        ("less", "cat", "2 x dog + snow - 0.5 x cat"),
        ("flip", "snow", "2 x dog - snow - cat"),
        ("flip", "cat", "2 x dog + snow + cat"),
        ("remove", "dog", "snow - cat"),
        ("remove", "snow", "2 x dog - cat"),
    ],
)
def test_a_button_of_a_caption_rewrites_the_search_box(act, text, box):
    assert edit_query(ASKED, {"act": act, "text": text}) == (box, ASKED.pictures)


def test_of_two_captions_alike_the_one_that_was_pressed_changes():
    asked = TextQuery("dog + dog")
    assert edit_query(asked, {"act": "more", "text": "dog", "index": 1})[0] == "dog + 1.5 x dog"
    assert edit_query(asked, {"act": "more", "text": "dog", "index": 7})[0] == "1.5 x dog + dog"


@pytest.mark.parametrize(
    ("act", "left"), [("more", [1, -1.5]), ("less", [1, -0.5]), ("flip", [1, 1]), ("remove", [1]), ("explode", [1, -1])]
)
def test_a_button_of_a_picture_leaves_the_search_box_alone(act, left):
    box, pictures = edit_query(ASKED, {"act": act, "picture": "0af3"})
    assert (box, weights(pictures)) == (ASKED.caption, left)


@pytest.mark.parametrize(
    "data", [{}, {"act": "remove"}, {"act": "remove", "text": "gone"}, {"act": ["remove"], "text": {}}]
)
def test_what_a_page_sends_is_doubted(data):
    assert edit_query(ASKED, data) == (ASKED.caption, ASKED.pictures)


def test_a_picture_can_be_taken_out_of_a_query_that_cannot_be_read():
    box, pictures = edit_query(TextQuery("99 x dog", pictures=(CAT,)), {"act": "remove", "picture": "cat"})
    assert (box, pictures) == ("99 x dog", ())


def test_weights_stop_at_both_ends():
    asked = TextQuery(f"{WEIGHTS[-1]:g} x dog + {WEIGHTS[0]} x cat")
    assert edit_query(asked, {"act": "more", "text": "dog"})[0] == asked.caption
    assert edit_query(asked, {"act": "less", "text": "cat"})[0] == asked.caption
    first, second = composer_value("en", asked, [])["terms"]
    assert (first["most"], first["least"], second["most"], second["least"]) == (True, False, False, True)


def test_liking_a_picture_again_counts_more_and_disliking_it_turns_it_round():
    once = add_picture((), CAT)
    twice = add_picture(once, CAT)
    assert (weights(once), weights(twice)) == ([1], [1.5])
    assert weights(add_picture(twice, QueryPicture(Term(picture="cat", weight=-1.0), ""))) == [-1]
    assert weights(add_picture(twice, MINE)) == [1.5, -1]


@pytest.mark.parametrize("caption", ["a dog", "a t-shirt", "", "99 x dog"])
def test_one_caption_by_itself_needs_no_chips(caption):
    assert composer_value("en", TextQuery(caption), [])["terms"] == []


def test_chips_say_in_the_pages_language_how_the_query_was_read():
    value = composer_value("zh", ASKED, ["一只猫", "mine.jpg"])
    assert [term["says"] for term in value["terms"]] == [
        "加上：dog",
        "加上：snow",
        "减去：cat",
        "加上：一只猫",
        "减去：mine.jpg",
    ]
    assert [term["weight"] for term in value["terms"]] == ["2×", "1×", "1×", "1×", "1×"]
