"""What every index promises: run on the local one, in memory and in a file, and on a Milvus server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

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
"""Makes an index of ids, embeddings and, if given, the tags of each row."""


def unit(count: int, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def check_ranked(found: list[int], embeds: Tensor, query: Tensor, k: int, ids: Sequence[int]) -> None:
    """Compare with a sort of all cosines; rows that half precision can hardly tell apart may change places."""
    cosines = dict(zip(ids, (embeds.double() @ query.double()).tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert [cosines[id] for id in found] == pytest.approx(sorted(cosines.values(), reverse=True)[:k], abs=1e-3)


class IndexContract:
    """To be inherited by a class with the fixture `new_index`, and `small`: rows 0 to 19 are `unit(20)`."""

    def test_a_hand_written_search(self, new_index: NewIndex) -> None:
        index = new_index(torch.arange(4), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
        assert (len(index), index.embed_dim) == (4, 2)
        scores, ids = index.search(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3)
        assert ids.tolist() == [[0, 2, 1], [1, 2, 0]]
        torch.testing.assert_close(scores, torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.8, 0.0]]), atol=1e-3, rtol=0)
        assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)

    def test_the_nearest_rows_are_found_best_first(self, new_index: NewIndex) -> None:
        ids, embeds, queries = torch.arange(1000, 1300), unit(300), unit(20, seed=1)
        index = new_index(ids, embeds)
        scores, found = index.search(queries, 10)
        for query, row, says in zip(queries, found.tolist(), scores, strict=True):
            check_ranked(row, embeds, query, 10, ids.tolist())
            torch.testing.assert_close(says, embeds[torch.tensor(row) - 1000] @ query, atol=1e-3, rtol=0)
        assert index.search(queries, 0)[1].shape == (20, 0)
        assert index.search(queries[:0], 3)[1].shape[0] == 0

    def test_more_results_than_rows_are_all_rows(self, new_index: NewIndex) -> None:
        index, query = new_index(torch.arange(30), unit(30)), unit(1, seed=1)
        for k in (30, 31, 20_000):
            check_ranked(index.search(query, k)[1][0].tolist(), unit(30), query[0], 30, range(30))

    @pytest.mark.parametrize("copies", [12, 200])
    def test_ties_go_by_id(self, copies: int, new_index: NewIndex) -> None:
        ids = torch.randperm(copies, generator=torch.Generator().manual_seed(0))
        embeds = torch.cat([unit(100), unit(1, seed=3).expand(copies, DIM)])
        scores, found = new_index(torch.cat([torch.arange(5000, 5100), ids]), embeds).search(unit(1, seed=3), 10)
        assert found[0].tolist() == list(range(10))
        assert len(scores.unique()) == 1

    def test_more_than_k_may_be_asked_for_and_the_first_k_are_the_same(self, new_index: NewIndex) -> None:
        index, queries = new_index(torch.arange(30), unit(30)), unit(2, seed=1)
        scores, ids = index.search(queries, 3, extra=4)
        assert scores.shape == ids.shape == (2, 7)
        assert torch.equal(ids[:, :3], index.search(queries, 3)[1])
        assert (scores[:, 1:] <= scores[:, :-1]).all()
        assert index.search(queries, 3, extra=99)[1].shape == (2, 30)

    def test_ids_are_the_callers(self, new_index: NewIndex) -> None:
        ids = [7, -3, 2**62, 0, -(2**63) + 1, 2**63 - 2]
        index = new_index(torch.tensor(ids), unit(1).expand(6, DIM))
        assert index.ids().tolist() == sorted(ids)
        assert index.search(unit(1), 6)[1].tolist() == [sorted(ids)]

    def test_rows_are_fetched_by_their_id_in_the_order_asked_for(self, new_index: NewIndex) -> None:
        index, embeds = new_index(torch.tensor([30, 10, 20]), unit(3)), unit(3)
        torch.testing.assert_close(index.embeds(torch.tensor([10, 20, 10])), embeds[[1, 2, 1]], atol=1e-3, rtol=0)
        assert index.embeds(torch.empty(0, dtype=torch.int64)).shape == (0, DIM)
        with pytest.raises(ValueError, match="no row with the id 11"):
            index.embeds(torch.tensor([10, 11]))

    def test_a_tag_lets_only_its_rows_compete(self, new_index: NewIndex) -> None:
        tags: list[Collection[str]] = [set(ODD_TAGS[row % 5 :: 3]) for row in range(60)]
        index, embeds, query = new_index(torch.arange(60), unit(60), tags), unit(60), unit(1, seed=1)
        for tag in (*ODD_TAGS, "unknown", 'x" or id > 0 or "', "EN"):
            carriers = [row for row in range(60) if tag in tags[row]]
            assert index.ids(tag).tolist() == carriers
            check_ranked(index.search(query, 99, tag=tag)[1][0].tolist(), embeds[carriers], query[0], 99, carriers)

    @pytest.mark.parametrize(
        ("queries", "k", "extra", "message"),
        [
            (torch.zeros(1, DIM + 1), 1, 0, r"\(num_queries, 16\)"),
            (torch.zeros(DIM), 1, 0, r"\(num_queries, 16\)"),
            (unit(1), -1, 0, "negative"),
            (unit(1), 1, -1, "negative"),
        ],
    )
    def test_queries_that_do_not_fit_are_refused(
        self, queries: Tensor, k: int, extra: int, message: str, small: VectorIndex
    ) -> None:
        with pytest.raises(ValueError, match=message):
            small.search(queries, k, extra=extra)

    @pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1]])])
    def test_ids_that_are_no_integers_are_refused(self, ids: Tensor, small: VectorIndex) -> None:
        with pytest.raises(ValueError, match="integers"):
            small.embeds(ids)

    def test_many_threads_search_at_once(self, new_index: NewIndex) -> None:
        index, queries = new_index(torch.arange(200), unit(200)), unit(36, seed=1)
        expected, found = index.search(queries, 5)[1], torch.zeros(36, 5, dtype=torch.int64)

        def search(first: int) -> None:
            for row in range(first, 36, 6):
                found[row] = index.search(queries[row : row + 1], 5)[1][0]

        threads = [threading.Thread(target=search, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(found, expected)
