"""What only the index on a Milvus server has: collections, marks, other programs, many rows, several objects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from index_contract import unit
from milvus_server import MilvusServer

from alignment.index import MilvusIndex, Server, milvus

NUMBERS = count()


@pytest.fixture
def name(place: Server) -> Iterator[str]:
    """A name for a collection, which is dropped afterwards."""
    name = f"own_{next(NUMBERS)}"
    yield name
    if MilvusIndex.exists(place, name):
        index = MilvusIndex(place, name)
        index.drop()
        index.close()


def test_a_collection_is_made_opened_and_deleted(place: Server, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        MilvusIndex(place, name)
    index = MilvusIndex.create(place, name, 8, {"fingerprint": "f00d"})
    assert index.about == {"fingerprint": "f00d"}
    assert MilvusIndex(place, name).embed_dim == 8
    assert MilvusIndex.exists(place, name)
    index.mark("one")
    index.drop()
    assert not MilvusIndex.exists(place, name)


def test_marks_come_and_go(place: Server, name: str) -> None:
    index = MilvusIndex.create(place, name, 8, {})
    assert index.marks == ()
    index.mark("a1")
    index.mark("b2")
    index.mark("a1")
    assert sorted(MilvusIndex(place, name).marks) == ["a1", "b2"]
    index.unmark(but="b2")
    assert index.marks == ("b2",)
    index.unmark()
    assert index.marks == ()


def test_a_collection_of_another_program_is_left_alone(milvus: MilvusServer, place: Server, name: str) -> None:
    from pymilvus import MilvusClient

    client = MilvusClient(uri=milvus.uri)
    try:
        client.create_collection(name, dimension=8)
        with pytest.raises(ValueError, match="made by another program"):
            MilvusIndex(place, name)
        client.drop_collection(name)
    finally:
        client.close()


def test_what_milvus_finds_fault_with_is_said(place: Server) -> None:
    with pytest.raises(ValueError, match="refuses a request"):
        MilvusIndex.create(place, "no name", 8, {})


def test_two_objects_see_what_the_other_did(place: Server, name: str) -> None:
    one = MilvusIndex.create(place, name, 16, {})
    two = MilvusIndex(place, name)
    one.upsert(torch.arange(10), unit(10), [{"a"}] * 10)
    assert two.ids().tolist() == list(range(10))
    two.delete(torch.tensor([3]))
    assert len(one) == 9
    assert one.tags() == {"a": 9}
    assert one.search(unit(10)[3:4], 10)[1].shape == (1, 9)
    one.close()
    two.close()


def test_many_rows_in_many_pieces(place: Server, name: str, milvus_client) -> None:
    """More rows than one answer holds, in segments whose ids are mixed, with the index built."""
    rows = milvus.MOST + 4000
    index, embeds = MilvusIndex.create(place, name, 64, {}), unit(rows, 64)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    tags = [{"third"} if row % 3 == 0 else set() for row in range(rows)]
    for part in order.split(rows // 3):
        index.upsert(part * 7 - 5000, embeds[part], [tags[row] for row in part.tolist()])
        milvus_client.flush(name)
    ids = [row * 7 - 5000 for row in range(rows)]
    assert index.ids().tolist() == ids
    assert index.ids("third").tolist() == ids[::3]
    assert index.tags() == {"third": len(ids[::3])}
    some = torch.arange(0, rows, 5)
    torch.testing.assert_close(index.embeds(some * 7 - 5000), embeds[some])
    queries = unit(50, 64, seed=9)
    found = (index.search(queries, 10)[1] + 5000) // 7
    exact = (queries @ embeds.T).topk(10).indices
    recall = (found[:, :, None] == exact[:, None]).any(2).float().mean().item()
    print(f"\nrecall@10 among {rows} rows: {recall:.4f}")
    assert recall > 0.95
    third = index.search(queries[:5], 10, tag="third")[1]
    assert (third.add(5000) % 21 == 0).all()
    every = index.search(queries[:1], rows)[1]
    assert sorted(every[0].tolist()) == ids
    assert index.delete(torch.tensor(ids[: milvus.MOST])) == milvus.MOST
    assert index.ids().tolist() == ids[milvus.MOST :]


def test_ties_beyond_what_was_asked_for_go_by_id(place: Server, name: str) -> None:
    index = MilvusIndex.create(place, name, 16, {})
    ids = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    for part in ids.split(700):
        index.upsert(part, unit(1).expand(len(part), 16))
    scores, found = index.search(unit(1), 12)
    assert found[0].tolist() == list(range(12))
    assert len(scores.unique()) == 1
