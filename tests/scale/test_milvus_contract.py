"""The index on a Milvus server keeps what every index promises."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import count

import pytest
import torch
from index_contract import IndexContract, NewIndex, unit
from torch import Tensor

from alignment.index import MilvusIndex, Server, VectorIndex

NUMBERS = count()


@pytest.fixture
def new_index(place: Server) -> Iterator[NewIndex]:
    made: list[MilvusIndex] = []

    def new(embeds: Tensor, tags: Sequence[Collection[str]] | None = None) -> VectorIndex:
        made.append(MilvusIndex.create(place, f"contract_{next(NUMBERS)}", embeds.shape[1], {}))
        order = torch.randperm(len(embeds), generator=torch.Generator().manual_seed(0))
        made[-1].upsert(order, embeds[order], None if tags is None else [tags[row] for row in order.tolist()])
        return made[-1]

    yield new
    for index in made:
        index.drop()
        index.close()


@pytest.fixture(scope="module")
def kept(milvus) -> Iterator[VectorIndex]:
    index = MilvusIndex.create(Server.at(milvus.uri, {}), "contract_small", 16, {})
    index.upsert(torch.arange(20), unit(20))
    yield index
    index.drop()
    index.close()


@pytest.fixture
def small(kept: VectorIndex) -> VectorIndex:
    return kept


class TestMilvus(IndexContract):
    """All of it."""
