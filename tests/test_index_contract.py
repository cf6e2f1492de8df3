"""The local index keeps what every index promises, in memory and in a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch
from index_contract import IndexContract, NewIndex, unit
from torch import Tensor

from alignment.index import FileIndex, LocalIndex, VectorIndex


@pytest.fixture(params=["memory", "file"])
def new_index(request: pytest.FixtureRequest, tmp_path: Path) -> NewIndex:
    def new(embeds: Tensor, tags: Sequence[Collection[str]] = ()) -> VectorIndex:
        def tagged(tag: str) -> Tensor:
            return torch.tensor([row for row, names in enumerate(tags) if tag in names], dtype=torch.int64)

        if request.param == "memory":
            return LocalIndex(embeds, tagged)
        path = tmp_path / "index.faiss"
        FileIndex.write(path, embeds.split(7), "stamp")
        return FileIndex(path, "stamp", tagged)

    return new


@pytest.fixture
def small(new_index: NewIndex) -> VectorIndex:
    return new_index(unit(20))


class TestLocal(IndexContract):
    """All of it."""
