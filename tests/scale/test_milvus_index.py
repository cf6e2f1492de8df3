"""What only the index on a Milvus server has: collections, writes, marks, waiting for the index, many rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest
import torch
from index_contract import search_all, unit

from alignment.index import MilvusIndex, Server
from alignment.index.milvus import MAX_LIMIT, PROVISIONAL_ROWS
from alignment.index.server import Connection

NUMBERS = count()


@pytest.fixture
def connection(place: Server) -> Iterator[Connection]:
    with closing(Connection(place)) as connection:
        yield connection


@pytest.fixture
def name(connection: Connection) -> Iterator[str]:
    """A name for a collection, which is deleted afterwards."""
    name = f"own_{next(NUMBERS)}"
    yield name
    if connection.call("has_collection", name):
        for alias in connection.call("describe_collection", name)["aliases"]:
            connection.call("drop_alias", alias)
        connection.call("drop_collection", name)


def test_a_collection_is_created_opened_and_deleted(place: Server, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        MilvusIndex(place, name)
    with closing(MilvusIndex.create(place, name, 8, {"fingerprint": "f00d"})) as index:
        assert index.about == {"fingerprint": "f00d"}
        with closing(MilvusIndex(place, name)) as again:
            assert again.embed_dim == 8
        index.mark("one")
        index.drop()
    with pytest.raises(FileNotFoundError):
        MilvusIndex(place, name)


def test_a_mark_takes_the_place_of_another(place: Server, name: str) -> None:
    with closing(MilvusIndex.create(place, name, 8, {})) as index:
        assert index.marks == ()
        for mark in ("a1", "b2", "b2"):
            index.mark(mark)
            with closing(MilvusIndex(place, name)) as again:
                assert again.marks == (mark,)
        index.mark("")
        assert index.marks == ()


def test_a_collection_of_another_program_is_refused(place: Server, connection: Connection, name: str) -> None:
    connection.call("create_collection", name, dimension=8)
    with pytest.raises(ValueError, match="made by another program"):
        MilvusIndex(place, name)


def test_what_the_server_rejects_is_an_error(place: Server) -> None:
    with pytest.raises(ValueError, match="refuses a request"):
        MilvusIndex.create(place, "no name", 8, {})


def test_rows_are_replaced_and_deleted(place: Server, name: str) -> None:
    with closing(MilvusIndex.create(place, name, 16, {})) as index:
        index.upsert(torch.arange(20), unit(20), [["old"]] * 20)
        index.upsert(torch.tensor([3, 99]), unit(2, seed=5), [["new"], ["new", "old"]])
        assert index.ids("new").tolist() == [3, 99]
        assert 3 not in index.ids("old")
        assert search_all(index, unit(2, seed=5), 1)[1].tolist() == [[3], [99]]
        index.delete(torch.tensor([4, 5, 77]))
        assert len(index) == 19
        assert not {4, 5} & set(search_all(index, unit(20)[4:6], 20)[1].flatten().tolist())
        with pytest.raises(ValueError, match="no row with the id 4"):
            index.embeds(torch.tensor([3, 4]))


@pytest.mark.parametrize(
    ("ids", "embeds", "message"),
    [
        (torch.arange(2), unit(2, 17), "16 wide"),
        (torch.arange(1), torch.full((1, 16), torch.nan), "finite"),
        (torch.arange(1), unit(2), "shorter|longer"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    ids: torch.Tensor, embeds: torch.Tensor, message: str, place: Server, name: str
) -> None:
    with closing(MilvusIndex.create(place, name, 16, {})) as index:
        with pytest.raises(ValueError, match=message):
            index.upsert(ids, embeds)
        assert len(index) == 0


def test_two_connections_see_each_others_writes(place: Server, name: str) -> None:
    with closing(MilvusIndex.create(place, name, 16, {})) as one, closing(MilvusIndex(place, name)) as two:
        one.upsert(torch.arange(10), unit(10), [["a"]] * 10)
        assert two.ids("a").tolist() == list(range(10))
        two.delete(torch.tensor([3]))
        assert len(one) == 9
        assert one.search(unit(10)[3], 10)[1].shape == (9,)


def test_many_rows_are_listed_searched_and_indexed(place: Server, name: str) -> None:
    """More rows than one answer holds, in several segments that ids are spread over."""
    rows = MAX_LIMIT + 4000
    embeds, ids = unit(rows, 64), torch.arange(rows) * 7 - 5000
    with closing(MilvusIndex.create(place, name, 64, {})) as index:
        for part in torch.randperm(rows, generator=torch.Generator().manual_seed(1)).split(rows // 3):
            index.upsert(ids[part], embeds[part], [["third"] if row % 3 == 0 else [] for row in part.tolist()])
        queries = unit(50, 64, seed=9)
        exact = (queries @ embeds.T).topk(10).indices

        def recall() -> float:
            found = (search_all(index, queries, 10)[1] + 5000) // 7
            return (found[:, :, None] == exact[:, None]).any(2).float().mean().item()

        before, waited = recall(), []
        index.wait_until_indexed(waited.append)
        print(f"\nrecall@10 among {rows} rows: {before:.3f}, with its index after {len(waited)} s {recall():.3f}")
        assert recall() > 0.95
        assert all(PROVISIONAL_ROWS < left <= rows for left in waited)
        index.wait_until_indexed(pytest.fail)
        assert index.ids().equal(ids)
        assert index.ids("third").equal(ids[::3])
        torch.testing.assert_close(index.embeds(ids[::5]), embeds[::5])
        assert ((search_all(index, queries[:5], 10, tag="third")[1] + 5000) % 21 == 0).all()
        scores, every = index.search(queries[0], rows)
        assert every.sort().values.equal(ids)
        torch.testing.assert_close(scores, (embeds @ queries[0])[(every + 5000) // 7], atol=2e-6, rtol=0)
        index.delete(ids[:MAX_LIMIT])
        assert index.ids().equal(ids[MAX_LIMIT:])


def test_ties_beyond_the_limit_are_ordered_by_id(place: Server, name: str) -> None:
    with closing(MilvusIndex.create(place, name, 16, {})) as index:
        index.upsert(
            torch.randperm(3000, generator=torch.Generator().manual_seed(0)), unit(1).expand(3000, 16).contiguous()
        )
        scores, found = index.search(unit(1)[0], 12)
        assert found.tolist() == list(range(12))
        assert len(scores.unique()) == 1


def test_ids_are_the_callers(place: Server, name: str) -> None:
    ids = [7, -3, 2**62, 0, -(2**63) + 1, 2**63 - 2]
    with closing(MilvusIndex.create(place, name, 16, {})) as index:
        index.upsert(torch.tensor(ids), unit(1).expand(6, 16).contiguous(), [["en"], ["en", "zh"], [], [], [], []])
        assert index.ids().tolist() == sorted(ids)
        assert index.ids("en").tolist() == [-3, 7]
        assert index.search(unit(1)[0], 6)[1].tolist() == sorted(ids)
