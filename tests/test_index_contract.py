"""The embedded index keeps what every index promises, in memory and in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from index_contract import IndexContract, NewIndex, Reopen, unit

from alignment.index import EmbeddedIndex, Index


@pytest.fixture(params=["memory", "folder"])
def new_index(request: pytest.FixtureRequest, tmp_path: Path) -> NewIndex:
    def new(dim: int) -> Index:
        index = EmbeddedIndex(torch.empty(0, dim))
        if request.param == "folder":
            index.save(tmp_path / "index")
            index = EmbeddedIndex.open(tmp_path / "index")
        return index

    return new


@pytest.fixture
def reopen(tmp_path: Path) -> Reopen:
    def again(index: Index) -> Index:
        assert isinstance(index, EmbeddedIndex)
        index.save(tmp_path / "index")
        return EmbeddedIndex.open(tmp_path / "index")

    return again


@pytest.fixture
def untouched(new_index: NewIndex) -> Index:
    index = new_index(16)
    index.upsert(torch.arange(20), unit(20))
    return index


class TestEmbedded(IndexContract):
    """All of it."""
