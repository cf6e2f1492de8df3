"""The index on a Milvus server keeps what every index promises."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from index_contract import IndexContract, NewIndex, Reopen, unit

from alignment.index import Index, MilvusIndex, Server

NUMBERS = count()


@pytest.fixture
def new_index(place: Server) -> Iterator[NewIndex]:
    made: list[MilvusIndex] = []

    def new(dim: int) -> Index:
        made.append(MilvusIndex.create(place, f"contract_{next(NUMBERS)}", dim, {}))
        return made[-1]

    yield new
    for index in made:
        index.drop()
        index.close()


@pytest.fixture
def reopen(place: Server) -> Iterator[Reopen]:
    opened: list[MilvusIndex] = []

    def again(index: Index) -> Index:
        assert isinstance(index, MilvusIndex)
        opened.append(MilvusIndex(place, index.name))
        return opened[-1]

    yield again
    for index in opened:
        index.close()


@pytest.fixture(scope="module")
def kept(milvus) -> Iterator[Index]:
    index = MilvusIndex.create(Server.at(milvus.uri, {}), "contract_untouched", 16, {})
    index.upsert(torch.arange(20), unit(20))
    yield index
    index.drop()
    index.close()


@pytest.fixture
def untouched(kept: Index) -> Index:
    return kept


class TestMilvus(IndexContract):
    """All of it."""
