"""Captions: normalised, split into lines, refused where empty, too long or too many."""

import pytest

from alignment.preprocess import InputError, clean_caption, parse_captions


def test_a_caption_is_cleaned() -> None:
    assert clean_caption("  a\tdog\r\n  runs\x00\u200b \u3000here ") == "a dog runs here"
    assert clean_caption("一只狗") == "一只狗"
    assert clean_caption("family 👨\u200d👩\u200d👧") == "family 👨\u200d👩\u200d👧"  # joiners carry meaning
    assert clean_caption("lone \ud800 surrogate").encode() == b"lone surrogate"


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("an astro\u00adnaut", "an astronaut"),
        ("an astro\u200bnaut", "an astronaut"),
        ("an\u2060 astro\u200d\u200cnaut\ufeff", "an astronaut"),
        ("a\u200d dog\ufe0f", "a dog"),
        ("一只\u200b狗", "一只狗"),
        ("cafe\u0301", "café"),
        ("\u1112\u1161\u11ab", "한"),
        ("می\u200cخواهم\u200c", "می\u200cخواهم"),  # Persian parts letters by it
        ("क्\u200dष", "क्\u200dष"),
        ("ന്\u200d മ", "ന്\u200d മ"),
        ("❤️ 1️⃣ 🏴\U000e0067\U000e0062\U000e007f", "❤️ 1️⃣ 🏴\U000e0067\U000e0062\U000e007f"),
        ("a\U000e0067 dog", "a dog"),
    ],
)
def test_what_does_not_show_changes_no_caption(text: str, caption: str) -> None:
    assert clean_caption(text) == caption


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufeff", "\x00"])
def test_an_empty_caption_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        clean_caption(text)
    assert caught.value.code == "caption.empty"


def test_a_caption_may_have_a_thousand_characters_and_no_more() -> None:
    assert len(clean_caption("x" * 1000)) == 1000
    with pytest.raises(InputError, match="1001 characters and the limit is 1000") as caught:
        clean_caption("x" * 1001)
    assert (caught.value.code, caught.value.values) == ("caption.too_long", {"length": 1001, "limit": 1000})


def test_captions_are_read_one_a_line() -> None:
    assert parse_captions("\n a dog \r\n\n  two   cats\n\u200b\n") == ["a dog", "two cats"]


def test_no_caption_and_too_many_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        parse_captions(" \n \n")
    assert caught.value.code == "captions.none"
    assert len(parse_captions("a\n" * 200)) == 200
    with pytest.raises(InputError, match="201 captions and the limit is 200") as caught:
        parse_captions("a\n" * 201)
    assert caught.value.code == "captions.too_many"
    with pytest.raises(InputError) as caught:
        parse_captions("a\nb\nc", limit=2)
    assert caught.value.values == {"count": 3, "limit": 2}
    with pytest.raises(InputError) as caught:
        parse_captions("fine\n" + "x" * 1001)
    assert caught.value.code == "caption.too_long"
