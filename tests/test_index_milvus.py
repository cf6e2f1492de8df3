"""What the index on a Milvus server does without one: filters, tags, descriptions and the order of ties."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.index.milvus import encode_tag, order_hits, read_description, tag_filter

ANY_TEXT = st.text(st.characters(), max_size=12)


@pytest.mark.parametrize(
    ("tag", "condition"),
    [
        (None, ""),
        ("en", 'array_contains(tags, "en")'),
        ("", 'array_contains(tags, "")'),
        ("雪 山", 'array_contains(tags, "雪 山")'),
        ("it's", 'array_contains(tags, "it\'s")'),
        ('x" or id > 0 or "', r'array_contains(tags, "x\\\" or id > 0 or \\\"")'),
        ("back\\slash", r'array_contains(tags, "back\\\\slash")'),
        ("new\nline", r'array_contains(tags, "new\\nline")'),
        ("\udcff", r'array_contains(tags, "\\udcff")'),
    ],
)
def test_a_tag_in_a_filter_is_a_literal(tag: str | None, condition: str) -> None:
    assert tag_filter(tag) == condition


@given(ANY_TEXT)
def test_no_tag_can_end_its_literal(tag: str) -> None:
    inside = tag_filter(tag).removeprefix('array_contains(tags, "').removesuffix('")')
    inside.encode()  # it can be sent
    assert not any(ord(letter) < 32 for letter in inside)
    free = inside.replace("\\\\", "").replace('\\"', "")
    assert '"' not in free
    assert "\\" not in free


@given(ANY_TEXT)
def test_different_tags_stay_different(tag: str) -> None:
    assert json.loads(f'"{encode_tag(tag)}"') == tag


def test_hits_within_the_tolerance_are_equal_and_ordered_by_id() -> None:
    found = zip((0.9, 0.5 + 2e-7, 0.9 - 1e-6, 0.5, 0.5 + 4e-7), (9, 8, 7, 6, 5), strict=True)
    scores, ids = order_hits([{"distance": score, "id": id} for score, id in found])
    assert ids.tolist() == [9, 7, 5, 6, 8]
    assert scores[2] == scores[3] == scores[4]
    assert (scores[1:] <= scores[:-1]).all()
    assert order_hits([])[1].tolist() == []


def test_a_collection_of_another_program_is_refused() -> None:
    fields = [{"name": "embed", "params": {"dim": 8}}]
    ours = {"description": '{"made_by": "image-text-alignment", "format": 1, "fingerprint": "f00d"}', "fields": fields}
    assert read_description(ours, "c") == ({"fingerprint": "f00d"}, 8)
    newer = '{"made_by": "image-text-alignment", "format": 2}'
    for description in ("", "photos", "[]", "null", '{"made_by": "x", "format": 1}', "{}", newer):
        with pytest.raises(ValueError, match="made by another program"):
            read_description({**ours, "description": description}, "c")
