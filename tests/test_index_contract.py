"""The local index keeps what every index promises, in memory and in a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch
from index_contract import IndexContract, NewIndex, unit
from torch import Tensor

from alignment.index import LocalIndex, VectorIndex


@pytest.fixture(params=["memory", "file"])
def new_index(request: pytest.FixtureRequest, tmp_path: Path) -> NewIndex:
    def new(ids: Tensor, embeds: Tensor, tags: Sequence[Collection[str]] = ()) -> VectorIndex:
        def tagged(tag: str) -> Tensor:
            return ids[[row for row, names in enumerate(tags) if tag in names]]

        if request.param == "memory":
            return LocalIndex(ids, embeds, tagged=tagged)
        path = tmp_path / "index.faiss"
        LocalIndex.write(path, zip(ids.split(7), embeds.split(7), strict=True), len(ids), embeds.shape[1], "stamp")
        return LocalIndex.open(path, ids, "stamp", tagged=tagged)

    return new


@pytest.fixture
def small(new_index: NewIndex) -> VectorIndex:
    return new_index(torch.arange(20), unit(20))


class TestLocal(IndexContract):
    """All of it."""
