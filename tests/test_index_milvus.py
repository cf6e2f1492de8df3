"""What the index on a Milvus server can be told without one: its filters, its tags and the order of ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.index import milvus
from alignment.index.server import Server

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
def test_a_tag_in_a_filter_is_a_text_and_nothing_else(tag: str | None, condition: str) -> None:
    assert milvus._carries(tag) == condition


@given(ANY_TEXT)
def test_no_tag_can_end_the_text_it_is_in(tag: str) -> None:
    inside = milvus._carries(tag).removeprefix('array_contains(tags, "').removesuffix('")')
    inside.encode()  # it can be sent
    assert not any(ord(letter) < 32 for letter in inside)
    free = inside.replace("\\\\", "").replace('\\"', "")
    assert '"' not in free
    assert "\\" not in free


@given(ANY_TEXT)
def test_a_tag_is_read_as_it_was_written(tag: str) -> None:
    assert milvus._read_tag(milvus._write_tag(tag)) == tag


def test_tags_are_written_once_and_in_order() -> None:
    assert milvus._written_tags(["b", "a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="65535 bytes"):
        milvus._written_tags(["x" * 70_000])
    with pytest.raises(ValueError, match="4096 tags"):
        milvus._written_tags([str(number) for number in range(5000)])


def test_ids_are_written_out() -> None:
    assert milvus._among(np.array([3, -1, 2**62])) == f"id in [3, -1, {2**62}]"


def test_rows_closer_than_a_tie_are_equal_and_go_by_id() -> None:
    scores = np.array([0.9, 0.5 + 2e-7, 0.9 - 1e-6, 0.5, 0.5 + 4e-7], np.float32)
    ordered, ids = milvus._in_order(scores, np.array([9, 8, 7, 6, 5]))
    assert ids.tolist() == [9, 7, 5, 6, 8]
    assert ordered[2] == ordered[3] == ordered[4]
    assert (np.diff(ordered) <= 0).all()
    assert milvus._tied(ordered, 3)
    assert not milvus._tied(ordered, 2)
    assert not milvus._tied(ordered, 0)
    assert milvus._in_order(scores[:0], np.array([], np.int64))[1].tolist() == []


def test_a_collection_of_another_program_is_not_taken_for_ours() -> None:
    server, fields = Server("http://host:19530"), [{"name": "embed", "params": {"dim": 8}}]
    ours = {"description": '{"made_by": "image-text-alignment", "format": 1, "fingerprint": "f00d"}', "fields": fields}
    assert milvus._read(ours, "c", server) == ({"fingerprint": "f00d"}, 8)
    for description in ("", "photos", "[]", "null", '{"made_by": "x", "format": 1}', "{}"):
        with pytest.raises(ValueError, match="collection c at http://host:19530 was made by another program"):
            milvus._read({**ours, "description": description}, "c", server)
    with pytest.raises(ValueError, match="format 2, and this version reads 1"):
        milvus._read({**ours, "description": '{"made_by": "image-text-alignment", "format": 2}'}, "c", server)
