"""What every index promises: run on the local one, in memory and in a file, and on a Milvus server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.index import VectorIndex

DIM = 16
ODD_TAGS = (
    "en",
    "zh",
    "",
    "a/b",
    "雪 山",
    "😀",
    'say "hi"',
    "it's",
    "back\\slash",
    "\\",
    "new\nline",
    "%",
    "\udcff",
    "{x}",
)

NewIndex = Callable[..., VectorIndex]
"""Makes an index of embeddings, whose ids are 0, 1, 2, ..., and, if given, the tags of each row."""


def unit(count: int, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def search_all(index: VectorIndex, queries: Tensor, k: int, **more: Any) -> tuple[Tensor, Tensor]:
    """Search for one query after the other; scores and ids, both (num_queries, k)."""
    scores, ids = zip(*(index.search(query, k, **more) for query in queries), strict=True)
    return torch.stack(scores), torch.stack(ids)


def check_ranked(found: list[int], embeds: Tensor, query: Tensor, k: int, ids: Sequence[int]) -> None:
    """Compare with a sort of all cosines; rows that half precision can hardly tell apart may change places."""
    cosines = dict(zip(ids, (embeds.double() @ query.double()).tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert [cosines[id] for id in found] == pytest.approx(sorted(cosines.values(), reverse=True)[:k], abs=1e-3)


class IndexContract:
    """To be inherited by a class with the fixture `new_index`, and `small`: rows 0 to 19 are `unit(20)`."""

    def test_a_hand_written_search(self, new_index: NewIndex) -> None:
        index = new_index(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
        assert (len(index), index.embed_dim) == (4, 2)
        scores, ids = search_all(index, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3)
        assert ids.tolist() == [[0, 2, 1], [1, 2, 0]]
        torch.testing.assert_close(scores, torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.8, 0.0]]), atol=1e-3, rtol=0)
        assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)

    def test_the_nearest_rows_are_found_best_first(self, new_index: NewIndex) -> None:
        embeds, index = unit(300), new_index(unit(300))
        for query in unit(20, seed=1):
            scores, found = index.search(query, 10)
            check_ranked(found.tolist(), embeds, query, 10, range(300))
            torch.testing.assert_close(scores, embeds[found] @ query, atol=1e-3, rtol=0)
        assert [len(part) for part in index.search(query, 0)] == [0, 0]

    def test_more_results_than_rows_are_all_rows(self, new_index: NewIndex) -> None:
        index, query = new_index(unit(30)), unit(1, seed=1)[0]
        for k in (30, 31, 20_000):
            check_ranked(index.search(query, k)[1].tolist(), unit(30), query, 30, range(30))

    @pytest.mark.parametrize("copies", [12, 200])
    def test_ties_go_by_id(self, copies: int, new_index: NewIndex) -> None:
        embeds = torch.cat([unit(100), unit(1, seed=3).expand(copies, DIM), unit(50, seed=4)])
        scores, found = new_index(embeds).search(unit(1, seed=3)[0], 10)
        assert found.tolist() == list(range(100, 110))
        assert len(scores.unique()) == 1

    def test_more_than_k_may_be_asked_for_and_the_first_k_are_the_same(self, new_index: NewIndex) -> None:
        index, queries = new_index(unit(30)), unit(2, seed=1)
        scores, ids = search_all(index, queries, 3, extra=4)
        assert scores.shape == ids.shape == (2, 7)
        assert torch.equal(ids[:, :3], search_all(index, queries, 3)[1])
        assert (scores[:, 1:] <= scores[:, :-1]).all()
        assert search_all(index, queries, 3, extra=99)[1].shape == (2, 30)

    def test_rows_are_fetched_in_the_order_asked_for(self, new_index: NewIndex) -> None:
        index, embeds = new_index(unit(3)), unit(3)
        torch.testing.assert_close(index.embeds(torch.tensor([1, 2, 1])), embeds[[1, 2, 1]], atol=1e-3, rtol=0)
        assert index.embeds(torch.empty(0, dtype=torch.int64)).shape == (0, DIM)

    def test_a_tag_lets_only_its_rows_compete(self, new_index: NewIndex) -> None:
        tags: list[Collection[str]] = [set(ODD_TAGS[row % 5 :: 3]) for row in range(60)]
        index, embeds, query = new_index(unit(60), tags), unit(60), unit(1, seed=1)[0]
        for tag in (*ODD_TAGS, "unknown", 'x" or id > 0 or "', "EN"):
            carriers = [row for row in range(60) if tag in tags[row]]
            check_ranked(index.search(query, 99, tag=tag)[1].tolist(), embeds[carriers], query, 99, carriers)

    @pytest.mark.parametrize(
        ("query", "k", "extra"),
        [
            (torch.zeros(DIM + 1), 1, 0),
            (torch.zeros(1, DIM), 1, 0),
            (torch.zeros(DIM), -1, 0),
            (torch.zeros(DIM), 1, -1),
        ],
    )
    def test_queries_that_do_not_fit_are_refused(self, query: Tensor, k: int, extra: int, small: VectorIndex) -> None:
        with pytest.raises(ValueError, match=r"one embedding \(16,\)"):
            small.search(query, k, extra=extra)

    def test_many_threads_search_at_once(self, new_index: NewIndex) -> None:
        index, queries = new_index(unit(200)), unit(36, seed=1)
        expected = search_all(index, queries, 5)[1]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda query: index.search(query, 5)[1], queries))
        assert torch.equal(torch.stack(found), expected)
